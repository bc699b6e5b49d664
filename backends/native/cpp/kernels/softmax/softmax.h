// Softmax over the last dimension, row by row, with an optional mask that is added before.
//
//   s = scale * x (+ mask);  y = exp(s - max s) / sum of exp(s - max s)
//
// in float32; exp as exp_nonpositive of kernels/float_math.h, the sum as `reduce` of kernels/lanes.h. A row
// whose every s is -inf has no softmax: it becomes NaN, as with PyTorch's softmax; and so does a row with a NaN
// or +inf.

#ifndef SQC_KERNELS_SOFTMAX_SOFTMAX_H_
#define SQC_KERNELS_SOFTMAX_SOFTMAX_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

struct SoftmaxParams {
  std::int64_t m, k;
  const float* x;  // [m][x_stride]
  std::int64_t x_stride;
  float scale;  // 1 for a plain softmax
  const float* mask;  // [m][mask_stride]; stride 0: one row for all; null: none
  std::int64_t mask_stride;
  float* y;  // [m][y_stride], may be x
  std::int64_t y_stride;
};

// Rows [begin, end).
using SoftmaxFunction = void (*)(const SoftmaxParams& params, std::int64_t begin, std::int64_t end);

#define SQC_SOFTMAX_KERNEL(isa, name) void name(const SoftmaxParams&, std::int64_t, std::int64_t);
#include "kernels/softmax/kernels.inc"
#undef SQC_SOFTMAX_KERNEL

Span<const Kernel<SoftmaxFunction>> softmax_kernels() noexcept;
const Kernel<SoftmaxFunction>& softmax_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on all rows. The result does not depend on the kernel or the number of
// threads, bit for bit, NaNs excepted: which bits a NaN has is the instruction set's choice.
Status softmax(ThreadPool& pool, const Kernel<SoftmaxFunction>& kernel, const SoftmaxParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_SOFTMAX_SOFTMAX_H_
