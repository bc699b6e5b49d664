#include "kernels/rope/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void rope_avx512vnni(const RopeParams& params, std::int64_t begin, std::int64_t end) {
  rope_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
