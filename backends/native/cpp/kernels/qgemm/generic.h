// The algorithm of every qgemm kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QGEMM_GENERIC_H_
#define SQC_KERNELS_QGEMM_GENERIC_H_

#include "kernels/epilogue.h"
#include "kernels/qgemm/qgemm.h"

namespace sqc {
namespace {

// Sums of row m and one panel to c.
template <class S>
static SQC_INLINE void finish_panel(const QgemmParams& p, std::int64_t m, std::int64_t panel, typename S::I32 sum) {
  const std::int64_t n = panel * 16;
  const std::int32_t zero = p.a_zero[m * p.a_zero_stride] - S::kActOffset;
  sum = S::sub_i(sum, S::mul_i(S::load_i(p.b_sum + n), S::set_i(zero)));
  const auto scale = S::mul_f(S::set_f(p.a_scale[m * p.a_scale_stride]), S::load_f(p.b_scale + n));
  const auto bias = p.bias != nullptr ? S::load_f(p.bias + n) : S::set_f(0.0f);
  store_clamped<S>(p.c + m * p.c_stride + n, p.n - n, S::fma_f(S::to_float(sum), scale, bias), S::set_f(p.low),
                   S::set_f(p.high));
}

// Few rows: one panel at a time, so that the weights are one stream. Unroll independent sums a row keep
// the multipliers busy.
template <class S, int Rows, int Unroll>
static void gemv_panel(const QgemmParams& p, std::int64_t m, std::int64_t panel) {
  const std::int64_t tiles = (p.k + 3) / 4;
  const std::int8_t* b = p.b + panel * tiles * 64;
  const std::uint8_t* a = p.a + m * p.a_stride;
  typename S::Acc acc[Rows][Unroll];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int u = 0; u < Unroll; ++u) acc[r][u] = S::zero();
  std::int64_t t = 0;
  for (; t + Unroll <= tiles; t += Unroll) {
    SQC_UNROLL for (int u = 0; u < Unroll; ++u) {
      const typename S::Tile tile = S::load_tile(b + (t + u) * 64);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        acc[r][u] = S::dot_us(acc[r][u], S::load_act_u8(a + r * p.a_stride + (t + u) * 4), tile);
      }
    }
  }
  for (; t < tiles; ++t) {
    const typename S::Tile tile = S::load_tile(b + t * 64);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      acc[r][0] = S::dot_us(acc[r][0], S::load_act_u8(a + r * p.a_stride + t * 4), tile);
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int u = 1; u < Unroll; ++u) acc[r][0] = S::add(acc[r][0], acc[r][u]);
    finish_panel<S>(p, m + r, panel, S::reduce(acc[r][0]));
  }
}

// Many rows: Rows x Panels sums in registers. `b` is where the first panel's tiles lie. `next` is what the following panels' tiles start with;
// [next, next + next_bytes) is fetched into the cache while this tile computes.
template <class S, int Rows, int Panels>
static void gemm_tile(const QgemmParams& p, std::int64_t m, std::int64_t panel, const std::int8_t* b,
                      const std::int8_t* next, std::int64_t next_bytes) {
  const std::int64_t tiles = (p.k + 3) / 4;
  const std::int64_t panel_bytes = tiles * 64;
  const std::uint8_t* a = p.a + m * p.a_stride;
  typename S::Acc acc[Rows][Panels];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::zero();
  for (std::int64_t t = 0; t < tiles; ++t) {
    if (t * 64 < next_bytes) S::prefetch(next + t * 64);
    typename S::Tile tile[Panels];
    SQC_UNROLL for (int q = 0; q < Panels; ++q) tile[q] = S::load_tile(b + q * panel_bytes + t * 64);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      const typename S::Act act = S::load_act_u8(a + r * p.a_stride + t * 4);
      SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::dot_us(acc[r][q], act, tile[q]);
    }
  }
  // By way of memory: were the epilogue unrolled over all sums too, gcc 12 would keep them on the stack in
  // the loop above (240 instead of 400 GOPS).
  std::int32_t sums[Rows][Panels][16];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int q = 0; q < Panels; ++q) S::store_i(sums[r][q], S::reduce(acc[r][q]));
  }
  for (int r = 0; r < Rows; ++r) {
    for (int q = 0; q < Panels; ++q) finish_panel<S>(p, m + r, panel + q, S::load_i(sums[r][q]));
  }
}

template <class S, int MaxRows, int Unroll>
static SQC_INLINE void gemv_rows(int rows, const QgemmParams& p, std::int64_t m, std::int64_t panel) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return gemv_rows<S, MaxRows - 1, Unroll>(rows, p, m, panel);
  }
  gemv_panel<S, MaxRows, (Unroll > MaxRows ? Unroll / MaxRows : 1)>(p, m, panel);
}

template <class S, int MaxRows, int Panels>
static SQC_INLINE void gemm_rows(int rows, const QgemmParams& p, std::int64_t m, std::int64_t panel,
                                 const std::int8_t* b, const std::int8_t* next, std::int64_t next_bytes) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return gemm_rows<S, MaxRows - 1, Panels>(rows, p, m, panel, b, next, next_bytes);
  }
  gemm_tile<S, MaxRows, Panels>(p, m, panel, b, next, next_bytes);
}

// All rows of a strip of `Panels` panels, whose tiles lie at `b`, in blocks that differ by at most one
// row: seven rows are 4 + 3 and not 6 + 1, whose second block would read the strip again for one row.
// `next` is the following strip, null if there is none: each block fetches its share of it.
template <class S, int MaxRows, int Panels>
static void gemm_strip(const QgemmParams& p, std::int64_t panel, const std::int8_t* b, const std::int8_t* next) {
  const std::int64_t blocks = (p.m + MaxRows - 1) / MaxRows;
  const std::int64_t strip_bytes = (p.k + 3) / 4 * 64 * Panels;
  const std::int64_t share = (strip_bytes / blocks + 63) / 64 * 64;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t m = p.m * block / blocks, rows = p.m * (block + 1) / blocks - m;
    const std::int64_t from = block * share, left = strip_bytes - from;
    const std::int64_t bytes = next == nullptr || left < 0 ? 0 : left < share ? left : share;
    gemm_rows<S, MaxRows, Panels>(static_cast<int>(rows), p, m, panel, b, bytes > 0 ? next + from : b, bytes);
  }
}

// GemvRows: up to so many rows are handled by gemv_panel, with Unroll sums in all.
template <class S, int GemvRows, int Unroll, int GemmRows, int GemmPanels>
static void qgemm_generic(const QgemmParams& p, std::int64_t begin, std::int64_t end) {
  if (p.m <= GemvRows) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      gemv_rows<S, GemvRows, Unroll>(static_cast<int>(p.m), p, 0, panel);
    }
    return;
  }
  const std::int64_t panel_bytes = (p.k + 3) / 4 * 64;
  std::int64_t panel = begin;
  for (; panel + GemmPanels <= end; panel += GemmPanels) {
    const std::int8_t* b = p.b + panel * panel_bytes;
    gemm_strip<S, GemmRows, GemmPanels>(p, panel, b, panel + 2 * GemmPanels <= end ? b + GemmPanels * panel_bytes : nullptr);
  }
  for (; panel < end; ++panel) gemm_strip<S, GemmRows, 1>(p, panel, p.b + panel * panel_bytes, nullptr);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QGEMM_GENERIC_H_
