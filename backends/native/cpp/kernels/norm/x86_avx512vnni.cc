#include "kernels/norm/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void norm_avx512vnni(const NormParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  norm_generic<avx512vnni::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
