#include "kernels/activation/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void activation_avx512vnni(const ActivationParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  activation_generic<avx512vnni::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
