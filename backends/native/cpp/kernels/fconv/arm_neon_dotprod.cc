#include "kernels/fconv/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void fconv_neon_dotprod(const FconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                        std::int64_t panel_end, std::uint8_t* scratch) {
  fconv_generic<neon_dotprod::Simd, 3, 2>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
