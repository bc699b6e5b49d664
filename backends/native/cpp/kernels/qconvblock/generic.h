// The algorithm of every qconvblock kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QCONVBLOCK_GENERIC_H_
#define SQC_KERNELS_QCONVBLOCK_GENERIC_H_

#include "kernels/qconv/parts_generic.h"
#include "kernels/qconvblock/qconvblock.h"

namespace sqc {
namespace {

template <class S>
struct QconvBlocks {
  static constexpr std::int64_t kIndices = 1;

  static SQC_INLINE std::int64_t unit_bytes(std::int64_t vectors) { return vectors * 64; }

  static SQC_INLINE void arrange(std::int64_t taps, std::int64_t run, std::int64_t vectors,
                                 const std::uint8_t* const* pointers, std::uint8_t* to) {
    interleave_pixels<S>(taps, run, vectors * 16, vectors * 16, pointers, to);
  }

  template <int Vectors>
  static SQC_INLINE void add(const std::uint8_t* index, const std::int8_t* values, const std::uint8_t* units,
                             typename S::Acc* acc) {
    const std::uint8_t* a = units + index[0] * unit_bytes(Vectors);
    const typename S::Weight4 weight = S::load_weight4(values);
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::dot_row_tile(acc[v], S::load_row_tile(a + v * 64), weight);
  }
};

template <class S>
static void qconvblock_generic(const QconvblockParams& s, std::int64_t row_begin, std::int64_t row_end,
                               std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_parts<S, QconvBlocks<S>>(s, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONVBLOCK_GENERIC_H_
