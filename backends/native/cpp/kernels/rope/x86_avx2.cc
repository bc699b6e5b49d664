#include "kernels/rope/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void rope_avx2(const RopeParams& params, std::int64_t begin, std::int64_t end) {
  rope_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
