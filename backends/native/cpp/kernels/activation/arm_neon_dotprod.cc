#include "kernels/activation/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void activation_neon_dotprod(const ActivationParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  activation_generic<neon_dotprod::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
