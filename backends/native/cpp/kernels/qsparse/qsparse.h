// Sparse 8-bit matrix product: qgemm with weights of which only the nonzero ones are stored.
//
// The math is qgemm.h's. Any zero pattern will do; N:M patterns are stored like others, because a mask
// costs as much as the codes of 2:4.
//
// Packed weights: a mask of 64 bits for each N16K4 tile (bit i: byte i of the tile is not zero),
// [panel][ceil(k / 4)]; and the nonzero bytes in the same order. 8 (1 - sparsity) + 1 bits a weight.
//
// A few rows expand tiles in registers and use them at once, so that the time is that of reading the
// packed bytes. Many rows expand a strip of panels to the dense form once: there sparsity gains nothing,
// and costs about as much as three more rows.

#ifndef SQC_KERNELS_QSPARSE_QSPARSE_H_
#define SQC_KERNELS_QSPARSE_QSPARSE_H_

#include "kernels/qgemm/qgemm.h"

namespace sqc {

// How far kernels read behind the last value.
constexpr std::int64_t kQsparseValueSlack = 64;

struct QsparseParams {
  QgemmParams dense;                  // everything but b, which is ignored
  const std::uint64_t* masks;
  const std::uint8_t* values;         // kQsparseValueSlack readable bytes follow
  const std::uint64_t* value_start;   // [panels + 1]: where each panel's values begin
};

// Panels [begin, end) of 16 outputs, for all rows, of which there is at least one. `scratch` is this
// thread's own.
using QsparseFunction = void (*)(const QsparseParams& params, std::int64_t begin, std::int64_t end,
                                 std::uint8_t* scratch);

#define SQC_QSPARSE_KERNEL(isa, name) void name(const QsparseParams&, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qsparse/kernels.inc"
#undef SQC_QSPARSE_KERNEL

Span<const Kernel<QsparseFunction>> qsparse_kernels() noexcept;
const Kernel<QsparseFunction>& qsparse_kernel(Isa isa) noexcept;

// Scratch a thread needs.
std::int64_t qsparse_scratch_bytes(std::int64_t m, std::int64_t k) noexcept;

// Checks the parameters and runs `kernel` on all panels; `scratch` holds pool.threads() times
// qsparse_scratch_bytes. Threads get equal numbers of bytes. The result does not depend on the kernel or
// the number of threads, bit for bit, and equals qgemm's on the dense matrix.
Status qsparse(ThreadPool& pool, const Kernel<QsparseFunction>& kernel, const QsparseParams& params,
               std::uint8_t* scratch) noexcept;

std::int64_t qsparse_mask_count(std::int64_t n, std::int64_t k) noexcept;

// Packs b [n][k]; sum and value_start as above, masks with qsparse_mask_count entries. `values` has room
// for one byte for each nonzero weight.
Status qsparse_pack(std::int64_t n, std::int64_t k, const std::int8_t* b, std::uint64_t* masks, std::uint8_t* values,
                    std::uint64_t* value_start, std::int32_t* sum) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QSPARSE_QSPARSE_H_
