#include "kernels/softmax/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void softmax_neon_dotprod(const SoftmaxParams& params, std::int64_t begin, std::int64_t end) {
  softmax_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
