// Float convolution of images whose channels lie together:
//
//   total = 0; for each tap, for each channel c: total = fma(x[pixel(m, tap)][c], w[n][tap][c], total)
//   y[m][n] = clamp(total + bias[n])
//
// A tap outside the image reads zeros. Rows are output pixels and a tap of a row is a pointer, as in qconv.h. Weights:
// of each group the matrix [out channels][taps][in channels], packed as fgemm's. Of groups with one channel in and
// out, a depthwise convolution, they are [taps][channels] instead, and the same sums are taken channel by channel.

#ifndef SQC_KERNELS_FCONV_FCONV_H_
#define SQC_KERNELS_FCONV_FCONV_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "kernels/window.h"

namespace sqc {

struct FconvParams {
  Window window;
  std::int64_t groups, in_channels, out_channels;  // channels of a group
  bool depthwise;
  const float* x;
  std::int64_t x_stride;  // of pixels, in floats
  const float* weights;
  const float* bias;      // [ceil(out channels / 16) * 16] a group; depthwise [channels]; may be null
  float* y;               // no part of x
  std::int64_t y_stride;
  float low, high;        // y is clamped to them; -inf and inf: not at all. A NaN stays.
};

constexpr std::int64_t kFconvRows = 48;  // that a kernel looks up pointers for at once

// Output pixels [row_begin, row_end) of panels [panel_begin, panel_end) of 16 outputs, counted through all groups.
using FconvFunction = void (*)(const FconvParams& params, std::int64_t row_begin, std::int64_t row_end,
                               std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch);

#define SQC_FCONV_KERNEL(isa, name) \
  void name(const FconvParams&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/fconv/kernels.inc"
#undef SQC_FCONV_KERNEL

Span<const Kernel<FconvFunction>> fconv_kernels() noexcept;
const Kernel<FconvFunction>& fconv_kernel(Isa isa) noexcept;

// Bytes of scratch that a thread needs.
std::int64_t fconv_scratch_bytes(const FconvParams& params) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times fconv_scratch_bytes.
// The result does not depend on the kernel or the number of threads, bit for bit.
Status fconv(ThreadPool& pool, const Kernel<FconvFunction>& kernel, const FconvParams& params,
             std::uint8_t* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_FCONV_FCONV_H_
