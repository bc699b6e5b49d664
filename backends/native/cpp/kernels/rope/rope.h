// Rotary position embedding of queries or keys, by half rotation, as Llama and GPT-NeoX define it.
//
//   with r = rotary_dim, i < r / 2, and the table's row of the token's position:
//   y[i]         = x[i] * cos[i] - x[i + r / 2] * sin[i]
//   y[i + r / 2] = x[i + r / 2] * cos[i] + x[i] * sin[i]
//   y[d]         = x[d]                                       for d >= r
//
// in float32, each operation rounded, which are PyTorch's bits of x * cos + rotate_half(x) * sin.

#ifndef SQC_KERNELS_ROPE_ROPE_H_
#define SQC_KERNELS_ROPE_ROPE_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

struct RopeParams {
  std::int64_t batch, tokens, heads, head_dim;
  std::int64_t rotary_dim;  // even, at most head_dim
  // Element (b, h, t, d) lies at b * batch_stride + h * head_stride + t * token_stride + d.
  const float* x;
  std::int64_t x_batch_stride, x_head_stride, x_token_stride;
  float* y;  // may be x, with the same strides
  std::int64_t y_batch_stride, y_head_stride, y_token_stride;
  const float *cos, *sin;      // [positions][table_stride], of which rotary_dim / 2 entries count
  std::int64_t table_stride;   // floats
  std::int64_t table_rows;     // positions in the tables
  // Token t of sequence b is at position[b * position_stride] + t; stride 0 if one serves all sequences.
  const std::int64_t* position;
  std::int64_t position_stride;
};

// Items [begin, end) of batch times tokens, all heads of each.
using RopeFunction = void (*)(const RopeParams& params, std::int64_t begin, std::int64_t end);

#define SQC_ROPE_KERNEL(isa, name) void name(const RopeParams&, std::int64_t, std::int64_t);
#include "kernels/rope/kernels.inc"
#undef SQC_ROPE_KERNEL

Span<const Kernel<RopeFunction>> rope_kernels() noexcept;
const Kernel<RopeFunction>& rope_kernel(Isa isa) noexcept;

// Checks the parameters, that the tables hold every position included, and runs `kernel` on all tokens. The
// result does not depend on the kernel or the number of threads, bit for bit, NaNs excepted: which bits a NaN has
// is the instruction set's choice.
Status rope(ThreadPool& pool, const Kernel<RopeFunction>& kernel, const RopeParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_ROPE_ROPE_H_
