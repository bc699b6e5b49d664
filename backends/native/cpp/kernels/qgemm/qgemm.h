// Dense 8-bit matrix product: unsigned activations times signed weights.
//
//   sum[m][n] = sum_k a[m][k] * b[n][k]                                  in int32, exact
//   c[m][n]   = clamp(fma(float(sum[m][n] - a_zero[m] * b_sum[n]), a_scale[m] * b_scale[n], bias[n]))
//
// which is the product of the real matrices a_scale * (a - a_zero) and b_scale * b, plus the bias. No sum
// can overflow: |sum| <= 255 * 128 * k, and k is at most kQgemmMaxK.
//
// Packed weights: panels of 16 outputs, each a run of N16K4 tiles (kernels/simd/simd.h) along k:
//   byte ((n / 16 * ceil(k / 4) + k / 4) * 16 + n % 16) * 4 + k % 4 = b[n][k], zero outside the matrix.

#ifndef SQC_KERNELS_QGEMM_QGEMM_H_
#define SQC_KERNELS_QGEMM_QGEMM_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

constexpr std::int64_t kQgemmMaxK = 65536;

struct QgemmParams {
  std::int64_t m, n, k;
  const std::uint8_t* a;       // [m][a_stride]; ceil(k / 4) * 4 bytes of each row are read, the ones
  std::int64_t a_stride;       //   after k times zero
  const float* a_scale;        // [m], or [1] with stride 0
  std::int64_t a_scale_stride;
  const std::int32_t* a_zero;  // [m], or [1] with stride 0
  std::int64_t a_zero_stride;
  const std::int8_t* b;        // packed
  // Per output, with ceil(n / 16) * 16 entries.
  const std::int32_t* b_sum;
  const float* b_scale;
  const float* bias;           // may be null
  float* c;                    // [m][c_stride]
  std::int64_t c_stride;       // floats, >= n
  float low, high;             // c is clamped to them; -inf and inf: not at all. A NaN stays.
};

// Panels [begin, end) of 16 outputs, for all rows, of which there is at least one.
using QgemmFunction = void (*)(const QgemmParams& params, std::int64_t begin, std::int64_t end);

#define SQC_QGEMM_KERNEL(isa, name) void name(const QgemmParams&, std::int64_t, std::int64_t);
#include "kernels/qgemm/kernels.inc"
#undef SQC_QGEMM_KERNEL

Span<const Kernel<QgemmFunction>> qgemm_kernels() noexcept;
const Kernel<QgemmFunction>& qgemm_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on all panels. The result does not depend on the kernel or the
// number of threads, bit for bit.
Status qgemm(ThreadPool& pool, const Kernel<QgemmFunction>& kernel, const QgemmParams& params) noexcept;

// What qgemm checks, for the families that compute the same product from other forms of the weights.
Status qgemm_check_sizes(std::int64_t n, std::int64_t k) noexcept;
Status qgemm_check(const QgemmParams& params) noexcept;

// Bytes of the packed form of an [n][k] matrix.
std::int64_t qgemm_packed_bytes(std::int64_t n, std::int64_t k) noexcept;

// Packs b [n][k] and sums its rows; sum has ceil(n / 16) * 16 entries.
Status qgemm_pack(std::int64_t n, std::int64_t k, const std::int8_t* b, std::int8_t* packed, std::int32_t* sum) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QGEMM_QGEMM_H_
