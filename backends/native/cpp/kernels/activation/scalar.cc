#include "kernels/activation/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void activation_scalar(const ActivationParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  activation_generic<scalar::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
