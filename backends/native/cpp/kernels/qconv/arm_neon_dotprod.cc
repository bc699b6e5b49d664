#include "kernels/qconv/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qconv_neon_dotprod(const QconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                        std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_generic<neon_dotprod::Simd, 0, 0, 3, 5>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
