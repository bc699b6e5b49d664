// From floats, in planes or pixels, to codes with the channels of a pixel together:
//
//   code = round(clamp(x / scale, low, high)) + zero        to the nearest, halves to even
//
// with a border of the zero point around the image where one is asked for. Bounds count from the zero point. A pixel of
// y may hold several columns of the image beside each other, those that a row of a convolution's kernel sees: then a
// kernel is one column wide, and an image of few channels has fewer bytes that say nothing.

#ifndef SQC_KERNELS_QIMAGE_QIMAGE_H_
#define SQC_KERNELS_QIMAGE_QIMAGE_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

struct QimageParams {
  std::int64_t batch, channels, height, width;
  const float* x;  // strides in floats
  std::int64_t batch_stride, channel_stride, row_stride, column_stride;
  float scale, low, high;
  std::int32_t zero;
  // y [batch][top + height + bottom][columns()][pixel]; bytes behind the channels are the zero point.
  std::uint8_t* y;
  std::int64_t pixel, top, bottom, left, right;
  // Columns of the bordered image in a pixel, [columns of the pixel][channels], and from one pixel's first to the next's.
  std::int64_t taps, step;

  std::int64_t columns() const { return left + width + right < taps ? 0 : (left + width + right - taps) / step + 1; }
};

constexpr std::int64_t kQimageTapBytes = 64;  // the most in a pixel of several columns
constexpr std::int64_t kQimageMaxStep = 16;

// Rows [begin, end) of y, counted through the batch.
using QimageFunction = void (*)(const QimageParams& params, std::int64_t begin, std::int64_t end);

#define SQC_QIMAGE_KERNEL(isa, name) void name(const QimageParams&, std::int64_t, std::int64_t);
#include "kernels/qimage/kernels.inc"
#undef SQC_QIMAGE_KERNEL

Span<const Kernel<QimageFunction>> qimage_kernels() noexcept;
const Kernel<QimageFunction>& qimage_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on all rows. The result does not depend on the kernel or the number of
// threads, bit for bit.
Status qimage(ThreadPool& pool, const Kernel<QimageFunction>& kernel, const QimageParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QIMAGE_QIMAGE_H_
