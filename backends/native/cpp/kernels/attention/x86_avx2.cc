#include "kernels/attention/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void attention_avx2(const AttentionParams& params, const AttentionTile& tile, float* scratch) {
  attention_generic<avx2::Simd, 6, 1>(params, tile, scratch);
}

}  // namespace sqc
