// The algorithm of every qconvsparse kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QCONVSPARSE_GENERIC_H_
#define SQC_KERNELS_QCONVSPARSE_GENERIC_H_

#include "kernels/qconv/pixels.h"
#include "kernels/qconvsparse/qconvsparse.h"

namespace sqc {
namespace {

// Adds the products of one output's weights of a chunk, `count` fours, to its sums, Vectors x 16 pixels.
template <class S, int Vectors>
static SQC_INLINE void add_fours(const std::uint8_t* index, std::int64_t count, const std::int8_t* values,
                                 const std::uint8_t* planes, std::int32_t* sums) {
  typename S::Acc acc[Vectors];
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::zero();
  for (std::int64_t i = 0; i < count; ++i, index += 4, values += 4) {
    const std::uint8_t* const four[4] = {planes + index[0] * kQconvsparsePixels, planes + index[1] * kQconvsparsePixels,
                                         planes + index[2] * kQconvsparsePixels, planes + index[3] * kQconvsparsePixels};
    typename S::RowTile tiles[Vectors];
    S::template join_planes<Vectors>(four, tiles);
    const typename S::Weight4 weight = S::load_weight4(values);
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::dot_row_tile(acc[v], tiles[v], weight);
  }
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) {
    S::store_i(sums + v * 16, S::add_i(S::load_i(sums + v * 16), S::reduce(acc[v])));
  }
}

// Panels [begin, end) for a tile of Vectors x 16 pixels, of which `rows` are there.
template <class S, int Vectors>
static void multiply_planes(const QconvsparseParams& s, const Requantizer<S>& requantizer, std::int64_t begin,
                            std::int64_t end, std::int64_t count, std::int64_t m, std::int64_t rows,
                            const std::uint8_t* planes, std::int32_t* sums) {
  constexpr std::int64_t kPixels = Vectors * 16;
  const std::int64_t outputs = (s.dense.out_channels + 15) / 16 * 16, chunks = (count + s.chunk - 1) / s.chunk;
  for (std::int64_t strip = begin; strip < end; strip += kQconvsparseStripPanels) {
    const std::int64_t strip_end = strip + kQconvsparseStripPanels < end ? strip + kQconvsparseStripPanels : end;
    std::memset(sums, 0, static_cast<std::size_t>((strip_end - strip) * 16 * kPixels) * sizeof *sums);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::uint8_t* here = planes + chunk * s.chunk * kQconvsparsePixels;
      const std::uint64_t* start = s.start + chunk * outputs;
      for (std::int64_t n = strip * 16; n < strip_end * 16; ++n) {
        const auto first = static_cast<std::int64_t>(start[n]), fours = static_cast<std::int64_t>(start[n + 1]) - first;
        if (fours == 0) continue;
        add_fours<S, Vectors>(s.index + first * 4, fours, s.values + first * 4, here, sums + (n - strip * 16) * kPixels);
      }
    }
    finish_strip<S, Vectors>(s.dense, requantizer, strip, strip_end, m, rows, sums);
  }
}

template <class S, int MaxVectors>
static void multiply_pixels(std::int64_t vectors, const QconvsparseParams& s, const Requantizer<S>& requantizer,
                            std::int64_t begin, std::int64_t end, std::int64_t count, std::int64_t m, std::int64_t rows,
                            const std::uint8_t* planes, std::int32_t* sums) {
  if constexpr (MaxVectors > 1) {
    if (vectors < MaxVectors) {
      return multiply_pixels<S, MaxVectors - 1>(vectors, s, requantizer, begin, end, count, m, rows, planes, sums);
    }
  }
  multiply_planes<S, MaxVectors>(s, requantizer, begin, end, count, m, rows, planes, sums);
}

template <class S>
static void qconvsparse_generic(const QconvsparseParams& s, std::int64_t row_begin, std::int64_t row_end,
                                std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch) {
  const QconvParams& p = s.dense;
  const Requantizer<S> requantizer(p.y);
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps(), count = taps * run;
  auto* sums = reinterpret_cast<std::int32_t*>(scratch);
  scratch += kQconvsparseStripPanels * 16 * kQconvsparsePixels * 4;
  std::uint8_t* planes = scratch;
  scratch += count * kQconvsparsePixels;
  std::uint8_t* zeros = scratch;
  std::memset(zeros, p.x_zero, static_cast<std::size_t>(run));
  auto** pointers = reinterpret_cast<const std::uint8_t**>(scratch + (run + 63) / 64 * 64);
  const std::int64_t total = row_end - row_begin, tiles = (total + kQconvsparsePixels - 1) / kQconvsparsePixels;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t m = row_begin + tile * kQconvsparsePixels;
    const std::int64_t rows = row_end - m < kQconvsparsePixels ? row_end - m : kQconvsparsePixels;
    const std::int64_t vectors = (rows + 15) / 16;
    point_at_pixels(p, zeros, m, rows, vectors * 16, pointers);
    // Pixels behind the last vector keep what was there before, which no sum of these sees.
    interleave_pixels<S>(taps, run, vectors * 16, kQconvsparsePixels, pointers, planes);
    for (std::int64_t plane = 0; plane < count; plane += 4) S::split_planes(planes + plane * kQconvsparsePixels);
    multiply_pixels<S, 4>(vectors, s, requantizer, panel_begin, panel_end, count, m, rows, planes, sums);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONVSPARSE_GENERIC_H_
