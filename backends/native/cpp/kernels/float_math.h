// exp and what is made of it: the same bits on every instruction set, because each step is one operation of
// kernels/simd. The polynomials are minimax fits, their coefficients rounded one by one with the later ones
// fitted again. tests/activation_test.cc measures the errors stated here against double precision.

#ifndef SQC_KERNELS_FLOAT_MATH_H_
#define SQC_KERNELS_FLOAT_MATH_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {

constexpr float kInfinity = __builtin_inff();

// x = n ln(2) + r with |r| <= ln(2) / 2: returns exp(r), and n as float and as integer bits in `bits`, whose
// low nine bits are n's. Adding 1.5 * 2^23 rounds to an integer in the low bits of the sum.
template <class S>
static SQC_INLINE typename S::F32 exp_reduced(typename S::F32 x, typename S::I32* bits) {
  const auto shifter = S::set_f(0x1.8p23f);
  const auto shifted = S::fma_f(x, S::set_f(0x1.715476p0f), shifter);
  const auto n = S::sub_f(shifted, shifter);
  auto r = S::fma_f(n, S::set_f(-0x1.62e43p-1f), x);
  r = S::fma_f(n, S::set_f(0x1.05c61p-29f), r);
  *bits = S::as_int(shifted);
  auto p = S::set_f(0x1.6a4f7p-10f);
  p = S::fma_f(p, r, S::set_f(0x1.12398p-7f));
  p = S::fma_f(p, r, S::set_f(0x1.5558aep-5f));
  p = S::fma_f(p, r, S::set_f(0x1.555492p-3f));
  p = S::fma_f(p, r, S::set_f(0x1.fffffcp-2f));
  p = S::fma_f(p, r, S::set_f(1.0f));
  return S::fma_f(p, r, S::set_f(1.0f));
}

// exp(x) for any x, subnormal results included: within 1 ulp. A NaN stays.
template <class S>
static SQC_INLINE typename S::F32 exp_f(typename S::F32 x) {
  // Beyond these the result is 0 or infinite anyway; n stays within what two factors can hold.
  x = S::min_f(S::set_f(89.0f), S::max_f(S::set_f(-104.0f), x));
  typename S::I32 bits;
  const auto p = exp_reduced<S>(x, &bits);
  // 2^n in two factors: one would overflow for the largest results and underflow for the subnormal ones.
  const auto n = S::sub_i(bits, S::set_i(0x4b400000));
  const auto half = S::template shift_right<1>(n), rest = S::sub_i(n, half), bias = S::set_i(127);
  const auto first = S::as_float(S::template shift_left<23>(S::add_i(half, bias)));
  const auto second = S::as_float(S::template shift_left<23>(S::add_i(rest, bias)));
  return S::mul_f(S::mul_f(p, first), second);
}

// exp(x) for x <= 0, cheaper: within 1 ulp from -87 on, and 0 below. A NaN stays.
template <class S>
static SQC_INLINE typename S::F32 exp_nonpositive(typename S::F32 x) {
  const auto lowest = S::set_f(-87.0f);
  typename S::I32 bits;
  const auto p = exp_reduced<S>(S::max_f(lowest, x), &bits);
  const auto factor = S::as_float(S::add_i(S::template shift_left<23>(bits), S::set_i(127 << 23)));
  return S::select_less(x, lowest, S::set_f(0.0f), S::mul_f(p, factor));
}

template <class S>
static SQC_INLINE typename S::F32 magnitude(typename S::F32 x) {
  return S::as_float(S::abs_bits(x));
}
template <class S>
static SQC_INLINE typename S::F32 sign_bit(typename S::F32 x) {
  return S::as_float(S::and_i(S::as_int(x), S::set_i(INT32_MIN)));
}
template <class S>
static SQC_INLINE typename S::F32 or_bits(typename S::F32 a, typename S::F32 b) {
  return S::as_float(S::or_i(S::as_int(a), S::as_int(b)));
}
template <class S>
static SQC_INLINE typename S::F32 negative_magnitude(typename S::F32 x) {
  return S::as_float(S::or_i(S::as_int(x), S::set_i(INT32_MIN)));
}

// 1 / (1 + exp(-x)): within 3 ulp, and 0 for x < -87.
template <class S>
static SQC_INLINE typename S::F32 sigmoid_f(typename S::F32 x) {
  const auto one = S::set_f(1.0f);
  const auto e = exp_nonpositive<S>(negative_magnitude<S>(x));
  return S::div_f(S::select_less(x, S::set_f(0.0f), e, one), S::add_f(one, e));
}

// Within 2 ulp: x + x^3 P(x^2) near zero, where 1 - exp(-2|x|) would cancel.
template <class S>
static SQC_INLINE typename S::F32 tanh_f(typename S::F32 x) {
  const auto one = S::set_f(1.0f);
  const auto a = magnitude<S>(x), s = S::mul_f(x, x);
  auto p = S::set_f(-0x1.7574f8p-8f);
  p = S::fma_f(p, s, S::set_f(0x1.520c26p-6f));
  p = S::fma_f(p, s, S::set_f(-0x1.b837ep-5f));
  p = S::fma_f(p, s, S::set_f(0x1.1107p-3f));
  p = S::fma_f(p, s, S::set_f(-0x1.555532p-2f));
  const auto small = S::fma_f(S::mul_f(p, s), x, x);
  const auto e = exp_nonpositive<S>(S::mul_f(a, S::set_f(-2.0f)));
  const auto large = S::div_f(S::sub_f(one, e), S::add_f(one, e));
  return S::select_less(a, S::set_f(0.625f), small, or_bits<S>(large, sign_bit<S>(x)));
}

// The share of a normal distribution below x, (1 + erf(x / sqrt(2))) / 2: within 2e-7, exactly 0 and 1 from 5.5
// on, and within 5 ulp for x > -1. Half plus an odd rational function, which is x P(x^2) / Q(x^2) within 8e-9.
template <class S>
static SQC_INLINE typename S::F32 normal_cdf(typename S::F32 x) {
  const auto half = S::set_f(0.5f), minus_half = S::set_f(-0.5f);
  const auto c = S::min_f(S::set_f(5.5f), S::max_f(S::set_f(-5.5f), x)), s = S::mul_f(c, c);
  auto p = S::set_f(0x1.85c352p-26f), q = S::set_f(0x1.40f84ap-20f);
  p = S::fma_f(p, s, S::set_f(0x1.aa4cd4p-18f));
  q = S::fma_f(q, s, S::set_f(0x1.35831ap-14f));
  p = S::fma_f(p, s, S::set_f(0x1.631e76p-13f));
  q = S::fma_f(q, s, S::set_f(0x1.eec0e8p-10f));
  p = S::fma_f(p, s, S::set_f(0x1.32ba64p-8f));
  q = S::fma_f(q, s, S::set_f(0x1.d5d2d4p-6f));
  p = S::fma_f(p, s, S::set_f(0x1.15c1bep-5f));
  q = S::fma_f(q, s, S::set_f(0x1.01b1ecp-2f));
  p = S::fma_f(p, s, S::set_f(0x1.98845p-2f));
  q = S::fma_f(q, s, S::set_f(1.0f));
  const auto r = S::div_f(S::mul_f(c, p), q);
  return S::add_f(S::min_f(half, S::max_f(minus_half, r)), half);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_FLOAT_MATH_H_
