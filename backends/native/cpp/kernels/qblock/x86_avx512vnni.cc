#include "kernels/qblock/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qblock_avx512vnni(const QblockParams& params, QblockPhase phase, std::int64_t begin, std::int64_t end, std::int32_t* sums) {
  qblock_generic<avx512vnni::Simd, 4, 4>(params, phase, begin, end, sums);
}

}  // namespace sqc
