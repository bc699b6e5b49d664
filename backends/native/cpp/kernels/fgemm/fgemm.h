// Dense product of float activations with float weights, stored as float32 or bfloat16.
//
//   total = 0; for k = 0, 1, ...: total = fma(a[m][k], b[n][k], total)             in float32
//   c[m][n] = clamp(total + bias[n])
//
// Packed weights: panels of 16 outputs, b[n][k] at (n / 16 * k_count + k) * 16 + n % 16, zero outside the
// matrix. A bfloat16 is the upper half of a float32; packing rounds to it, halves to even.

#ifndef SQC_KERNELS_FGEMM_FGEMM_H_
#define SQC_KERNELS_FGEMM_FGEMM_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

enum class FgemmType : std::uint8_t { f32, bf16 };

struct FgemmParams {
  std::int64_t m, n, k;
  const float* a;         // [m][a_stride]
  std::int64_t a_stride;  // floats, >= k
  FgemmType b_type;
  const void* b;       // packed
  const float* bias;   // [ceil(n / 16) * 16]; may be null
  float* c;            // [m][c_stride]; no part of a
  std::int64_t c_stride;
  float low, high;     // c is clamped to them; -inf and inf: not at all. A NaN stays.
};

// Panels [begin, end) of 16 outputs for all rows, of which there is at least one. `scratch` is 64-byte aligned
// and this thread's own; see fgemm_scratch_bytes.
using FgemmFunction = void (*)(const FgemmParams& params, std::int64_t begin, std::int64_t end, float* scratch);

#define SQC_FGEMM_KERNEL(isa, name) void name(const FgemmParams&, std::int64_t, std::int64_t, float*);
#include "kernels/fgemm/kernels.inc"
#undef SQC_FGEMM_KERNEL

Span<const Kernel<FgemmFunction>> fgemm_kernels() noexcept;
const Kernel<FgemmFunction>& fgemm_kernel(Isa isa) noexcept;

// Scratch a thread needs, in bytes: with many rows, a block of bfloat16 weights becomes floats once.
std::int64_t fgemm_scratch_bytes(std::int64_t m, FgemmType b_type) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times
// fgemm_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit, NaNs
// excepted: which bits a NaN has is the instruction set's choice.
Status fgemm(ThreadPool& pool, const Kernel<FgemmFunction>& kernel, const FgemmParams& params, void* scratch) noexcept;

// Bytes of the packed form of an [n][k] matrix.
std::int64_t fgemm_packed_bytes(std::int64_t n, std::int64_t k, FgemmType type) noexcept;

// Packs b, whose element (n, k) lies at n * n_stride + k * k_stride: rows of outputs or of inputs.
Status fgemm_pack(std::int64_t n, std::int64_t k, const float* b, std::int64_t n_stride, std::int64_t k_stride,
                  FgemmType type, void* packed) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_FGEMM_FGEMM_H_
