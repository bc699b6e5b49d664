#include "kernels/softmax/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void softmax_scalar(const SoftmaxParams& params, std::int64_t begin, std::int64_t end) {
  softmax_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
