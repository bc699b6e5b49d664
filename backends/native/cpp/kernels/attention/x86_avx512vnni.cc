#include "kernels/attention/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void attention_avx512vnni(const AttentionParams& params, const AttentionTile& tile, float* scratch) {
  attention_generic<avx512vnni::Simd, 6, 4>(params, tile, scratch);
}

}  // namespace sqc
