#include "kernels/softmax/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void softmax_avx512vnni(const SoftmaxParams& params, std::int64_t begin, std::int64_t end) {
  softmax_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
