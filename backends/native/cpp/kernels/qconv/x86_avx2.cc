#include "kernels/qconv/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qconv_avx2(const QconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_generic<avx2::Simd, 0, 0, 0, 2>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
