// The algorithm of every norm kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_NORM_GENERIC_H_
#define SQC_KERNELS_NORM_GENERIC_H_

#include "kernels/lanes.h"
#include "kernels/norm/norm.h"
#include "kernels/quantize/generic.h"

namespace sqc {
namespace {

// y = (h - mean) * scale * weight + bias, of which RMSNorm has no mean. Each option is a template argument:
// a test within the loop would cost as much as the arithmetic.
template <class S, bool HasMean, bool HasWeight, bool HasBias>
static void norm_apply(const NormParams& p, const float* h, float mean, float scale, float* y) {
  const auto mean_lanes = S::set_f(mean), scale_lanes = S::set_f(scale);
  const auto sixteen = [&](std::int64_t k, std::int64_t lanes) {
    auto v = load_lanes<S>(h + k, lanes);
    if constexpr (HasMean) v = S::sub_f(v, mean_lanes);
    v = S::mul_f(v, scale_lanes);
    if constexpr (HasWeight && HasBias) {
      v = S::fma_f(v, load_lanes<S>(p.weight + k, lanes), load_lanes<S>(p.bias + k, lanes));
    } else if constexpr (HasWeight) {
      v = S::mul_f(v, load_lanes<S>(p.weight + k, lanes));
    } else if constexpr (HasBias) {
      v = S::add_f(v, load_lanes<S>(p.bias + k, lanes));
    }
    store_lanes<S>(y + k, lanes, v);
  };
  std::int64_t k = 0;
  for (; k + 16 <= p.k; k += 16) sixteen(k, 16);
  if (k < p.k) sixteen(k, p.k - k);
}

template <class S, bool HasMean>
static void norm_apply_any(const NormParams& p, const float* h, float mean, float scale, float* y) {
  if (p.weight != nullptr && p.bias != nullptr) return norm_apply<S, HasMean, true, true>(p, h, mean, scale, y);
  if (p.weight != nullptr) return norm_apply<S, HasMean, true, false>(p, h, mean, scale, y);
  if (p.bias != nullptr) return norm_apply<S, HasMean, false, true>(p, h, mean, scale, y);
  norm_apply<S, HasMean, false, false>(p, h, mean, scale, y);
}

template <class S>
static void norm_add(const float* x, const float* residual, std::int64_t count, float* out) {
  std::int64_t k = 0;
  for (; k + 16 <= count; k += 16) S::store_f(out + k, S::add_f(S::load_f(x + k), S::load_f(residual + k)));
  if (k == count) return;
  const auto sum = S::add_f(load_lanes<S>(x + k, count - k), load_lanes<S>(residual + k, count - k));
  store_lanes<S>(out + k, count - k, sum);
}

template <class S>
static void norm_generic(const NormParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  const float count = static_cast<float>(p.k);
  for (std::int64_t m = begin; m < end; ++m) {
    float* y = p.y != nullptr ? p.y + m * p.y_stride : scratch;
    const float* h = p.x + m * p.x_stride;
    if (p.residual != nullptr) {
      float* sum = p.sum != nullptr ? p.sum + m * p.sum_stride : y;
      norm_add<S>(h, p.residual + m * p.residual_stride, p.k, sum);
      h = sum;
    }
    if (p.kind == NormKind::rms) {
      const float squares = reduce<S>(p.k, [&](typename S::F32 a, std::int64_t k, std::int64_t lanes) {
        const auto v = load_lanes<S>(h + k, lanes);
        return S::fma_f(v, v, a);
      });
      norm_apply_any<S, false>(p, h, 0.0f, 1.0f / __builtin_sqrtf(squares / count + p.epsilon), y);
    } else {
      const float total = reduce<S>(p.k, [&](typename S::F32 a, std::int64_t k, std::int64_t lanes) {
        return S::add_f(a, load_lanes<S>(h + k, lanes));
      });
      const float mean = total / count;
      const auto mean_lanes = S::set_f(mean);
      const float squares = reduce<S>(p.k, [&](typename S::F32 a, std::int64_t k, std::int64_t lanes) {
        const auto d = keep_lanes<S>(S::sub_f(load_lanes<S>(h + k, lanes), mean_lanes), lanes);
        return S::fma_f(d, d, a);
      });
      norm_apply_any<S, true>(p, h, mean, 1.0f / __builtin_sqrtf(squares / count + p.epsilon), y);
    }
    if (p.quantize != nullptr) quantize_row<S>(*p.quantize, m, y);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_NORM_GENERIC_H_
