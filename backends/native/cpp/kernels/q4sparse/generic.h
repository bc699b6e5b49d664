// The algorithm of every q4sparse kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_Q4SPARSE_GENERIC_H_
#define SQC_KERNELS_Q4SPARSE_GENERIC_H_

#include "kernels/q4gemm/generic.h"
#include "kernels/q4sparse/q4sparse.h"

namespace sqc {
namespace {

// Few rows: a tile of either stream is expanded in registers and used by all of them.
template <class S, int Rows>
static void sparse_gemv_panel(const Q4sparseParams& s, std::int64_t panel) {
  const Q4gemmParams& p = s.dense;
  const std::int64_t groups = group_count(p), half = p.group / 8;
  const typename S::Table table = S::load_table(p.table);
  const std::uint64_t* masks = s.masks + panel * groups * half * 2;
  const std::uint8_t* values = s.values + s.value_start[panel];
  typename S::F32 total[Rows];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) total[r] = S::set_f(0.0f);
  for (std::int64_t g = 0; g < groups; ++g, masks += 2 * half) {
    const std::int64_t index = panel * groups + g;
    typename S::AccT low[Rows], high[Rows];
    SQC_UNROLL for (int r = 0; r < Rows; ++r) low[r] = high[r] = S::zero_t();
    const std::uint8_t *low_values = values, *high_values = values;
    const std::int8_t* a = p.a + g * p.group;
    for (std::int64_t t = 0; t < half; ++t, a += 4) {
      const typename S::TileT low_tile = S::template expand_codes<0>(low_values, masks[t], table);
      const typename S::TileT high_tile = S::template expand_codes<4>(high_values, masks[half + t], table);
      low_values += S::count(masks[t]);
      high_values += S::count(masks[half + t]);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        low[r] = S::dot_table(low[r], low_tile, S::load_act_s8(a + r * p.a_stride));
        high[r] = S::dot_table(high[r], high_tile, S::load_act_s8(a + r * p.a_stride + half * 4));
      }
    }
    values = low_values > high_values ? low_values : high_values;
    const auto scale = load_scale<S>(p, index);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      total[r] = add_group<S>(p, r, groups, g, index, S::reduce_t(S::add_t(low[r], high[r])), scale, total[r]);
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) finish_panel<S>(p, r, panel, total[r]);
}

template <class S, int MaxRows>
static SQC_INLINE void sparse_gemv_rows(int rows, const Q4sparseParams& s, std::int64_t panel) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return sparse_gemv_rows<S, MaxRows - 1>(rows, s, panel);
  }
  sparse_gemv_panel<S, MaxRows>(s, panel);
}

// One panel to bytes, as place `q` of a strip of `Panels`: see expand_strip in q4gemm/generic.h.
template <class S, int Panels>
static void expand_sparse_panel(const Q4sparseParams& s, std::int64_t panel, int q, std::int8_t* strip) {
  const Q4gemmParams& p = s.dense;
  const std::int64_t groups = group_count(p), half = p.group / 8;
  const typename S::Table table = S::load_table(p.table);
  const std::uint64_t* masks = s.masks + panel * groups * half * 2;
  const std::uint8_t* values = s.values + s.value_start[panel];
  std::int8_t* out = strip + q * 64;
  for (std::int64_t g = 0; g < groups; ++g, masks += 2 * half, out += 2 * half * Panels * 64) {
    const std::uint8_t *low_values = values, *high_values = values;
    for (std::int64_t t = 0; t < half; ++t) {
      S::store_tile_t(out + t * Panels * 64, S::template expand_codes<0>(low_values, masks[t], table));
      S::store_tile_t(out + (half + t) * Panels * 64, S::template expand_codes<4>(high_values, masks[half + t], table));
      low_values += S::count(masks[t]);
      high_values += S::count(masks[half + t]);
    }
    values = low_values > high_values ? low_values : high_values;
  }
}

template <class S, int GemvRows, int GemmRows, int GemmPanels>
static void q4sparse_generic(const Q4sparseParams& s, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  const Q4gemmParams& p = s.dense;
  if (p.m <= GemvRows) {
    for (std::int64_t panel = begin; panel < end; ++panel) sparse_gemv_rows<S, GemvRows>(static_cast<int>(p.m), s, panel);
    return;
  }
  auto* strip = reinterpret_cast<std::int8_t*>(scratch);
  std::int64_t panel = begin;
  for (; panel + GemmPanels <= end; panel += GemmPanels) {
    for (int q = 0; q < GemmPanels; ++q) expand_sparse_panel<S, GemmPanels>(s, panel + q, q, strip);
    gemm_strip<S, GemmRows, GemmPanels>(p, panel, strip);
  }
  for (; panel < end; ++panel) {
    expand_sparse_panel<S, 1>(s, panel, 0, strip);
    gemm_strip<S, GemmRows, 1>(p, panel, strip);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_Q4SPARSE_GENERIC_H_
