// The algorithm of every qconvblock kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QCONVBLOCK_GENERIC_H_
#define SQC_KERNELS_QCONVBLOCK_GENERIC_H_

#include "kernels/qconv/pixels.h"
#include "kernels/qconvblock/qconvblock.h"

namespace sqc {
namespace {

// Adds the products of one output's blocks of a chunk to its sums, Vectors x 16 pixels. A unit has `unit_bytes`.
template <class S, int Vectors>
static SQC_INLINE void add_blocks(const std::uint8_t* index, std::int64_t count, const std::int8_t* values,
                                  const std::uint8_t* act, std::int64_t unit_bytes, std::int32_t* sums) {
  typename S::Acc acc[Vectors];
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::zero();
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint8_t* a = act + index[i] * unit_bytes;
    const typename S::Weight4 weight = S::load_weight4(values + i * 4);
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::dot_row_tile(acc[v], S::load_row_tile(a + v * 64), weight);
  }
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) {
    S::store_i(sums + v * 16, S::add_i(S::load_i(sums + v * 16), S::reduce(acc[v])));
  }
}

// Panels [begin, end) for a tile of Vectors x 16 pixels, of which `rows` are there.
template <class S, int Vectors>
static void multiply_tile(const QconvblockParams& s, const Requantizer<S>& requantizer, std::int64_t begin, std::int64_t end,
                          std::int64_t units, std::int64_t m, std::int64_t rows, const std::uint8_t* act, std::int32_t* sums) {
  constexpr std::int64_t kPixels = Vectors * 16;
  const std::int64_t outputs = (s.dense.out_channels + 15) / 16 * 16, chunks = (units + s.chunk - 1) / s.chunk;
  for (std::int64_t strip = begin; strip < end; strip += kQconvblockStripPanels) {
    const std::int64_t strip_end = strip + kQconvblockStripPanels < end ? strip + kQconvblockStripPanels : end;
    std::memset(sums, 0, static_cast<std::size_t>((strip_end - strip) * 16 * kPixels) * sizeof *sums);
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::uint8_t* here = act + chunk * s.chunk * kPixels * 4;
      const std::uint64_t* start = s.start + chunk * outputs;
      for (std::int64_t n = strip * 16; n < strip_end * 16; ++n) {
        const auto first = static_cast<std::int64_t>(start[n]), count = static_cast<std::int64_t>(start[n + 1]) - first;
        if (count == 0) continue;
        add_blocks<S, Vectors>(s.index + first, count, s.values + first * 4, here, kPixels * 4, sums + (n - strip * 16) * kPixels);
      }
    }
    finish_strip<S, Vectors>(s.dense, requantizer, strip, strip_end, m, rows, sums);
  }
}

template <class S, int MaxVectors>
static void multiply_vectors(std::int64_t vectors, const QconvblockParams& s, const Requantizer<S>& requantizer,
                             std::int64_t begin, std::int64_t end, std::int64_t units, std::int64_t m, std::int64_t rows,
                             const std::uint8_t* act, std::int32_t* sums) {
  if constexpr (MaxVectors > 1) {
    if (vectors < MaxVectors) {
      return multiply_vectors<S, MaxVectors - 1>(vectors, s, requantizer, begin, end, units, m, rows, act, sums);
    }
  }
  multiply_tile<S, MaxVectors>(s, requantizer, begin, end, units, m, rows, act, sums);
}

template <class S>
static void qconvblock_generic(const QconvblockParams& s, std::int64_t row_begin, std::int64_t row_end,
                               std::int64_t panel_begin, std::int64_t panel_end, std::uint8_t* scratch) {
  const QconvParams& p = s.dense;
  const Requantizer<S> requantizer(p.y);
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps(), units = taps * run / 4;
  auto* sums = reinterpret_cast<std::int32_t*>(scratch);
  scratch += kQconvblockStripPanels * 16 * kQconvblockPixels * 4;
  std::uint8_t* act = scratch;
  scratch += units * kQconvblockPixels * 4;
  std::uint8_t* zeros = scratch;
  std::memset(zeros, p.x_zero, static_cast<std::size_t>(run));
  auto** pointers = reinterpret_cast<const std::uint8_t**>(scratch + (run + 63) / 64 * 64);
  const std::int64_t total = row_end - row_begin, tiles = (total + kQconvblockPixels - 1) / kQconvblockPixels;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const std::int64_t m = row_begin + tile * kQconvblockPixels;
    const std::int64_t rows = row_end - m < kQconvblockPixels ? row_end - m : kQconvblockPixels;
    const std::int64_t vectors = (rows + 15) / 16;
    point_at_pixels(p, zeros, m, rows, vectors * 16, pointers);
    interleave_pixels<S>(taps, run, vectors * 16, vectors * 16, pointers, act);
    multiply_vectors<S, 4>(vectors, s, requantizer, panel_begin, panel_end, units, m, rows, act, sums);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONVBLOCK_GENERIC_H_
