#include "kernels/kvcache/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void kvcache_avx2(const KvcacheParams& params, std::int64_t begin, std::int64_t end) {
  kvcache_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
