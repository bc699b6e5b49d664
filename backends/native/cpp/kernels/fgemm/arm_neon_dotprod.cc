#include "kernels/fgemm/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void fgemm_neon_dotprod(const FgemmParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  fgemm_generic<neon_dotprod::Simd, 6, 1>(params, begin, end, scratch);
}

}  // namespace sqc
