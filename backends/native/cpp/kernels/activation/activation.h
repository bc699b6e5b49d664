// Activation functions over rows, times a second operand where asked for, before an optional quantization.
//
//   y = f(x) (* factor)                    in float32; f by kernels/float_math.h, whose errors it states
//
//   sigmoid    1 / (1 + exp(-x))           silu       x * sigmoid(x)
//   gelu       x * (1 + erf(x / sqrt(2))) / 2, exact to 2.5e-7 of x
//   gelu_tanh  x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): this is x (1 + tanh(u)) / 2
//
// The gate of a Llama layer is silu with factor: both halves of one product's rows, x at its begin and factor
// behind it, with one stride. With `quantize`, the rows of y become codes as family `quantize` defines, bit
// for bit what that would give on y; y itself then is written only if asked for.

#ifndef SQC_KERNELS_ACTIVATION_ACTIVATION_H_
#define SQC_KERNELS_ACTIVATION_ACTIVATION_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "kernels/quantize/quantize.h"

namespace sqc {

enum class Activation : std::uint8_t { identity, relu, sigmoid, silu, gelu, gelu_tanh, tanh, exp };

struct ActivationParams {
  Activation function;
  std::int64_t m, k;
  const float* x;  // [m][x_stride]
  std::int64_t x_stride;
  const float* factor;  // [m][factor_stride]; null: none
  std::int64_t factor_stride;
  float* y;  // [m][y_stride], may be x or factor; null: only the codes are wanted
  std::int64_t y_stride;
  const QuantizeParams* quantize;  // of the same m and k, its x is not used; null: no codes
};

// Rows [begin, end). `scratch` holds k floats of this thread's own; it is used only where y is null.
using ActivationFunction = void (*)(const ActivationParams& params, std::int64_t begin, std::int64_t end, float* scratch);

#define SQC_ACTIVATION_KERNEL(isa, name) void name(const ActivationParams&, std::int64_t, std::int64_t, float*);
#include "kernels/activation/kernels.inc"
#undef SQC_ACTIVATION_KERNEL

Span<const Kernel<ActivationFunction>> activation_kernels() noexcept;
const Kernel<ActivationFunction>& activation_kernel(Isa isa) noexcept;

// Floats of scratch that a thread needs.
std::int64_t activation_scratch_count(const ActivationParams& params) noexcept;

// Checks the parameters and runs `kernel` on all rows; `scratch` holds pool.threads() times
// activation_scratch_count floats. The result does not depend on the kernel or the number of threads, bit for
// bit, NaNs excepted: which bits a NaN has is the instruction set's choice.
Status activation(ThreadPool& pool, const Kernel<ActivationFunction>& kernel, const ActivationParams& params,
                  float* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_ACTIVATION_ACTIVATION_H_
