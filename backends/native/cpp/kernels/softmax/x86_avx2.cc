#include "kernels/softmax/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void softmax_avx2(const SoftmaxParams& params, std::int64_t begin, std::int64_t end) {
  softmax_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
