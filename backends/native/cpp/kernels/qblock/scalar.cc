#include "kernels/qblock/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qblock_scalar(const QblockParams& params, QblockPhase phase, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
  qblock_generic<scalar::Simd, 1, 1>(params, phase, begin, end, sums);
}

}  // namespace sqc
