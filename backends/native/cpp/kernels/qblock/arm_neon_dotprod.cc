#include "kernels/qblock/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qblock_neon_dotprod(const QblockParams& params, QblockPhase phase, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
  qblock_generic<neon_dotprod::Simd, 1, 4>(params, phase, begin, end, sums);
}

}  // namespace sqc
