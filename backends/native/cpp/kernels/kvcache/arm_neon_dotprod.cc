#include "kernels/kvcache/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void kvcache_neon_dotprod(const KvcacheParams& params, std::int64_t begin, std::int64_t end) {
  kvcache_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
