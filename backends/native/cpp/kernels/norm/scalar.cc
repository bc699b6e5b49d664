#include "kernels/norm/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void norm_scalar(const NormParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  norm_generic<scalar::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
