// 8-bit convolution by weights most of which are zero: qconv that skips blocks of four inputs.
//
// The math is qconv.h's, for one group. A block is one output times four neighbouring input channels at a tap, and
// its product with 16 output pixels is one instruction: the four weights are broadcast, and what the pixels see
// lies interleaved. For that, 64 output pixels at a time (the last: the rest, rounded up to 16), everything that
// they see is brought into the order [tap][four channels][pixel][4]: a unit of 64 x 4 bytes for each four inputs.
//
// Packed weights: the parts of parts.h are the blocks that are not zero, with one index each.

#ifndef SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_
#define SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_

#include "kernels/qconv/parts.h"

namespace sqc {

struct QconvblockParams : QconvParts {};  // units of four inputs

// Output pixels [row_begin, row_end) of panels [panel_begin, panel_end) of 16 outputs. `scratch` is this thread's own.
using QconvblockFunction = void (*)(const QconvblockParams& params, std::int64_t row_begin, std::int64_t row_end,
                                    std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch);

#define SQC_QCONVBLOCK_KERNEL(isa, name) \
  void name(const QconvblockParams&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qconvblock/kernels.inc"
#undef SQC_QCONVBLOCK_KERNEL

Span<const Kernel<QconvblockFunction>> qconvblock_kernels() noexcept;
const Kernel<QconvblockFunction>& qconvblock_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times
// qconv_parts_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit, and equals
// qconv's with the dense weights.
Status qconvblock(ThreadPool& pool, const Kernel<QconvblockFunction>& kernel, const QconvblockParams& params,
                  std::uint8_t* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QCONVBLOCK_QCONVBLOCK_H_
