// The algorithm of every qblock kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QBLOCK_GENERIC_H_
#define SQC_KERNELS_QBLOCK_GENERIC_H_

#include "kernels/lanes.h"
#include "kernels/qblock/qblock.h"

namespace sqc {
namespace {

// Rows of tile `tile`, rounded up to 16.
static SQC_INLINE std::int64_t tile_rows(const QblockParams& s, std::int64_t tile) {
  const std::int64_t left = s.dense.m - tile * kQblockTileRows;
  return left >= kQblockTileRows ? kQblockTileRows : (left + 15) / 16 * 16;
}

static SQC_INLINE std::uint8_t* tile_data(const QblockParams& s, std::int64_t tile) {
  return s.interleaved + tile * kQblockTileRows * ((s.dense.k + 3) / 4) * 4;
}

// [rows][k] to [k / 4][rows][4]: transposes 16 x 16 units of 4 bytes at a time.
template <class S>
static void interleave_tile(const QblockParams& s, std::int64_t tile) {
  const QgemmParams& p = s.dense;
  const std::int64_t units = (p.k + 3) / 4, rows = tile_rows(s, tile);
  std::uint8_t* out = tile_data(s, tile);
  for (std::int64_t r = 0; r < rows; r += 16) {
    for (std::int64_t u = 0; u < units; u += 16) {
      const std::int64_t here = units - u < 16 ? units - u : 16;
      typename S::I32 v[16];
      for (int i = 0; i < 16; ++i) {
        const std::int64_t m = tile * kQblockTileRows + r + i;
        std::int32_t lanes[16] = {};
        if (m < p.m) {
          const std::uint8_t* a = p.a + m * p.a_stride + u * 4;
          if (here == 16) {
            v[i] = S::load_i(reinterpret_cast<const std::int32_t*>(a));
            continue;
          }
          std::memcpy(lanes, a, static_cast<std::size_t>(here) * 4);
        }
        v[i] = S::load_i(lanes);
      }
      S::transpose(v);
      for (std::int64_t i = 0; i < here; ++i) {
        S::store_i(reinterpret_cast<std::int32_t*>(out + ((u + i) * rows + r) * 4), v[i]);
      }
    }
  }
}

// The products of `count` blocks: sums[output][row], Outputs x Vectors of 16 rows; if not the `first` ones, added to
// what is there. `values` and `act` point at the first output and row; a block has `block_bytes`, a unit of 4 k
// `unit_bytes`.
template <class S, int Outputs, int Vectors>
static SQC_INLINE void add_blocks(const std::uint8_t* index, std::int64_t count, const std::int8_t* values,
                                  std::int64_t block_bytes, const std::uint8_t* act, std::int64_t unit_bytes,
                                  bool first, std::int32_t* sums, std::int64_t sum_stride) {
  typename S::Acc acc[Outputs][Vectors];
  SQC_UNROLL for (int o = 0; o < Outputs; ++o) SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[o][v] = S::zero();
  for (std::int64_t i = 0; i < count; ++i, values += block_bytes) {
    const std::uint8_t* a = act + index[i] * unit_bytes;
    typename S::RowTile rows[Vectors];
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) rows[v] = S::load_row_tile(a + v * 64);
    SQC_UNROLL for (int o = 0; o < Outputs; ++o) {
      const typename S::Weight4 weight = S::load_weight4(values + o * 4);
      SQC_UNROLL for (int v = 0; v < Vectors; ++v) acc[o][v] = S::dot_row_tile(acc[o][v], rows[v], weight);
    }
  }
  SQC_UNROLL for (int o = 0; o < Outputs; ++o) {
    SQC_UNROLL for (int v = 0; v < Vectors; ++v) {
      std::int32_t* sum = sums + o * sum_stride + v * 16;
      const auto added = S::reduce(acc[o][v]);
      S::store_i(sum, first ? added : S::add_i(S::load_i(sum), added));
    }
  }
}

template <class S, int Outputs, int MaxVectors>
static SQC_INLINE void add_blocks_to(int vectors, const std::uint8_t* index, std::int64_t count,
                                     const std::int8_t* values, std::int64_t block_bytes, const std::uint8_t* act,
                                     std::int64_t unit_bytes, bool first, std::int32_t* sums,
                                     std::int64_t sum_stride) {
  if constexpr (MaxVectors > 1) {
    if (vectors < MaxVectors) {
      return add_blocks_to<S, Outputs, MaxVectors - 1>(vectors, index, count, values, block_bytes, act, unit_bytes, first,
                                                       sums, sum_stride);
    }
  }
  add_blocks<S, Outputs, MaxVectors>(index, count, values, block_bytes, act, unit_bytes, first, sums, sum_stride);
}

// All rows of blocks of panels [begin, end), for one chunk of one tile.
template <class S, int Outputs, int Vectors>
static void multiply_chunk(const QblockParams& s, std::int64_t begin, std::int64_t end, std::int64_t chunk,
                           std::int64_t tile, std::int32_t* sums) {
  const std::int64_t rows = tile_rows(s, tile), outputs = s.block_outputs, block_bytes = outputs * 4;
  const std::int64_t block_rows = (s.dense.n + 15) / 16 * 16 / outputs;
  const std::uint64_t* start = s.start + chunk * block_rows;
  const std::uint8_t* act = tile_data(s, tile) + chunk * s.chunk * rows * 4;
  for (std::int64_t r = begin * 16 / outputs; r < end * 16 / outputs; ++r) {
    const auto first = static_cast<std::int64_t>(start[r]), count = static_cast<std::int64_t>(start[r + 1]) - first;
    if (count == 0 && chunk > 0) continue;
    for (std::int64_t o = 0; o < outputs; o += Outputs) {
      for (std::int64_t v = 0; v < rows; v += Vectors * 16) {
        const auto vectors = static_cast<int>(rows - v < Vectors * 16 ? (rows - v) / 16 : Vectors);
        add_blocks_to<S, Outputs, Vectors>(vectors, s.index + first, count, s.values + first * block_bytes + o * 4,
                                           block_bytes, act + v * 4, rows * 4, chunk == 0,
                                           sums + ((r * outputs + o) - begin * 16) * rows + v, rows);
      }
    }
  }
}

// What qgemm's finish_panel does, sixteen rows of an output at a time, and then sixteen outputs of a row.
template <class S>
static void finish_tile(const QblockParams& s, std::int64_t begin, std::int64_t end, std::int64_t tile,
                        const std::int32_t* sums) {
  const QgemmParams& p = s.dense;
  const std::int64_t rows = tile_rows(s, tile);
  const auto low = S::set_f(p.low), high = S::set_f(p.high);
  for (std::int64_t r = 0; r < rows; r += 16) {
    const std::int64_t first = tile * kQblockTileRows + r, here = p.m - first < 16 ? p.m - first : 16;
    alignas(64) float scales[16] = {};
    alignas(64) std::int32_t zeros[16] = {};
    for (std::int64_t i = 0; i < here; ++i) {
      scales[i] = p.a_scale[(first + i) * p.a_scale_stride];
      zeros[i] = p.a_zero[(first + i) * p.a_zero_stride] - S::kActOffset;
    }
    const auto scale = S::load_f(scales);
    const auto zero = S::load_i(zeros);
    // Panel after panel, so that each row of c is written from the left to the right.
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int32_t* of_panel = sums + (panel - begin) * 16 * rows + r;
      const std::int64_t n = panel * 16;
      typename S::I32 v[16];
      SQC_UNROLL for (int i = 0; i < 16; ++i) {
        const auto sum = S::sub_i(S::load_i(of_panel + i * rows), S::mul_i(S::set_i(p.b_sum[n + i]), zero));
        const auto bias = p.bias != nullptr ? S::set_f(p.bias[n + i]) : S::set_f(0.0f);
        const auto value = S::fma_f(S::to_float(sum), S::mul_f(scale, S::set_f(p.b_scale[n + i])), bias);
        v[i] = S::as_int(S::min_f(high, S::max_f(low, value)));
      }
      S::transpose(v);
      float* c = p.c + first * p.c_stride + n;
      if (here == 16 && p.n - n >= 16) {
        SQC_UNROLL for (int i = 0; i < 16; ++i) S::store_f(c + i * p.c_stride, S::as_float(v[i]));
        continue;
      }
      for (std::int64_t i = 0; i < here; ++i) store_lanes<S>(c + i * p.c_stride, p.n - n, S::as_float(v[i]));
    }
  }
}

// Outputs x Vectors sums in registers; Outputs is 1 for blocks of one output.
template <class S, int Outputs, int Vectors>
static void qblock_generic(const QblockParams& s, QblockPhase phase, std::int64_t begin, std::int64_t end,
                           std::int32_t* sums) {
  if (phase == QblockPhase::interleave) {
    for (std::int64_t tile = begin; tile < end; ++tile) interleave_tile<S>(s, tile);
    return;
  }
  const std::int64_t units = (s.dense.k + 3) / 4, chunks = (units + s.chunk - 1) / s.chunk;
  const std::int64_t panels = (s.dense.n + 15) / 16;
  while (begin < end) {
    // A strip's sums stay in the L2 cache from chunk to chunk.
    const std::int64_t tile = begin / panels, strip = begin % panels;
    std::int64_t count = end - begin < panels - strip ? end - begin : panels - strip;
    if (count > kQblockStripPanels) count = kQblockStripPanels;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (s.block_outputs == 1) {
        multiply_chunk<S, 1, Vectors>(s, strip, strip + count, chunk, tile, sums);
      } else {
        multiply_chunk<S, Outputs, Vectors>(s, strip, strip + count, chunk, tile, sums);
      }
    }
    if (chunks == 0) std::memset(sums, 0, static_cast<std::size_t>(count * 16 * tile_rows(s, tile)) * sizeof *sums);
    finish_tile<S>(s, strip, strip + count, tile, sums);
    begin += count;
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QBLOCK_GENERIC_H_
