#include "kernels/fconv/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void fconv_scalar(const FconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                  std::int64_t panel_end, std::uint8_t* scratch) {
  fconv_generic<scalar::Simd, 1, 1>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
