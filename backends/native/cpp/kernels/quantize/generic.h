// The algorithm of every quantize kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QUANTIZE_GENERIC_H_
#define SQC_KERNELS_QUANTIZE_GENERIC_H_

#include "kernels/quantize/quantize.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {

// x[k .. k + 16), zeros from `end` on.
template <class S>
static SQC_INLINE typename S::F32 load_to(const float* x, std::int64_t k, std::int64_t end) {
  if (k + 16 <= end) return S::load_f(x + k);
  float lanes[16] = {};
  for (std::int64_t i = k; i < end; ++i) lanes[i - k] = x[i];
  return S::load_f(lanes);
}

constexpr float kSmallestScale = 0x1p-63f;

// The symmetric scale of x[begin, end).
template <class S>
static float symmetric_scale(const float* x, std::int64_t begin, std::int64_t end) {
  typename S::I32 magnitude = S::set_i(0);
  for (std::int64_t k = begin; k < end; k += 16) {
    magnitude = S::max_i(magnitude, S::abs_bits(load_to<S>(x, k, end)));
  }
  std::int32_t lanes[16], largest = 0;
  S::store_i(lanes, magnitude);
  for (int i = 0; i < 16; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
  if (largest >= 0x7f800000) return __builtin_nanf("");
  if (largest == 0) return 1.0f;
  float span;
  std::memcpy(&span, &largest, sizeof span);
  const float scale = span / 127.0f;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

// The affine scale and zero point of x[0, k).
template <class S>
static float affine_scale(const float* x, std::int64_t k_end, std::int32_t* zero_point) {
  typename S::F32 low = S::set_f(0.0f), high = low;
  typename S::I32 magnitude = S::set_i(0);  // finds what is not finite: min and max pass over a NaN
  for (std::int64_t k = 0; k < k_end; k += 16) {
    const typename S::F32 v = load_to<S>(x, k, k_end);
    low = S::min_f(v, low);
    high = S::max_f(v, high);
    magnitude = S::max_i(magnitude, S::abs_bits(v));
  }
  float lows[16], highs[16];
  std::int32_t magnitudes[16];
  S::store_f(lows, low);
  S::store_f(highs, high);
  S::store_i(magnitudes, magnitude);
  float lowest = 0.0f, highest = 0.0f;
  std::int32_t largest = 0;
  for (int i = 0; i < 16; ++i) {
    lowest = lows[i] < lowest ? lows[i] : lowest;
    highest = highs[i] > highest ? highs[i] : highest;
    largest = magnitudes[i] > largest ? magnitudes[i] : largest;
  }
  *zero_point = 0;
  if (largest >= 0x7f800000) return __builtin_nanf("");
  float span = highest - lowest;
  if (span == 0.0f) return 1.0f;
  span = span < __FLT_MAX__ ? span : __FLT_MAX__;  // finite bounds may lie further apart than that
  float scale = span / 255.0f;
  scale = scale > kSmallestScale ? scale : kSmallestScale;
  float zero = -lowest / scale;
  zero = zero < 255.0f ? zero : 255.0f;
  *zero_point = static_cast<std::int32_t>(__builtin_nearbyintf(zero));
  return scale;
}

// Codes of x[begin, end) and, up to `padded_end`, of zeros; returns the sum of all of them.
template <class S>
static std::int32_t convert(const QuantizeParams& p, const float* x, std::uint8_t* codes, std::int64_t begin,
                            std::int64_t end, std::int64_t padded_end, float scale, std::int32_t zero_point) {
  const std::int32_t lowest = p.is_signed ? -128 : 0, highest = p.is_signed ? 127 : 255;
  const auto divisor = S::set_f(scale);
  // Clamped before rounding, which is the same because the bounds are integers, and keeps the lanes
  // within int32. A NaN becomes the lowest code.
  const auto low = S::set_f(static_cast<float>(lowest - zero_point));
  const auto high = S::set_f(static_cast<float>(highest - zero_point));
  const auto zero = S::set_i(zero_point);
  typename S::I32 total = S::set_i(0);
  std::int64_t k = begin;
  for (; k + 16 <= end; k += 16) {
    const auto scaled = S::div_f(S::load_f(x + k), divisor);
    const auto code = S::add_i(S::round_i(S::min_f(S::max_f(scaled, low), high)), zero);
    S::store_bytes(codes + k, code);
    total = S::add_i(total, code);
  }
  std::int32_t lanes[16], sum = 0;
  S::store_i(lanes, total);
  for (int i = 0; i < 16; ++i) sum += lanes[i];
  if (k < padded_end) {
    std::int32_t tail[16];
    const auto scaled = S::div_f(load_to<S>(x, k, end), divisor);
    S::store_i(tail, S::add_i(S::round_i(S::min_f(S::max_f(scaled, low), high)), zero));
    for (int i = 0; k < end; ++k, ++i) {
      codes[k] = static_cast<std::uint8_t>(tail[i]);
      sum += tail[i];
    }
    for (; k < padded_end; ++k) {
      codes[k] = static_cast<std::uint8_t>(zero_point);
      sum += zero_point;
    }
  }
  return sum;
}

// How many groups a row's sums have.
static SQC_INLINE std::int64_t quantize_groups(const QuantizeParams& p) {
  return p.sum_group != 0 ? (p.k + p.sum_group - 1) / p.sum_group : 1;
}

// Row m of everything that is written, from `x` [k], wherever that lies.
template <class S>
static void quantize_row(const QuantizeParams& p, std::int64_t m, const float* x) {
  const std::int64_t step = p.sum_group != 0 ? p.sum_group : (p.k_padded != 0 ? p.k_padded : 1);
  const std::int64_t groups = quantize_groups(p);
  std::uint8_t* codes = p.codes + m * p.code_stride;
  float scale = 1.0f;
  std::int32_t zero_point = p.is_signed ? 0 : 128;
  if (p.mode == QuantizeMode::static_scale) {
    scale = p.scale[0];
    zero_point = p.zero_point[0];
  } else if (p.mode == QuantizeMode::affine) {
    scale = affine_scale<S>(x, p.k, &zero_point);
    p.scale[m] = scale;
    p.zero_point[m] = zero_point;
  } else if (p.scale_group == 0) {
    scale = symmetric_scale<S>(x, 0, p.k);
    p.scale[m] = scale;
  }
  if (groups == 0) convert<S>(p, x, codes, 0, 0, p.k_padded, scale, zero_point);  // only padding
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t begin = g * step, last = begin + step;
    const std::int64_t end = last < p.k ? last : p.k;
    // What follows the last group's end up to k_padded is padding, and that group's.
    const std::int64_t padded_end = g + 1 < groups ? last : p.k_padded;
    if (p.scale_group != 0) {
      scale = symmetric_scale<S>(x, begin, end);
      p.scale[m * groups + g] = scale;
    }
    const std::int32_t sum = convert<S>(p, x, codes, begin, end, padded_end, scale, zero_point);
    if (p.sum != nullptr) p.sum[m * groups + g] = sum;
  }
}

template <class S>
static void quantize_generic(const QuantizeParams& p, std::int64_t row_begin, std::int64_t row_end) {
  for (std::int64_t m = row_begin; m < row_end; ++m) quantize_row<S>(p, m, p.x + m * p.x_stride);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QUANTIZE_GENERIC_H_
