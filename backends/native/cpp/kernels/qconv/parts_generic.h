// The algorithm of every family of kernels/qconv/parts.h, over the types of kernels/simd and the family's own type:
//
//   kIndices: indices of a part, 1 or 4; a unit is 4 / kIndices inputs.
//   unit_bytes(vectors): from one unit to the next of a tile of vectors x 16 pixels.
//   arrange(taps, run, vectors, pointers, to): what such a tile sees, in units.
//   add<Vectors>(index, values, units, acc): adds a part's products to the sums of Vectors x 16 pixels.

#ifndef SQC_KERNELS_QCONV_PARTS_GENERIC_H_
#define SQC_KERNELS_QCONV_PARTS_GENERIC_H_

#include "kernels/qconv/parts.h"
#include "kernels/qconv/pixels.h"

namespace sqc {
namespace {

// Sums of one output for Vectors x 16 pixels over its parts of a chunk, and those over the chunks before, if there are.
template <class S, class Family, int Vectors>
static SQC_INLINE void add_parts(const std::uint8_t* index, std::int64_t count, const std::int8_t* values,
                                 const std::uint8_t* units, const std::int32_t* before, typename S::I32* sums) {
  typename S::Acc acc[Vectors];
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[v] = S::zero();
  for (std::int64_t i = 0; i < count; ++i) {
    Family::template add<Vectors>(index + i * Family::kIndices, values + i * 4, units, acc);
  }
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) {
    sums[v] = S::reduce(acc[v]);
    if (before != nullptr) sums[v] = S::add_i(sums[v], S::load_i(before + v * 16));
  }
}

// Panels [begin, end) for a tile of Vectors x 16 pixels, of which `rows` are there. Sums wait in memory for the next
// chunk only; those of the last one become codes while they are in registers.
template <class S, class Family, int Vectors>
static void multiply_tile(const QconvParts& s, const Requantizer<S>& requantizer, std::int64_t begin, std::int64_t end,
                          std::int64_t count, std::int64_t m, std::int64_t rows, const std::uint8_t* units,
                          std::int32_t* sums) {
  constexpr std::int64_t kPixels = Vectors * 16;
  const QconvOutput& y = s.dense.y;
  const std::int64_t outputs = (s.dense.out_channels + 15) / 16 * 16, chunks = (count + s.chunk - 1) / s.chunk;
  PanelCodes codes, others;
  for (std::int64_t strip = begin; strip < end; strip += kQconvPartStripPanels) {
    const std::int64_t strip_end = strip + kQconvPartStripPanels < end ? strip + kQconvPartStripPanels : end;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::uint8_t* here = units + chunk * s.chunk * Family::unit_bytes(Vectors);
      const std::uint64_t* start = s.start + chunk * outputs;
      const bool finishes = y.codes != nullptr && chunk + 1 == chunks;
      for (std::int64_t n = strip * 16; n < strip_end * 16; ++n) {
        const auto first = static_cast<std::int64_t>(start[n]), parts = static_cast<std::int64_t>(start[n + 1]) - first;
        std::int32_t* own = sums + (n - strip * 16) * kPixels;
        typename S::I32 total[Vectors];
        add_parts<S, Family, Vectors>(s.index + first * Family::kIndices, parts, s.values + first * 4, here,
                                      chunk == 0 ? nullptr : own, total);
        if (!finishes) {
          SQC_UNROLL for (int v = 0; v < Vectors; ++v) S::store_i(own + v * 16, total[v]);
          continue;
        }
        if (y.other != nullptr && n % 16 == 0) take_others<S>(y, n / 16, m, rows, &others);
        finish_output<S, Vectors>(s.dense, requantizer, n, total, y.other == nullptr ? nullptr : &others, &codes);
        if (n % 16 == 15) give_codes<S>(y, n / 16, m, rows, &codes);
      }
    }
    if (y.values != nullptr) finish_values<S, Vectors>(s.dense, requantizer, strip, strip_end, m, rows, sums);
  }
}

template <class S, class Family, int MaxVectors>
static void multiply_vectors(std::int64_t vectors, const QconvParts& s, const Requantizer<S>& requantizer,
                             std::int64_t begin, std::int64_t end, std::int64_t count, std::int64_t m, std::int64_t rows,
                             const std::uint8_t* units, std::int32_t* sums) {
  if constexpr (MaxVectors > 1) {
    if (vectors < MaxVectors) {
      return multiply_vectors<S, Family, MaxVectors - 1>(vectors, s, requantizer, begin, end, count, m, rows, units, sums);
    }
  }
  multiply_tile<S, Family, MaxVectors>(s, requantizer, begin, end, count, m, rows, units, sums);
}

template <class S, class Family>
static void qconv_parts(const QconvParts& s, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                        std::int64_t panel_end, std::uint8_t* scratch) {
  const QconvParams& p = s.dense;
  const Requantizer<S> requantizer(p.y);
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps(), count = taps * run / 4 * Family::kIndices;
  auto* sums = reinterpret_cast<std::int32_t*>(scratch);
  scratch += kQconvPartStripPanels * 16 * kQconvPartPixels * 4;
  std::uint8_t* units = scratch;
  scratch += taps * run * kQconvPartPixels;
  std::uint8_t* zeros = scratch;
  std::memset(zeros, p.x_zero, static_cast<std::size_t>(run));
  auto** pointers = reinterpret_cast<const std::uint8_t**>(scratch + (run + 63) / 64 * 64);
  for (std::int64_t m = row_begin; m < row_end; m += kQconvPartPixels) {
    const std::int64_t rows = row_end - m < kQconvPartPixels ? row_end - m : kQconvPartPixels, vectors = (rows + 15) / 16;
    point_at_pixels(p, zeros, m, rows, vectors * 16, pointers);
    Family::arrange(taps, run, vectors, pointers, units);
    multiply_vectors<S, Family, kQconvPartPixels / 16>(vectors, s, requantizer, panel_begin, panel_end, count, m, rows,
                                                       units, sums);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_PARTS_GENERIC_H_
