// 8-bit convolution by weights most of which are zero, wherever they are: qconv that multiplies only the others.
//
// The math is qconv.h's, for one group. Any four weights of an output that are not zero are one dot product with 16
// output pixels, if what the pixels see of those four inputs lies interleaved. So, 64 output pixels at a time, each
// input at each tap becomes a plane of 64 bytes, and any four planes are interleaved in registers: eight shuffles for
// the four dot products with 64 pixels, where qconvblock has none and multiplies what is zero in its blocks.
//
// Packed weights: the parts of parts.h are fours of an output's weights that are not zero, with four indices each, of
// planes. The last four of an output may have weights of zero, of any plane of the chunk.

#ifndef SQC_KERNELS_QCONVSPARSE_QCONVSPARSE_H_
#define SQC_KERNELS_QCONVSPARSE_QCONVSPARSE_H_

#include "kernels/qconv/parts.h"

namespace sqc {

struct QconvsparseParams : QconvParts {};  // units of one input

// Output pixels [row_begin, row_end) of panels [panel_begin, panel_end) of 16 outputs. `scratch` is this thread's own.
using QconvsparseFunction = void (*)(const QconvsparseParams& params, std::int64_t row_begin, std::int64_t row_end,
                                     std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch);

#define SQC_QCONVSPARSE_KERNEL(isa, name) \
  void name(const QconvsparseParams&, std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::uint8_t*);
#include "kernels/qconvsparse/kernels.inc"
#undef SQC_QCONVSPARSE_KERNEL

Span<const Kernel<QconvsparseFunction>> qconvsparse_kernels() noexcept;
const Kernel<QconvsparseFunction>& qconvsparse_kernel(Isa isa) noexcept;

// Checks the parameters and runs `kernel` on everything; `scratch` holds pool.threads() times
// qconv_parts_scratch_bytes. The result does not depend on the kernel or the number of threads, bit for bit, and
// equals qconv's with the dense weights.
Status qconvsparse(ThreadPool& pool, const Kernel<QconvsparseFunction>& kernel, const QconvsparseParams& params,
                   std::uint8_t* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QCONVSPARSE_QCONVSPARSE_H_
