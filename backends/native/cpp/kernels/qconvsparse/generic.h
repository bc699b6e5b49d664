// The algorithm of every qconvsparse kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QCONVSPARSE_GENERIC_H_
#define SQC_KERNELS_QCONVSPARSE_GENERIC_H_

#include "kernels/qconv/parts_generic.h"
#include "kernels/qconvsparse/qconvsparse.h"

namespace sqc {
namespace {

template <class S>
struct QconvPlanes {
  static constexpr std::int64_t kIndices = 4;

  static SQC_INLINE std::int64_t unit_bytes(std::int64_t) { return kQconvPartPixels; }

  static SQC_INLINE void arrange(std::int64_t taps, std::int64_t run, std::int64_t vectors,
                                 const std::uint8_t* const* pointers, std::uint8_t* to) {
    // Pixels behind the last vector keep what was there before, which no sum of these sees.
    interleave_pixels<S>(taps, run, vectors * 16, kQconvPartPixels, pointers, to);
    for (std::int64_t plane = 0; plane < taps * run; plane += 4) S::split_planes(to + plane * kQconvPartPixels);
  }

  template <int Vectors>
  static SQC_INLINE void add(const std::uint8_t* index, const std::int8_t* values, const std::uint8_t* units,
                             typename S::Acc* acc) {
    const std::uint8_t* const four[4] = {units + index[0] * kQconvPartPixels, units + index[1] * kQconvPartPixels,
                                         units + index[2] * kQconvPartPixels, units + index[3] * kQconvPartPixels};
    typename S::RowTile tiles[Vectors];
    S::template join_planes<Vectors>(four, tiles);
    const typename S::Weight4 weight = S::load_weight4(values);
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::dot_row_tile(acc[v], tiles[v], weight);
  }
};

template <class S>
static void qconvsparse_generic(const QconvsparseParams& s, std::int64_t row_begin, std::int64_t row_end,
                                std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_parts<S, QconvPlanes<S>>(s, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONVSPARSE_GENERIC_H_
