#include "kernels/kvcache/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void kvcache_scalar(const KvcacheParams& params, std::int64_t begin, std::int64_t end) {
  kvcache_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
