// The algorithm of every qblock kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QBLOCK_GENERIC_H_
#define SQC_KERNELS_QBLOCK_GENERIC_H_

#include "kernels/qblock/qblock.h"
#include "kernels/qgemm/generic.h"

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

// Adds the products of `count` blocks to sums[output][row], Outputs x Vectors of 16 rows. `values` and
// `act` point at the first output and row; a block has `block_bytes`, a unit of 4 k `unit_bytes`.
template <class S, int Outputs, int Vectors>
static SQC_INLINE void add_blocks(const std::uint8_t* index, std::int64_t count, const std::int8_t* values,
                                  std::int64_t block_bytes, const std::uint8_t* act, std::int64_t unit_bytes,
                                  std::int32_t* sums, std::int64_t sum_stride) {
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
      S::store_i(sum, S::add_i(S::load_i(sum), S::reduce(acc[o][v])));
    }
  }
}

template <class S, int Outputs, int MaxVectors>
static SQC_INLINE void add_blocks_to(int vectors, const std::uint8_t* index, std::int64_t count,
                                     const std::int8_t* values, std::int64_t block_bytes, const std::uint8_t* act,
                                     std::int64_t unit_bytes, std::int32_t* sums, std::int64_t sum_stride) {
  if constexpr (MaxVectors > 1) {
    if (vectors < MaxVectors) {
      return add_blocks_to<S, Outputs, MaxVectors - 1>(vectors, index, count, values, block_bytes, act, unit_bytes, sums,
                                                       sum_stride);
    }
  }
  add_blocks<S, Outputs, MaxVectors>(index, count, values, block_bytes, act, unit_bytes, sums, sum_stride);
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
    if (count == 0) continue;
    for (std::int64_t o = 0; o < outputs; o += Outputs) {
      for (std::int64_t v = 0; v < rows; v += Vectors * 16) {
        const auto vectors = static_cast<int>(rows - v < Vectors * 16 ? (rows - v) / 16 : Vectors);
        add_blocks_to<S, Outputs, Vectors>(vectors, s.index + first, count, s.values + first * block_bytes + o * 4,
                                           block_bytes, act + v * 4, rows * 4,
                                           sums + ((r * outputs + o) - begin * 16) * rows + v, rows);
      }
    }
  }
}

template <class S>
static void finish_tile(const QblockParams& s, std::int64_t begin, std::int64_t end, std::int64_t tile,
                        const std::int32_t* sums) {
  const std::int64_t rows = tile_rows(s, tile);
  for (std::int64_t panel = begin; panel < end; ++panel, sums += 16 * rows) {
    for (std::int64_t r = 0; r < rows; r += 16) {
      typename S::I32 v[16];
      for (int i = 0; i < 16; ++i) v[i] = S::load_i(sums + i * rows + r);
      S::transpose(v);
      const std::int64_t m = tile * kQblockTileRows + r;
      for (int i = 0; i < 16 && m + i < s.dense.m; ++i) finish_panel<S>(s.dense, m + i, panel, v[i]);
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
  const std::int64_t tiles = (s.dense.m + kQblockTileRows - 1) / kQblockTileRows;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    // A strip's sums stay in the L2 cache from chunk to chunk.
    for (std::int64_t strip = begin; strip < end; strip += kQblockStripPanels) {
      const std::int64_t strip_end = strip + kQblockStripPanels < end ? strip + kQblockStripPanels : end;
      const std::int64_t count = (strip_end - strip) * 16 * tile_rows(s, tile);
      std::memset(sums, 0, static_cast<std::size_t>(count) * sizeof *sums);
      for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (s.block_outputs == 1) {
          multiply_chunk<S, 1, Vectors>(s, strip, strip_end, chunk, tile, sums);
        } else {
          multiply_chunk<S, Outputs, Vectors>(s, strip, strip_end, chunk, tile, sums);
        }
      }
      finish_tile<S>(s, strip, strip_end, tile, sums);
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QBLOCK_GENERIC_H_
