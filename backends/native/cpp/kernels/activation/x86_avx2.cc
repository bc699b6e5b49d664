#include "kernels/activation/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void activation_avx2(const ActivationParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  activation_generic<avx2::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
