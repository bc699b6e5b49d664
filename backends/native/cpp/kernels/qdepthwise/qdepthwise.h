// 8-bit depthwise convolution: each channel has a kernel of its own.
//
//   sum[m][c] = sum over taps t of x[pixel(m, t)][c] * w[t][c]      in int32, exact
//
// and from there on as qconv.h says. Weights: [taps][channels, in sixteens].

#ifndef SQC_KERNELS_QDEPTHWISE_QDEPTHWISE_H_
#define SQC_KERNELS_QDEPTHWISE_QDEPTHWISE_H_

#include "kernels/qconv/qconv.h"

namespace sqc {

struct QdepthwiseParams {
  Window window;
  std::int64_t channels;
  const std::uint8_t* x;
  std::int64_t x_stride;  // of pixels, in bytes: at least the channels, in sixteens
  std::int32_t x_zero;
  const std::int8_t* weights;
  const std::int32_t* bias;  // [channels, in sixteens]; the zero point's share is taken off
  const float* scale;
  const float* offset;
  QconvOutput y;
};

constexpr std::int64_t kQdepthwiseRows = 32;  // that a kernel looks up pointers for at once
constexpr std::int64_t kQdepthwiseMaxTaps = 1 << 16;

// Output pixels [begin, end). `scratch` is this thread's own.
using QdepthwiseFunction = void (*)(const QdepthwiseParams& params, std::int64_t begin, std::int64_t end,
                                    std::uint8_t* scratch);

#define SQC_QDEPTHWISE_KERNEL(isa, name) void name(const QdepthwiseParams&, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qdepthwise/kernels.inc"
#undef SQC_QDEPTHWISE_KERNEL

Span<const Kernel<QdepthwiseFunction>> qdepthwise_kernels() noexcept;
const Kernel<QdepthwiseFunction>& qdepthwise_kernel(Isa isa) noexcept;

// Bytes of scratch that a thread needs.
std::int64_t qdepthwise_scratch_bytes(const QdepthwiseParams& params) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times
// qdepthwise_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit.
Status qdepthwise(ThreadPool& pool, const Kernel<QdepthwiseFunction>& kernel, const QdepthwiseParams& params,
                  std::uint8_t* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QDEPTHWISE_QDEPTHWISE_H_
