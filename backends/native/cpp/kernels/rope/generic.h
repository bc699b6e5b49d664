// The algorithm of every rope kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_ROPE_GENERIC_H_
#define SQC_KERNELS_ROPE_GENERIC_H_

#include "kernels/lanes.h"
#include "kernels/rope/rope.h"

namespace sqc {
namespace {

template <class S>
static void rope_head(const float* x, const float* cos, const float* sin, std::int64_t half, std::int64_t head_dim, float* y) {
  for (std::int64_t i = 0; i < half; i += 16) {
    const std::int64_t lanes = half - i;
    const auto a = load_lanes<S>(x + i, lanes), b = load_lanes<S>(x + half + i, lanes);
    const auto c = load_lanes<S>(cos + i, lanes), s = load_lanes<S>(sin + i, lanes);
    store_lanes<S>(y + i, lanes, S::sub_f(S::mul_f(a, c), S::mul_f(b, s)));
    store_lanes<S>(y + half + i, lanes, S::add_f(S::mul_f(b, c), S::mul_f(a, s)));
  }
  if (x == y) return;
  for (std::int64_t d = 2 * half; d < head_dim; d += 16) {
    store_lanes<S>(y + d, head_dim - d, load_lanes<S>(x + d, head_dim - d));
  }
}

template <class S>
static void rope_generic(const RopeParams& p, std::int64_t begin, std::int64_t end) {
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t b = item / p.tokens, t = item % p.tokens;
    const std::int64_t row = (p.position[b * p.position_stride] + t) * p.table_stride;
    const float* x = p.x + b * p.x_batch_stride + t * p.x_token_stride;
    float* y = p.y + b * p.y_batch_stride + t * p.y_token_stride;
    for (std::int64_t h = 0; h < p.heads; ++h) {
      rope_head<S>(x + h * p.x_head_stride, p.cos + row, p.sin + row, p.rotary_dim / 2, p.head_dim, y + h * p.y_head_stride);
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_ROPE_GENERIC_H_
