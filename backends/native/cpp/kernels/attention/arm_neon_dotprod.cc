#include "kernels/attention/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void attention_neon_dotprod(const AttentionParams& params, const AttentionTile& tile, float* scratch) {
  attention_generic<neon_dotprod::Simd, 6, 1>(params, tile, scratch);
}

}  // namespace sqc
