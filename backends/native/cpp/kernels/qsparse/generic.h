// The algorithm of every qsparse kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QSPARSE_GENERIC_H_
#define SQC_KERNELS_QSPARSE_GENERIC_H_

#include "kernels/qgemm/generic.h"
#include "kernels/qsparse/qsparse.h"

namespace sqc {
namespace {

// Few rows: a tile is expanded in registers and used by all of them. Unroll independent sums a row.
//
// No software prefetch: 0.5, 1, 2 and 4 KiB ahead on masks and values gained nothing on Zen 4 (one core,
// 35-41 G weights/s at 50 % with any of them and without).
template <class S, int Rows, int Unroll>
static void sparse_gemv_panel(const QsparseParams& s, std::int64_t panel) {
  const QgemmParams& p = s.dense;
  const std::int64_t tiles = (p.k + 3) / 4;
  const std::uint64_t* masks = s.masks + panel * tiles;
  const std::uint8_t* values = s.values + s.value_start[panel];
  typename S::Acc acc[Rows][Unroll];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int u = 0; u < Unroll; ++u) acc[r][u] = S::zero();
  std::int64_t t = 0;
  for (; t + Unroll <= tiles; t += Unroll) {
    SQC_UNROLL for (int u = 0; u < Unroll; ++u) {
      const std::uint64_t mask = masks[t + u];
      const typename S::Tile tile = S::expand(values, mask);
      values += S::count(mask);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        acc[r][u] = S::dot_us(acc[r][u], S::load_act_u8(p.a + r * p.a_stride + (t + u) * 4), tile);
      }
    }
  }
  for (; t < tiles; ++t) {
    const typename S::Tile tile = S::expand(values, masks[t]);
    values += S::count(masks[t]);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      acc[r][0] = S::dot_us(acc[r][0], S::load_act_u8(p.a + r * p.a_stride + t * 4), tile);
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int u = 1; u < Unroll; ++u) acc[r][0] = S::add(acc[r][0], acc[r][u]);
    finish_panel<S>(p, r, panel, S::reduce(acc[r][0]));
  }
}

template <class S, int MaxRows, int Unroll>
static SQC_INLINE void sparse_gemv_rows(int rows, const QsparseParams& s, std::int64_t panel) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return sparse_gemv_rows<S, MaxRows - 1, Unroll>(rows, s, panel);
  }
  sparse_gemv_panel<S, MaxRows, (Unroll > MaxRows ? Unroll / MaxRows : 1)>(s, panel);
}

// The dense form of panels [panel, panel + count).
template <class S>
static void expand_panels(const QsparseParams& s, std::int64_t panel, std::int64_t count, std::int8_t* out) {
  const std::int64_t tiles = (s.dense.k + 3) / 4;
  const std::uint64_t* masks = s.masks + panel * tiles;
  const std::uint8_t* values = s.values + s.value_start[panel];
  for (std::int64_t t = 0; t < count * tiles; ++t) {
    S::store_tile(out + t * 64, S::expand(values, masks[t]));
    values += S::count(masks[t]);
  }
}

template <class S, int GemvRows, int Unroll, int GemmRows, int GemmPanels>
static void qsparse_generic(const QsparseParams& s, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  static_assert(GemmPanels <= 4, "qsparse_scratch_bytes counts on it");
  const QgemmParams& p = s.dense;
  if (p.m <= GemvRows) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      sparse_gemv_rows<S, GemvRows, Unroll>(static_cast<int>(p.m), s, panel);
    }
    return;
  }
  auto* strip = reinterpret_cast<std::int8_t*>(scratch);
  std::int64_t panel = begin;
  for (; panel + GemmPanels <= end; panel += GemmPanels) {
    expand_panels<S>(s, panel, GemmPanels, strip);
    gemm_strip<S, GemmRows, GemmPanels>(p, panel, strip, nullptr);
  }
  for (; panel < end; ++panel) {
    expand_panels<S>(s, panel, 1, strip);
    gemm_strip<S, GemmRows, 1>(p, panel, strip, nullptr);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QSPARSE_GENERIC_H_
