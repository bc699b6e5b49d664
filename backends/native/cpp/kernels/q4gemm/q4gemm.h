// 4-, 3- and 2-bit group-wise matrix product: signed 8-bit activations times codes that index a table of 16, 8 or
// 4 values; and times 8-bit weights, which are their own values.
//
//   sum[m][n][g] = sum over k in group g of a[m][k] * (table[b[n][k]] - b_zero[n][g])    in int32, exact
//   total[m][n]  = for g = 0, 1, ...: total = fma(float(sum[m][n][g]), scale[m][n][g], total)
//   c[m][n]      = clamp(fma(total, row_scale[m], bias[n]))
//
// With one activation scale a row, scale = b_scale[n][g] and row_scale = a_scale[m]; with one a group,
// scale = b_scale[n][g] * a_scale[m][g] and row_scale = 1.
//
// The table makes linear, NF4 and fitted codebooks the same thing at the same speed: entries are int8, as
// fine as the activations are, and the scale maps the largest entry to 127. `b_zero` is for formats with
// a zero point a group; it is in table units.
//
// Packed weights: for each panel of 16 outputs, for each group (k rounded up to whole groups; codes there
// are 0, activations must be), runs of N16K4 tiles, the codes of a tile in one place of 64 bytes:
//   4 bits: 64 bytes for 8 k; the low nibbles are a tile, the high nibbles the next one.
//   2 bits: 64 bytes for 16 k; bits 2 t and 2 t + 1 are tile t of four.
//   3 bits: 192 bytes for 32 k; the lower two bits of tiles 0 to 3, of tiles 4 to 7, and the upper bits: bit t
//     is tile t of eight.
//   8 bits: 64 bytes for 4 k, a tile as it is; weights -127 to 127.
// Scales and zero points: [panel][group][16].

#ifndef SQC_KERNELS_Q4GEMM_Q4GEMM_H_
#define SQC_KERNELS_Q4GEMM_Q4GEMM_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

constexpr std::int64_t kQ4gemmMaxK = 65536;

struct Q4gemmParams {
  std::int64_t m, n, k;
  std::int64_t group;          // 32, 64 or 128
  const std::int8_t* a;        // [m][a_stride]; zeros from k to the end of the last group
  std::int64_t a_stride;
  const std::int32_t* a_sum;   // [m][groups] sums of a over each group
  const float* a_scale;        // [m], or [m][groups]
  bool a_scale_per_group;
  const std::uint8_t* b;       // packed codes
  std::int8_t table[16];       // -127..127
  const void* b_scale;         // packed
  bool b_scale_is_half;        // else float
  const std::int8_t* b_zero;   // packed; null: none
  const float* bias;           // [ceil(n / 16) * 16]; may be null
  float* c;                    // [m][c_stride]
  std::int64_t c_stride;
  float low, high;             // as in qgemm.h
  int bits = 4;                // of a code: 2, 3, 4 or 8; as many entries of the table count as codes have values
};

// Panels [begin, end) for all rows, of which there is at least one. `scratch` is 64-byte aligned and this thread's own; see
// q4gemm_scratch_bytes.
using Q4gemmFunction = void (*)(const Q4gemmParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch);

#define SQC_Q4GEMM_KERNEL(isa, name) void name(const Q4gemmParams&, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/q4gemm/kernels.inc"
#undef SQC_Q4GEMM_KERNEL

Span<const Kernel<Q4gemmFunction>> q4gemm_kernels() noexcept;
const Kernel<Q4gemmFunction>& q4gemm_kernel(Isa isa) noexcept;

// Scratch a thread needs: with many rows, a strip of weights is expanded to bytes once, then used by all.
std::int64_t q4gemm_scratch_bytes(std::int64_t m, std::int64_t k, std::int64_t group) noexcept;

// Checks the parameters and runs `kernel` on all panels; `scratch` holds pool.threads() times
// q4gemm_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit.
Status q4gemm(ThreadPool& pool, const Kernel<Q4gemmFunction>& kernel, const Q4gemmParams& params,
              std::uint8_t* scratch) noexcept;

// What q4gemm checks, for the family that computes the same product from another form of the weights.
Status q4gemm_check_sizes(std::int64_t n, std::int64_t k, std::int64_t group) noexcept;
Status q4gemm_check(const Q4gemmParams& params) noexcept;

// Bytes of the packed codes of an [n][k] matrix.
std::int64_t q4gemm_packed_bytes(std::int64_t n, std::int64_t k, std::int64_t group, int bits = 4) noexcept;

// Packs codes [n][k], each of so many bits (higher ones are an error, and so is -128 as an 8-bit weight).
Status q4gemm_pack(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* codes, std::uint8_t* packed,
                   int bits = 4) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_Q4GEMM_Q4GEMM_H_
