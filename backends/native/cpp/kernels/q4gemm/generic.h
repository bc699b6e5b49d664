// The algorithm of every q4gemm kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_Q4GEMM_GENERIC_H_
#define SQC_KERNELS_Q4GEMM_GENERIC_H_

#include "kernels/epilogue.h"
#include "kernels/q4gemm/q4gemm.h"

namespace sqc {
namespace {

static SQC_INLINE std::int64_t group_count(const Q4gemmParams& p) { return (p.k + p.group - 1) / p.group; }

// Scales of one panel and group.
template <class S>
static SQC_INLINE typename S::F32 load_scale(const Q4gemmParams& p, std::int64_t index) {
  return p.b_scale_is_half ? S::load_half(static_cast<const std::uint16_t*>(p.b_scale) + index * 16)
                           : S::load_f(static_cast<const float*>(p.b_scale) + index * 16);
}

// total + the group's sum times its scale. `index` counts panels times groups.
template <class S>
static SQC_INLINE typename S::F32 add_group(const Q4gemmParams& p, std::int64_t m, std::int64_t groups, std::int64_t g,
                                            std::int64_t index, typename S::I32 sum, typename S::F32 scale,
                                            typename S::F32 total) {
  const std::int32_t a_sum = p.a_sum[m * groups + g];
  if (p.b_zero != nullptr) {
    const auto zero = S::add_i(S::load_i8(p.b_zero + index * 16), S::set_i(S::kTableOffset));
    sum = S::sub_i(sum, S::mul_i(zero, S::set_i(a_sum)));
  } else if (S::kTableOffset != 0) {
    sum = S::sub_i(sum, S::set_i(S::kTableOffset * a_sum));
  }
  if (p.a_scale_per_group) scale = S::mul_f(scale, S::set_f(p.a_scale[m * groups + g]));
  return S::fma_f(S::to_float(sum), scale, total);
}

template <class S>
static SQC_INLINE void finish_panel(const Q4gemmParams& p, std::int64_t m, std::int64_t panel, typename S::F32 total) {
  const auto row_scale = S::set_f(p.a_scale_per_group ? 1.0f : p.a_scale[m]);
  const auto bias = p.bias != nullptr ? S::load_f(p.bias + panel * 16) : S::set_f(0.0f);
  store_clamped<S>(p.c + m * p.c_stride + panel * 16, p.n - panel * 16, S::fma_f(total, row_scale, bias),
                   S::set_f(p.low), S::set_f(p.high));
}

// A run: what is unpacked together, the codes of kSteps k for 16 outputs.
template <int Bits>
struct Run;
template <>
struct Run<2> {
  static constexpr int kSteps = 16, kBytes = 64;
};
template <>
struct Run<3> {
  static constexpr int kSteps = 32, kBytes = 192;
};
template <>
struct Run<4> {
  static constexpr int kSteps = 8, kBytes = 64;
};
template <>
struct Run<8> {
  static constexpr int kSteps = 8, kBytes = 128;
};

// The table with its entries for codes of so many bits repeated up to sixteen: bits above a code's own, which
// its neighbours in the byte leave behind, do not matter then.
template <class S, int Bits>
static SQC_INLINE typename S::Table load_entries(const std::int8_t* table) {
  std::int8_t entries[16];
  for (int i = 0; i < 16; ++i) entries[i] = table[i & ((1 << Bits) - 1) & 15];
  return S::load_table(entries);
}

template <class S, int Bits>
static SQC_INLINE void unpack_run(const std::uint8_t* p, typename S::Table table, typename S::TileT* tiles) {
  if constexpr (Bits == 8) {
    const auto* weights = reinterpret_cast<const std::int8_t*>(p);
    tiles[0] = S::load_entries(weights);
    tiles[1] = S::load_entries(weights + 64);
  } else if constexpr (Bits == 4) {
    S::unpack(p, table, tiles[0], tiles[1]);
  } else if constexpr (Bits == 2) {
    const auto codes = S::load_codes(p);
    tiles[0] = S::template look_up<0>(codes, table);
    tiles[1] = S::template look_up<2>(codes, table);
    tiles[2] = S::template look_up<4>(codes, table);
    tiles[3] = S::template look_up<6>(codes, table);
  } else {
    const auto first = S::load_codes(p), second = S::load_codes(p + 64), third = S::load_codes(p + 128);
    tiles[0] = S::template look_up<0>(S::template merge<0, 0>(first, third), table);
    tiles[1] = S::template look_up<0>(S::template merge<2, 1>(first, third), table);
    tiles[2] = S::template look_up<0>(S::template merge<4, 2>(first, third), table);
    tiles[3] = S::template look_up<0>(S::template merge<6, 3>(first, third), table);
    tiles[4] = S::template look_up<0>(S::template merge<0, 4>(second, third), table);
    tiles[5] = S::template look_up<0>(S::template merge<2, 5>(second, third), table);
    tiles[6] = S::template look_up<0>(S::template merge<4, 6>(second, third), table);
    tiles[7] = S::template look_up<0>(S::template merge<6, 7>(second, third), table);
  }
}

// Few rows: codes are looked up in registers and used at once.
template <class S, int Bits, int Rows>
static void gemv_panel(const Q4gemmParams& p, std::int64_t panel) {
  const std::int64_t groups = group_count(p);
  constexpr int kTiles = Run<Bits>::kSteps / 4;
  const typename S::Table table = load_entries<S, Bits>(p.table);
  const std::uint8_t* b = p.b + panel * groups * p.group * 2 * Bits;
  typename S::F32 total[Rows];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) total[r] = S::set_f(0.0f);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t index = panel * groups + g;
    typename S::AccT low[Rows], high[Rows];
    SQC_UNROLL for (int r = 0; r < Rows; ++r) low[r] = high[r] = S::zero_t();
    const std::int8_t* a = p.a + g * p.group;
    for (std::int64_t k = 0; k < p.group; k += Run<Bits>::kSteps, b += Run<Bits>::kBytes) {
      typename S::TileT tile[kTiles];
      unpack_run<S, Bits>(b, table, tile);
      SQC_UNROLL for (int t = 0; t < kTiles; t += 2) {
        SQC_UNROLL for (int r = 0; r < Rows; ++r) {
          const std::int8_t* act = a + r * p.a_stride + k + 4 * t;
          low[r] = S::dot_table(low[r], tile[t], S::load_act_s8(act));
          high[r] = S::dot_table(high[r], tile[t + 1], S::load_act_s8(act + 4));
        }
      }
    }
    const auto scale = load_scale<S>(p, index);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      total[r] = add_group<S>(p, r, groups, g, index, S::reduce_t(S::add_t(low[r], high[r])), scale, total[r]);
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) finish_panel<S>(p, r, panel, total[r]);
}

// Panels [panel, panel + Panels) to bytes: for each tile along k, the panels' tiles side by side.
template <class S, int Bits, int Panels>
static void expand_strip(const Q4gemmParams& p, std::int64_t panel, std::int8_t* out) {
  constexpr int kTiles = Run<Bits>::kSteps / 4;
  const std::int64_t runs = group_count(p) * p.group / Run<Bits>::kSteps;
  const typename S::Table table = load_entries<S, Bits>(p.table);
  const std::uint8_t* b = p.b + panel * runs * Run<Bits>::kBytes;
  for (std::int64_t run = 0; run < runs; ++run, out += kTiles * Panels * 64) {
    SQC_UNROLL for (int q = 0; q < Panels; ++q) {
      typename S::TileT tile[kTiles];
      unpack_run<S, Bits>(b + (q * runs + run) * Run<Bits>::kBytes, table, tile);
      SQC_UNROLL for (int t = 0; t < kTiles; ++t) S::store_tile_t(out + (t * Panels + q) * 64, tile[t]);
    }
  }
}

// Rows x Panels sums in registers, as integers within a group and as floats across groups.
template <class S, int Rows, int Panels>
static void gemm_tile(const Q4gemmParams& p, std::int64_t m, std::int64_t panel, const std::int8_t* strip) {
  const std::int64_t groups = group_count(p);
  const std::int8_t* a = p.a + m * p.a_stride;
  typename S::F32 total[Rows][Panels];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) total[r][q] = S::set_f(0.0f);
  for (std::int64_t g = 0; g < groups; ++g) {
    typename S::AccT acc[Rows][Panels];
    SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::zero_t();
    for (std::int64_t k = 0; k < p.group; k += 4, a += 4, strip += Panels * 64) {
      typename S::TileT tile[Panels];
      SQC_UNROLL for (int q = 0; q < Panels; ++q) tile[q] = S::load_tile_t(strip + q * 64);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        const typename S::ActS act = S::load_act_s8(a + r * p.a_stride);
        SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::dot_table(acc[r][q], tile[q], act);
      }
    }
    SQC_UNROLL for (int q = 0; q < Panels; ++q) {
      const std::int64_t index = (panel + q) * groups + g;
      const auto scale = load_scale<S>(p, index);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        total[r][q] = add_group<S>(p, m + r, groups, g, index, S::reduce_t(acc[r][q]), scale, total[r][q]);
      }
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int q = 0; q < Panels; ++q) finish_panel<S>(p, m + r, panel + q, total[r][q]);
  }
}

template <class S, int Bits, int MaxRows>
static SQC_INLINE void gemv_rows(int rows, const Q4gemmParams& p, std::int64_t panel) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return gemv_rows<S, Bits, MaxRows - 1>(rows, p, panel);
  }
  gemv_panel<S, Bits, MaxRows>(p, panel);
}

template <class S, int MaxRows, int Panels>
static SQC_INLINE void gemm_rows(int rows, const Q4gemmParams& p, std::int64_t m, std::int64_t panel,
                                 const std::int8_t* strip) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return gemm_rows<S, MaxRows - 1, Panels>(rows, p, m, panel, strip);
  }
  gemm_tile<S, MaxRows, Panels>(p, m, panel, strip);
}

// All rows of a strip that has been expanded.
template <class S, int MaxRows, int Panels>
static void gemm_strip(const Q4gemmParams& p, std::int64_t panel, const std::int8_t* strip) {
  const std::int64_t blocks = (p.m + MaxRows - 1) / MaxRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t m = p.m * block / blocks, rows = p.m * (block + 1) / blocks - m;
    gemm_rows<S, MaxRows, Panels>(static_cast<int>(rows), p, m, panel, strip);
  }
}

template <class S, int Bits, int GemvRows, int GemmRows, int GemmPanels>
static void q4gemm_bits(const Q4gemmParams& p, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  static_assert(GemvRows <= 4 && GemmPanels <= 2, "q4gemm_scratch_bytes counts on it");
  if (p.m <= GemvRows) {
    for (std::int64_t panel = begin; panel < end; ++panel) {
      gemv_rows<S, Bits, GemvRows>(static_cast<int>(p.m), p, panel);
    }
    return;
  }
  std::int64_t panel = begin;
  auto* strip = reinterpret_cast<std::int8_t*>(scratch);
  for (; panel + GemmPanels <= end; panel += GemmPanels) {
    expand_strip<S, Bits, GemmPanels>(p, panel, strip);
    gemm_strip<S, GemmRows, GemmPanels>(p, panel, strip);
  }
  for (; panel < end; ++panel) {
    expand_strip<S, Bits, 1>(p, panel, strip);
    gemm_strip<S, GemmRows, 1>(p, panel, strip);
  }
}

template <class S, int GemvRows, int GemmRows, int GemmPanels>
static void q4gemm_generic(const Q4gemmParams& p, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  if (p.bits == 2) return q4gemm_bits<S, 2, GemvRows, GemmRows, GemmPanels>(p, begin, end, scratch);
  if (p.bits == 8) return q4gemm_bits<S, 8, GemvRows, GemmRows, GemmPanels>(p, begin, end, scratch);
  if (p.bits == 3) return q4gemm_bits<S, 3, GemvRows, GemmRows, GemmPanels>(p, begin, end, scratch);
  q4gemm_bits<S, 4, GemvRows, GemmRows, GemmPanels>(p, begin, end, scratch);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_Q4GEMM_GENERIC_H_
