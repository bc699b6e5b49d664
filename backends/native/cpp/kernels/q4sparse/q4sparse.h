// Sparse 4-bit group-wise matrix product: q4gemm with weights of which only the kept ones are stored.
//
// The math is q4gemm.h's, with 0 for a weight that is not kept; zero points are not supported.
//
// Packed weights: a mask of 64 bits for each N16K4 tile of each panel, [panel][tiles], k rounded up to
// whole groups; and 4-bit codes. The bytes of a group hold two streams of codes: the low nibbles those of
// the first half of its tiles, the high nibbles those of the second half, each in order, the shorter one
// filled up with zeros. So neither has to be taken apart: the bytes are looked up as they are, once shifted
// and once not. At 50 % and groups of 128 the filling takes 1.8 % of the values (two tiles to a byte
// stream, which needs one load less, would take 7 % and measured the same speed).
// Bits a weight at 50 %, groups of 128, half scales: 1 + 2.04 + 0.125 = 3.16.

#ifndef SQC_KERNELS_Q4SPARSE_Q4SPARSE_H_
#define SQC_KERNELS_Q4SPARSE_Q4SPARSE_H_

#include "kernels/q4gemm/q4gemm.h"

namespace sqc {

// How far kernels read behind the last value.
constexpr std::int64_t kQ4sparseValueSlack = 64;

struct Q4sparseParams {
  Q4gemmParams dense;                // everything but b, which is ignored, and b_zero, which is null
  const std::uint64_t* masks;
  const std::uint8_t* values;        // kQ4sparseValueSlack readable bytes follow
  const std::uint64_t* value_start;  // [panels + 1]: where each panel's bytes begin
};

// Panels [begin, end) for all rows, of which there is at least one. `scratch` is this thread's own.
using Q4sparseFunction = void (*)(const Q4sparseParams& params, std::int64_t begin, std::int64_t end,
                                  std::uint8_t* scratch);

#define SQC_Q4SPARSE_KERNEL(isa, name) void name(const Q4sparseParams&, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/q4sparse/kernels.inc"
#undef SQC_Q4SPARSE_KERNEL

Span<const Kernel<Q4sparseFunction>> q4sparse_kernels() noexcept;
const Kernel<Q4sparseFunction>& q4sparse_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on all panels; `scratch` holds pool.threads() times
// q4gemm_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit.
Status q4sparse(ThreadPool& pool, const Kernel<Q4sparseFunction>& kernel, const Q4sparseParams& params,
                std::uint8_t* scratch) noexcept;

std::int64_t q4sparse_mask_count(std::int64_t n, std::int64_t k, std::int64_t group) noexcept;

// Bytes of values that q4sparse_pack writes for this pattern; keep [n][k], 0 or 1.
std::int64_t q4sparse_value_bytes(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* keep) noexcept;

// Packs codes [n][k], each 0..15 where kept.
Status q4sparse_pack(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* codes,
                     const std::uint8_t* keep, std::uint64_t* masks, std::uint8_t* values,
                     std::uint64_t* value_start) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_Q4SPARSE_Q4SPARSE_H_
