#include "kernels/norm/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void norm_neon_dotprod(const NormParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  norm_generic<neon_dotprod::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
