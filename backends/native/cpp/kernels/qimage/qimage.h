// From floats, in planes or pixels, to codes with the channels of a pixel together:
//
//   code = round(clamp(x / scale, low, high)) + zero        to the nearest, halves to even
//
// with a border of the zero point around the image where one is asked for. Bounds count from the zero point.

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
  // y [batch][top + height + bottom][left + width + right][pixel]; bytes behind the channels are the zero point.
  std::uint8_t* y;
  std::int64_t pixel, top, bottom, left, right;
};

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
