#include "kernels/qblock/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qblock_avx2(const QblockParams& params, QblockPhase phase, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
  qblock_generic<avx2::Simd, 1, 2>(params, phase, begin, end, sums);
}

}  // namespace sqc
