#include "kernels/qgemm/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qgemm_neon_dotprod(const QgemmParams& params, std::int64_t begin, std::int64_t end) {
  qgemm_generic<neon_dotprod::Simd, 4, 4, 6, 1>(params, begin, end);
}

}  // namespace sqc
