// 8-bit convolution by weights most of which are zero: qconv that skips blocks of four inputs.
//
// The math is qconv.h's, for one group. A block is one output times four neighbouring input channels at a tap, and
// its product with 16 output pixels is one instruction: the four weights are broadcast, and what the pixels see
// lies interleaved. For that, 64 output pixels at a time (the last: the rest, rounded up to 16), everything that
// they see is brought into the order [tap][four channels][pixel][4]: a unit of 64 x 4 bytes for each four inputs.
//
// Packed weights: units are cut into chunks, so that a chunk of activations stays in the L1 cache. For each chunk, for
// each output, the blocks that are not zero: which unit of the chunk (one byte), and the four weights.

#ifndef SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_
#define SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_

#include "kernels/qconv/qconv.h"

namespace sqc {

constexpr std::int64_t kQconvblockPixels = 64;        // that are interleaved at once
constexpr std::int64_t kQconvblockStripPanels = 16;   // whose sums are kept: 64 KiB
constexpr std::int64_t kQconvblockMaxChunk = 256;

struct QconvblockParams {
  QconvParams dense;  // everything but weights, which are ignored; one group
  std::int64_t chunk; // units of four inputs, 1 to 256
  const std::uint8_t* index;
  const std::int8_t* values;
  const std::uint64_t* start;  // [chunks][outputs in sixteens], and the number of blocks
};

// Output pixels [row_begin, row_end) of panels [panel_begin, panel_end) of 16 outputs. `scratch` is this thread's own.
using QconvblockFunction = void (*)(const QconvblockParams& params, std::int64_t row_begin, std::int64_t row_end,
                                    std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch);

#define SQC_QCONVBLOCK_KERNEL(isa, name) \
  void name(const QconvblockParams&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qconvblock/kernels.inc"
#undef SQC_QCONVBLOCK_KERNEL

Span<const Kernel<QconvblockFunction>> qconvblock_kernels() noexcept;
const Kernel<QconvblockFunction>& qconvblock_kernel(Isa isa) noexcept;

// Bytes of scratch that a thread needs.
std::int64_t qconvblock_scratch_bytes(const QconvParams& dense) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times
// qconvblock_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit, and equals
// qconv's with the dense weights.
Status qconvblock(ThreadPool& pool, const Kernel<QconvblockFunction>& kernel, const QconvblockParams& params,
                  std::uint8_t* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_
