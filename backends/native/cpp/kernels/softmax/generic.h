// The algorithm of every softmax kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_SOFTMAX_GENERIC_H_
#define SQC_KERNELS_SOFTMAX_GENERIC_H_

#include "kernels/float_math.h"
#include "kernels/lanes.h"
#include "kernels/softmax/softmax.h"

namespace sqc {
namespace {

template <class S>
static void softmax_generic(const SoftmaxParams& p, std::int64_t begin, std::int64_t end) {
  const auto scale = S::set_f(p.scale);
  for (std::int64_t m = begin; m < end; ++m) {
    const float* x = p.x + m * p.x_stride;
    const float* mask = p.mask != nullptr ? p.mask + m * p.mask_stride : nullptr;
    float* y = p.y + m * p.y_stride;
    auto largest = S::set_f(-kInfinity);
    for (std::int64_t k = 0; k < p.k; k += 16) {
      const std::int64_t lanes = p.k - k;
      auto v = S::mul_f(load_lanes<S>(x + k, lanes), scale);
      if (mask != nullptr) v = S::add_f(v, load_lanes<S>(mask + k, lanes));
      store_lanes<S>(y + k, lanes, v);
      largest = S::max_f(keep_lanes<S>(v, lanes, -kInfinity), largest);
    }
    const auto shift = S::set_f(S::largest_lane(largest));
    const float sum = reduce<S>(p.k, [&](typename S::F32 a, std::int64_t k, std::int64_t lanes) {
      const auto e = exp_nonpositive<S>(S::sub_f(load_lanes<S>(y + k, lanes), shift));
      store_lanes<S>(y + k, lanes, e);
      return S::add_f(a, keep_lanes<S>(e, lanes));
    });
    const auto divisor = S::set_f(sum);
    for (std::int64_t k = 0; k < p.k; k += 16) {
      store_lanes<S>(y + k, p.k - k, S::div_f(load_lanes<S>(y + k, p.k - k), divisor));
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SOFTMAX_GENERIC_H_
