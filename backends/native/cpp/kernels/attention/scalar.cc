#include "kernels/attention/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void attention_scalar(const AttentionParams& params, const AttentionTile& tile, float* scratch) {
  attention_generic<scalar::Simd, 6, 1>(params, tile, scratch);
}

}  // namespace sqc
