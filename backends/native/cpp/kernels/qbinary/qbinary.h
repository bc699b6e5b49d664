// Sums and products of two images of codes, as codes of a third scale.
//
//   add: code = round(clamp(fma(float(a - a_zero), a_scale, float(b - b_zero) * b_scale), low, high))
//   mul: code = round(clamp(float((a - a_zero) * (b - b_zero)) * a_scale, low, high))
//   y    = code + zero
//
// Scales are in steps of y, bounds count from its zero point, and halves round to even: what qconv does with another
// image to add. b may have one pixel for `pixels` of a: a factor for each channel of an image.

#ifndef SQC_KERNELS_QBINARY_QBINARY_H_
#define SQC_KERNELS_QBINARY_QBINARY_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

enum class QbinaryOperation : std::uint8_t { add, mul };

struct QbinaryParams {
  QbinaryOperation operation;
  std::int64_t rows, columns;     // pixels, and channels of one with those that fill it up
  std::int64_t rows_for_b;        // rows of a for each row of b, at least 1
  const std::uint8_t* a;          // [rows][columns]
  const std::uint8_t* b;          // [ceil(rows / rows_for_b)][columns]
  std::uint8_t* y;
  std::int32_t a_zero, b_zero, zero;
  float a_scale, b_scale, low, high;
};

// Rows [begin, end).
using QbinaryFunction = void (*)(const QbinaryParams& params, std::int64_t begin, std::int64_t end);

#define SQC_QBINARY_KERNEL(isa, name) void name(const QbinaryParams&, std::int64_t, std::int64_t);
#include "kernels/qbinary/kernels.inc"
#undef SQC_QBINARY_KERNEL

Span<const Kernel<QbinaryFunction>> qbinary_kernels() noexcept;
const Kernel<QbinaryFunction>& qbinary_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on all rows. The result does not depend on the kernel or the number of
// threads, bit for bit.
Status qbinary(ThreadPool& pool, const Kernel<QbinaryFunction>& kernel, const QbinaryParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QBINARY_QBINARY_H_
