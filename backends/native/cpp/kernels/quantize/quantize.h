// Rows of floats to rows of 8-bit codes, with the sums over codes that the integer products need.
//
//   code[m][k] = saturate(round_half_to_even(x[m][k] / scale) + zero_point)
//
// in float32, as sqcompile/quantization/affine.py and ONNX QuantizeLinear define it; dynamic scales as
// ONNX DynamicQuantizeLinear with the guards of affine.py: no scale below 2^-63, and 1 for all zeros.
// A division, not a product with the reciprocal: the two round differently.

#ifndef SQC_KERNELS_QUANTIZE_QUANTIZE_H_
#define SQC_KERNELS_QUANTIZE_QUANTIZE_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

enum class QuantizeMode : std::uint8_t {
  static_scale,  // scale[0] and zero_point[0] are given
  symmetric,     // scale = max |x| / 127, zero point 0 (signed codes) or 128 (unsigned codes)
  affine,        // scale = (max - min) / 255, zero included; codes unsigned; one scale a row
};

struct QuantizeParams {
  QuantizeMode mode;
  bool is_signed;           // codes -128..127, else 0..255
  std::int64_t m, k;
  const float* x;           // [m][x_stride]
  std::int64_t x_stride;    // floats, >= k
  std::uint8_t* codes;      // [m][code_stride]; k to k_padded is filled with the zero point
  std::int64_t code_stride; // bytes, >= k_padded
  std::int64_t k_padded;    // >= k
  // k that share a scale (symmetric only) and a sum; 0: the whole row. Both multiples of 16, and
  // scale_group is 0 or equal to sum_group. The last group may be incomplete.
  std::int64_t scale_group, sum_group;
  float* scale;             // read for static_scale ([1]); else written: [m], or [m][groups] with scale_group
  std::int32_t* zero_point; // read for static_scale ([1]), written ([m]) for affine, else may be null
  std::int32_t* sum;        // [m][groups] sums of codes over k < k_padded; may be null
};

// Rows [begin, end). A row (or group) with a NaN or infinity gets the scale NaN, which makes every output
// computed from it NaN; its codes mean nothing, and are the same on every instruction set.
using QuantizeFunction = void (*)(const QuantizeParams& params, std::int64_t begin, std::int64_t end);

#define SQC_QUANTIZE_KERNEL(isa, name) void name(const QuantizeParams&, std::int64_t, std::int64_t);
#include "kernels/quantize/kernels.inc"
#undef SQC_QUANTIZE_KERNEL

Span<const Kernel<QuantizeFunction>> quantize_kernels() noexcept;
const Kernel<QuantizeFunction>& quantize_kernel(Isa isa) noexcept;

// What quantize checks but for x, for the families that quantize the rows they compute.
Status quantize_check(const QuantizeParams& params) noexcept;

// Checks the parameters and runs `kernel` on all rows.
Status quantize(ThreadPool& pool, const Kernel<QuantizeFunction>& kernel, const QuantizeParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QUANTIZE_QUANTIZE_H_
