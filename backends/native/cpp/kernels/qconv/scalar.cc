#include "kernels/qconv/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qconv_scalar(const QconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                  std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_generic<scalar::Simd, 0, 0, 0, 1>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
