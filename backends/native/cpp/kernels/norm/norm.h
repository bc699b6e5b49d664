// RMSNorm and LayerNorm over rows, after an optional sum with a residual, before an optional quantization.
//
//   h = x + residual                                                        (written to `sum` if asked for)
//   RMSNorm:    y = h * (1 / sqrt(mean(h^2) + epsilon)) * weight (+ bias)
//   LayerNorm:  d = h - mean(h);  y = d * (1 / sqrt(mean(d^2) + epsilon)) * weight + bias
//
// in float32: products from left to right, the last product and the bias as one fma, the reciprocal of the
// square root as two rounded operations, means as `reduce` of kernels/lanes.h adds. An absent weight or
// bias is left out, not replaced by 1 or 0.
//
// With `quantize`, the rows of y become codes as family `quantize` defines, bit for bit what that would give
// on y; y itself then is written only if asked for, so that a row stays in the L1 cache in between.

#ifndef SQC_KERNELS_NORM_NORM_H_
#define SQC_KERNELS_NORM_NORM_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "kernels/quantize/quantize.h"

namespace sqc {

enum class NormKind : std::uint8_t { rms, layer };

struct NormParams {
  NormKind kind;
  std::int64_t m, k;
  const float* x;  // [m][x_stride]
  std::int64_t x_stride;
  const float* residual;  // [m][residual_stride]; null: none
  std::int64_t residual_stride;
  float* sum;  // [m][sum_stride], x + residual, may be x or residual itself; null: not wanted
  std::int64_t sum_stride;
  const float* weight;  // [k]; null: none
  const float* bias;    // [k]; null: none
  float epsilon;
  float* y;  // [m][y_stride], may be x; null: only the codes are wanted
  std::int64_t y_stride;
  const QuantizeParams* quantize;  // of the same m and k, its x is not used; null: no codes
};

// Rows [begin, end). `scratch` holds k floats of this thread's own; it is used only where y is null.
using NormFunction = void (*)(const NormParams& params, std::int64_t begin, std::int64_t end, float* scratch);

#define SQC_NORM_KERNEL(isa, name) void name(const NormParams&, std::int64_t, std::int64_t, float*);
#include "kernels/norm/kernels.inc"
#undef SQC_NORM_KERNEL

Span<const Kernel<NormFunction>> norm_kernels() noexcept;
const Kernel<NormFunction>& norm_kernel(Isa isa) noexcept;

// Floats of scratch that a thread needs.
std::int64_t norm_scratch_count(const NormParams& params) noexcept;

// Checks the parameters and runs `kernel` on all rows; `scratch` holds pool.threads() times
// norm_scratch_count floats. The result does not depend on the kernel or the number of threads, bit for
// bit, NaNs excepted: which bits a NaN has is the instruction set's choice.
Status norm(ThreadPool& pool, const Kernel<NormFunction>& kernel, const NormParams& params, float* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_NORM_NORM_H_
