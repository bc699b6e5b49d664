#include "kernels/kvcache/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void kvcache_avx512vnni(const KvcacheParams& params, std::int64_t begin, std::int64_t end) {
  kvcache_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
