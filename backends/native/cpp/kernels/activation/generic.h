// The algorithm of every activation kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_ACTIVATION_GENERIC_H_
#define SQC_KERNELS_ACTIVATION_GENERIC_H_

#include "kernels/activation/activation.h"
#include "kernels/float_math.h"
#include "kernels/lanes.h"
#include "kernels/quantize/generic.h"

namespace sqc {
namespace {

template <class S, Activation F>
static SQC_INLINE typename S::F32 activate(typename S::F32 x) {
  switch (F) {
    case Activation::identity: return x;
    case Activation::relu: return S::max_f(S::set_f(0.0f), x);
    case Activation::sigmoid: return sigmoid_f<S>(x);
    case Activation::silu: return S::mul_f(x, sigmoid_f<S>(x));
    case Activation::gelu: return S::mul_f(x, normal_cdf<S>(x));
    case Activation::gelu_tanh: {
      const auto twice = S::mul_f(x, S::fma_f(S::mul_f(x, x), S::set_f(0.0713548163f), S::set_f(1.59576912f)));
      return S::mul_f(x, sigmoid_f<S>(twice));
    }
    case Activation::tanh: return tanh_f<S>(x);
    case Activation::exp: return exp_f<S>(x);
  }
  return x;
}

template <class S, Activation F, bool HasFactor>
static void activate_row(const float* x, const float* factor, std::int64_t count, float* y) {
  const auto sixteen = [&](std::int64_t k, std::int64_t lanes) {
    auto v = activate<S, F>(load_lanes<S>(x + k, lanes));
    if constexpr (HasFactor) v = S::mul_f(v, load_lanes<S>(factor + k, lanes));
    store_lanes<S>(y + k, lanes, v);
  };
  std::int64_t k = 0;
  for (; k + 16 <= count; k += 16) sixteen(k, 16);
  if (k < count) sixteen(k, count - k);
}

template <class S, Activation F>
static void activate_rows(const ActivationParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  for (std::int64_t m = begin; m < end; ++m) {
    const float* x = p.x + m * p.x_stride;
    float* y = p.y != nullptr ? p.y + m * p.y_stride : scratch;
    if (p.factor != nullptr) {
      activate_row<S, F, true>(x, p.factor + m * p.factor_stride, p.k, y);
    } else {
      activate_row<S, F, false>(x, nullptr, p.k, y);
    }
    if (p.quantize != nullptr) quantize_row<S>(*p.quantize, m, y);
  }
}

template <class S>
static void activation_generic(const ActivationParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  switch (p.function) {
    case Activation::identity: return activate_rows<S, Activation::identity>(p, begin, end, scratch);
    case Activation::relu: return activate_rows<S, Activation::relu>(p, begin, end, scratch);
    case Activation::sigmoid: return activate_rows<S, Activation::sigmoid>(p, begin, end, scratch);
    case Activation::silu: return activate_rows<S, Activation::silu>(p, begin, end, scratch);
    case Activation::gelu: return activate_rows<S, Activation::gelu>(p, begin, end, scratch);
    case Activation::gelu_tanh: return activate_rows<S, Activation::gelu_tanh>(p, begin, end, scratch);
    case Activation::tanh: return activate_rows<S, Activation::tanh>(p, begin, end, scratch);
    case Activation::exp: return activate_rows<S, Activation::exp>(p, begin, end, scratch);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_ACTIVATION_GENERIC_H_
