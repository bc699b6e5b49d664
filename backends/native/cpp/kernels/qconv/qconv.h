// 8-bit convolution: unsigned images times signed weights, and what follows it up to the next layer's codes.
//
//   sum[m][n] = sum over taps t and channels c of x[pixel(m, t)][c] * w[n][t][c]      in int32, exact
//   value     = fma(float(sum + bias[n]), scale[n], offset[n])
//
// where a tap outside the image reads the zero point, and bias has the zero point's share taken off:
// bias[n] = own bias - x_zero * sum of w[n]. Then either, for floats,
//
//   y = clamp(value, low, high)
//
// or, for codes, where scale and offset are in steps of y and bounds count from the zero point,
//
//   code = round(clamp(value, low, high))                       to the nearest, halves to even
//   with another image to add:
//   code = round(clamp(fma(float(code), own_scale, float(other - other_zero) * other_scale), sum_low, sum_high))
//   y    = code + zero                                           and then table[y], if there is a table
//
// It is an indirect matrix product: rows are output pixels, and for each tap a row is a pointer to the pixel
// that it sees, so that no patches are copied. kernels/window.h says which pixels those are.
//
// Weights: of each group the matrix [out channels][taps][in channels, in fours], packed as qgemm's; arrays
// by output have ceil(out channels / 16) * 16 entries a group. No sum can overflow: a row of the matrix has at
// most kQgemmMaxK entries.

#ifndef SQC_KERNELS_QCONV_QCONV_H_
#define SQC_KERNELS_QCONV_QCONV_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "kernels/window.h"

namespace sqc {

// From codes of sums to codes of the next layer.
struct QconvOutput {
  std::int64_t stride;     // of pixels, in elements; for codes of one group a multiple of 16, and all are written
  float* values;           // one of these
  std::uint8_t* codes;
  float low, high;
  std::int32_t zero;
  const std::uint8_t* other;  // [pixel][other_stride]; may be null
  std::int64_t other_stride;
  std::int32_t other_zero;
  float own_scale, other_scale, sum_low, sum_high;
  const std::uint8_t* table;  // [256]; may be null
};

struct QconvParams {
  Window window;
  std::int64_t groups, in_channels, out_channels;  // channels of a group; with several, in_channels is in fours
  const std::uint8_t* x;
  std::int64_t x_stride;  // of pixels, in bytes: at least the channels of all groups, in fours
  std::int32_t x_zero;
  const std::int8_t* weights;
  const std::int32_t* sum;   // of each output's weights
  const std::int32_t* bias;
  const float* scale;
  const float* offset;
  QconvOutput y;
};

// Rows that a kernel looks up pointers for at once.
constexpr std::int64_t kQconvRows = 64;

// Output pixels [row_begin, row_end) of panels [panel_begin, panel_end) of 16 outputs, counted through all groups.
// `scratch` is this thread's own: qconv_scratch_bytes, 64-byte aligned.
using QconvFunction = void (*)(const QconvParams& params, std::int64_t row_begin, std::int64_t row_end,
                               std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch);

#define SQC_QCONV_KERNEL(isa, name) \
  void name(const QconvParams&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qconv/kernels.inc"
#undef SQC_QCONV_KERNEL

Span<const Kernel<QconvFunction>> qconv_kernels() noexcept;
const Kernel<QconvFunction>& qconv_kernel(Isa isa) noexcept;

// Bytes of scratch that a thread needs.
std::int64_t qconv_scratch_bytes(const QconvParams& params) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times qconv_scratch_bytes.
// The result does not depend on the kernel or the number of threads, bit for bit.
Status qconv(ThreadPool& pool, const Kernel<QconvFunction>& kernel, const QconvParams& params,
             std::uint8_t* scratch) noexcept;

// What qconv checks, for the family that computes the same from other forms of the weights.
Status check_qconv(const QconvParams& params) noexcept;

// Whether sizes are in the bounds of every convolution here: none negative, and no product of them overflows.
Status check_window(const Window& window) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_QCONV_H_
