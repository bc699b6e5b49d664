// Block-sparse 8-bit matrix product for many rows: qgemm that skips the blocks of weights that are zero.
//
// The math is qgemm.h's. A block is R outputs times 4 consecutive k, R = 1, 4 or 16, and its product is one
// instruction for R outputs and 16 rows of a: the 4 k of an output are broadcast, and the activations lie
// interleaved, so that nothing is gathered or shuffled. The time is proportional to the blocks kept; below
// about 5 rows the lanes are mostly idle, and qsparse is the better form.
//
// Activations are interleaved first: tiles of 64 rows (the last one: the rest, rounded up to 16), and in
// each [ceil(k / 4)][rows of the tile][4].
//
// Packed weights: k is cut into chunks of `chunk` times 4, so that the chunk of an activation tile stays in
// the L1 cache. For each chunk, for each row of blocks (R outputs), the blocks that are not zero: where
// (one byte, counted within the chunk) and what (R * 4 bytes, output by output).

#ifndef SQC_KERNELS_QBLOCK_QBLOCK_H_
#define SQC_KERNELS_QBLOCK_QBLOCK_H_

#include "kernels/qgemm/qgemm.h"

namespace sqc {

constexpr std::int64_t kQblockTileRows = 64;
constexpr std::int64_t kQblockStripPanels = 16;  // 64 KiB of sums

struct QblockParams {
  QgemmParams dense;                  // everything but b, which is ignored
  std::int64_t block_outputs;         // R
  std::int64_t chunk;                 // 1 to 256, in units of 4 k
  const std::uint8_t* index;
  const std::int8_t* values;
  const std::uint64_t* start;         // [chunks][ceil(n / 16) * 16 / R], and the number of blocks
  const std::uint64_t* blocks_before; // [panels + 1]: blocks of all panels before, for the split by cost
  std::uint8_t* interleaved;          // qblock_interleaved_bytes(m, k)
};

enum class QblockPhase : std::uint8_t {
  interleave,  // [begin, end) counts tiles of rows
  multiply,    // [begin, end) counts panels of 16 outputs, tile after tile; `sums` is this thread's own
};

using QblockFunction = void (*)(const QblockParams& params, QblockPhase phase, std::int64_t begin, std::int64_t end,
                                std::int32_t* sums);

#define SQC_QBLOCK_KERNEL(isa, name) void name(const QblockParams&, QblockPhase, std::int64_t, std::int64_t, std::int32_t*);
#include "kernels/qblock/kernels.inc"
#undef SQC_QBLOCK_KERNEL

Span<const Kernel<QblockFunction>> qblock_kernels() noexcept;
const Kernel<QblockFunction>& qblock_kernel(Isa isa) noexcept;

std::int64_t qblock_interleaved_bytes(std::int64_t m, std::int64_t k) noexcept;

// int32 sums that a thread needs.
constexpr std::int64_t kQblockSumCount = kQblockStripPanels * 16 * kQblockTileRows;

// Checks the parameters and runs both phases; `sums` has pool.threads() times
// kQblockSumCount entries. The result does not
// depend on the kernel or the number of threads, bit for bit, and equals qgemm's on the dense matrix.
Status qblock(ThreadPool& pool, const Kernel<QblockFunction>& kernel, const QblockParams& params,
              std::int32_t* sums) noexcept;

std::int64_t qblock_start_count(std::int64_t n, std::int64_t k, std::int64_t block_outputs, std::int64_t chunk) noexcept;

// Blocks of b [n][k] that are not zero.
std::int64_t qblock_count(std::int64_t n, std::int64_t k, std::int64_t block_outputs, const std::int8_t* b) noexcept;

// Packs b; sum as qgemm_pack gives it.
Status qblock_pack(std::int64_t n, std::int64_t k, std::int64_t block_outputs, std::int64_t chunk, const std::int8_t* b,
                   std::uint8_t* index, std::int8_t* values, std::uint64_t* start, std::uint64_t* blocks_before,
                   std::int32_t* sum) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QBLOCK_QBLOCK_H_
