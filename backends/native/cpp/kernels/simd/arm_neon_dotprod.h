// NEON with sdot: sixteen lanes are four registers. See simd.h.

#ifndef SQC_KERNELS_SIMD_ARM_NEON_DOTPROD_H_
#define SQC_KERNELS_SIMD_ARM_NEON_DOTPROD_H_

#include <arm_neon.h>

#include "kernels/simd/expand_table.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {
namespace neon_dotprod {

struct Simd {
  struct I32 {
    int32x4_t v[4];
  };
  struct F32 {
    float32x4_t v[4];
  };

  template <typename F>
  static SQC_INLINE I32 each_i(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }
  template <typename F>
  static SQC_INLINE F32 each_f(F f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static SQC_INLINE I32 set_i(std::int32_t x) {
    return each_i([&](int) { return vdupq_n_s32(x); });
  }
  static SQC_INLINE I32 load_i(const std::int32_t* p) {
    return each_i([&](int i) { return vld1q_s32(p + 4 * i); });
  }
  static SQC_INLINE I32 load_i8(const std::int8_t* p) {
    const int8x16_t bytes = vld1q_s8(p);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
  }
  static SQC_INLINE I32 load_u8(const std::uint8_t* p) {
    const uint8x16_t bytes = vld1q_u8(p);
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(bytes)));
    return {{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)),
             vmovl_s16(vget_high_s16(high))}};
  }
  static SQC_INLINE void store_i(std::int32_t* p, I32 a) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
  }
  static SQC_INLINE void store_bytes(void* p, I32 a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(static_cast<std::int8_t*>(p), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
  }
  static SQC_INLINE I32 add_i(I32 a, I32 b) {
    return each_i([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE I32 sub_i(I32 a, I32 b) {
    return each_i([&](int i) { return vsubq_s32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE I32 mul_i(I32 a, I32 b) {
    return each_i([&](int i) { return vmulq_s32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE I32 max_i(I32 a, I32 b) {
    return each_i([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
  }

  static SQC_INLINE I32 and_i(I32 a, I32 b) {
    return each_i([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE I32 or_i(I32 a, I32 b) {
    return each_i([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
  }
  template <int Bits>
  static SQC_INLINE I32 shift_left(I32 a) {
    return each_i([&](int i) { return vshlq_n_s32(a.v[i], Bits); });
  }
  template <int Bits>
  static SQC_INLINE I32 shift_right(I32 a) {
    return each_i([&](int i) { return vshrq_n_s32(a.v[i], Bits); });
  }

  static SQC_INLINE F32 set_f(float x) {
    return each_f([&](int) { return vdupq_n_f32(x); });
  }
  static SQC_INLINE F32 load_f(const float* p) {
    return each_f([&](int i) { return vld1q_f32(p + 4 * i); });
  }
  static SQC_INLINE void store_f(float* p, F32 a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
  }
  static SQC_INLINE F32 load_half(const std::uint16_t* p) {
    return each_f([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
  }
  static SQC_INLINE F32 to_float(I32 a) {
    return each_f([&](int i) { return vcvtq_f32_s32(a.v[i]); });
  }
  static SQC_INLINE F32 load_bf16(const std::uint16_t* p) {
    return each_f([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
  }
  static SQC_INLINE F32 add_f(F32 a, F32 b) {
    return each_f([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE F32 sub_f(F32 a, F32 b) {
    return each_f([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE F32 mul_f(F32 a, F32 b) {
    return each_f([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE F32 div_f(F32 a, F32 b) {
    return each_f([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
  }
  static SQC_INLINE F32 fma_f(F32 a, F32 b, F32 c) {
    return each_f([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
  }
  // Not vmaxq: it returns NaNs, and +0 for max(-0, +0).
  static SQC_INLINE F32 max_f(F32 a, F32 b) {
    return each_f([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static SQC_INLINE F32 min_f(F32 a, F32 b) {
    return each_f([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
  }
  static SQC_INLINE float largest_lane(F32 a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
  }
  static SQC_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
    return each_f([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), x.v[i], y.v[i]); });
  }
  static SQC_INLINE I32 as_int(F32 a) {
    return each_i([&](int i) { return vreinterpretq_s32_f32(a.v[i]); });
  }
  static SQC_INLINE F32 as_float(I32 a) {
    return each_f([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
  }
  static SQC_INLINE I32 round_i(F32 a) {
    return each_i([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
  }
  static SQC_INLINE I32 abs_bits(F32 a) {
    return each_i([&](int i) { return vandq_s32(vreinterpretq_s32_f32(a.v[i]), vdupq_n_s32(0x7fffffff)); });
  }

  static SQC_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

  using Acc = I32;
  struct Act {
    int8x16_t v;
  };
  struct Tile {
    int8x16_t v[4];
  };
  static constexpr bool kHasQuads = false;
  static constexpr std::int32_t kActOffset = 128;  // sdot takes signed bytes

  static SQC_INLINE int8x16_t broadcast4(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return vreinterpretq_s8_s32(vdupq_n_s32(x));
  }
  static SQC_INLINE Acc zero() { return set_i(0); }
  static SQC_INLINE Acc add(Acc a, Acc b) { return add_i(a, b); }
  static SQC_INLINE I32 reduce(Acc a) { return a; }
  static SQC_INLINE Act load_act_u8(const std::uint8_t* p) { return {veorq_s8(broadcast4(p), vdupq_n_s8(-128))}; }
  static SQC_INLINE void store_tile(std::int8_t* p, const Tile& t) {
    for (int i = 0; i < 4; ++i) vst1q_s8(p + 16 * i, t.v[i]);
  }
  static SQC_INLINE Tile load_tile(const std::int8_t* p) {
    return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}};
  }
  static SQC_INLINE Acc dot(Acc acc, int8x16_t a, const Tile& t) {
    return each_i([&](int i) { return vdotq_s32(acc.v[i], t.v[i], a); });
  }
  static SQC_INLINE Acc dot_us(Acc acc, Act a, const Tile& t) { return dot(acc, a.v, t); }

  // Sixteen rows of a, 4 k each, times 4 weights of one output.
  using RowTile = Tile;
  using Weight4 = Act;
  static SQC_INLINE RowTile load_row_tile(const std::uint8_t* p) {
    RowTile t;
    for (int i = 0; i < 4; ++i) t.v[i] = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(128)));
    return t;
  }
  static SQC_INLINE Weight4 load_weight4(const std::int8_t* p) { return {broadcast4(p)}; }
  static SQC_INLINE Acc dot_row_tile(Acc acc, const RowTile& t, Weight4 w) { return dot(acc, w.v, t); }
  static SQC_INLINE void split_planes(std::uint8_t* p) {
    uint8x16x4_t t[4];
    for (int i = 0; i < 4; ++i) t[i] = vld4q_u8(p + 64 * i);
    for (int i = 0; i < 4; ++i) {
      for (int c = 0; c < 4; ++c) vst1q_u8(p + 64 * c + 16 * i, t[i].val[c]);
    }
  }
  template <int Vectors>
  static SQC_INLINE void join_planes(const std::uint8_t* const* planes, RowTile* tiles) {
    const auto as_signed = [](uint16x8_t v) { return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_u16(v), vdupq_n_u8(128))); };
    for (int i = 0; i < Vectors; ++i) {
      const uint8x16_t a = vld1q_u8(planes[0] + 16 * i), b = vld1q_u8(planes[1] + 16 * i);
      const uint8x16_t c = vld1q_u8(planes[2] + 16 * i), d = vld1q_u8(planes[3] + 16 * i);
      const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(a, b)), high01 = vreinterpretq_u16_u8(vzip2q_u8(a, b));
      const uint16x8_t low23 = vreinterpretq_u16_u8(vzip1q_u8(c, d)), high23 = vreinterpretq_u16_u8(vzip2q_u8(c, d));
      tiles[i] = {{as_signed(vzip1q_u16(low01, low23)), as_signed(vzip2q_u16(low01, low23)),
                   as_signed(vzip1q_u16(high01, high23)), as_signed(vzip2q_u16(high01, high23))}};
    }
  }
  static SQC_INLINE void transpose(I32* rows) {
    std::int32_t from[16][16], to[16][16];
    for (int i = 0; i < 16; ++i) store_i(from[i], rows[i]);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
    }
    for (int i = 0; i < 16; ++i) rows[i] = load_i(to[i]);
  }

  static SQC_INLINE void load_columns(const std::uint8_t* const* rows, std::int64_t offset, I32* v) {
    for (int i = 0; i < 4; ++i) {
      int32x4_t r[4];
      for (int j = 0; j < 4; ++j) r[j] = vreinterpretq_s32_u8(vld1q_u8(rows[4 * i + j] + offset));
      const int64x2_t even01 = vreinterpretq_s64_s32(vtrn1q_s32(r[0], r[1])), odd01 = vreinterpretq_s64_s32(vtrn2q_s32(r[0], r[1]));
      const int64x2_t even23 = vreinterpretq_s64_s32(vtrn1q_s32(r[2], r[3])), odd23 = vreinterpretq_s64_s32(vtrn2q_s32(r[2], r[3]));
      v[0].v[i] = vreinterpretq_s32_s64(vtrn1q_s64(even01, even23));
      v[1].v[i] = vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23));
      v[2].v[i] = vreinterpretq_s32_s64(vtrn2q_s64(even01, even23));
      v[3].v[i] = vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23));
    }
  }
  // Rows i and i + 8 byte by byte, four times over.
  static SQC_INLINE void transpose_bytes(const std::uint8_t* from, std::int64_t from_step, std::uint8_t* to,
                                         std::int64_t to_step) {
    uint8x16_t a[16], b[16];
    SQC_UNROLL for (int i = 0; i < 16; ++i) a[i] = vld1q_u8(from + i * from_step);
    SQC_UNROLL for (int pass = 0; pass < 4; ++pass) {
      SQC_UNROLL for (int i = 0; i < 8; ++i) b[2 * i] = vzip1q_u8(a[i], a[i + 8]), b[2 * i + 1] = vzip2q_u8(a[i], a[i + 8]);
      SQC_UNROLL for (int i = 0; i < 16; ++i) a[i] = b[i];
    }
    SQC_UNROLL for (int i = 0; i < 16; ++i) vst1q_u8(to + i * to_step, a[i]);
  }

  using AccT = I32;
  using ActS = Act;
  using TileT = Tile;
  struct Table {
    int8x16_t v;
  };
  static constexpr std::int32_t kTableOffset = 0;

  static SQC_INLINE AccT zero_t() { return set_i(0); }
  static SQC_INLINE AccT add_t(AccT a, AccT b) { return add_i(a, b); }
  static SQC_INLINE I32 reduce_t(AccT a) { return a; }
  static SQC_INLINE ActS load_act_s8(const std::int8_t* p) { return {broadcast4(p)}; }
  static SQC_INLINE Table load_table(const std::int8_t* p) { return {vld1q_s8(p)}; }
  static SQC_INLINE void unpack(const std::uint8_t* p, Table table, TileT& low, TileT& high) {
    for (int i = 0; i < 4; ++i) {
      const uint8x16_t codes = vld1q_u8(p + 16 * i);
      low.v[i] = vqtbl1q_s8(table.v, vandq_u8(codes, vdupq_n_u8(15)));
      high.v[i] = vqtbl1q_s8(table.v, vshrq_n_u8(codes, 4));
    }
  }
  static SQC_INLINE TileT load_entries(const std::int8_t* p) { return load_tile(p); }
  struct Codes {
    uint8x16_t v[4];
  };
  static SQC_INLINE Codes load_codes(const std::uint8_t* p) {
    return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}};
  }
  template <int Shift>
  static SQC_INLINE uint8x16_t shift_bytes(uint8x16_t v) {
    if constexpr (Shift > 0) return vshrq_n_u8(v, Shift);
    if constexpr (Shift < 0) return vshlq_n_u8(v, -Shift);
    return v;
  }
  template <int Shift>
  static SQC_INLINE TileT look_up(const Codes& c, Table table) {
    TileT t;
    for (int i = 0; i < 4; ++i) t.v[i] = vqtbl1q_s8(table.v, vandq_u8(shift_bytes<Shift>(c.v[i]), vdupq_n_u8(15)));
    return t;
  }
  template <int Shift, int Bit>
  static SQC_INLINE Codes merge(const Codes& low, const Codes& high) {
    Codes c;
    for (int i = 0; i < 4; ++i) {
      c.v[i] = vbslq_u8(vdupq_n_u8(4), shift_bytes<Bit - 2>(high.v[i]), shift_bytes<Shift>(low.v[i]));
    }
    return c;
  }
  static SQC_INLINE void store_tile_t(std::int8_t* p, const TileT& t) {
    for (int i = 0; i < 4; ++i) vst1q_s8(p + 16 * i, t.v[i]);
  }
  static SQC_INLINE TileT load_tile_t(const std::int8_t* p) { return load_tile(p); }
  static SQC_INLINE AccT dot_table(AccT acc, const TileT& t, ActS a) { return dot(acc, a.v, t); }

  static SQC_INLINE std::int64_t count(std::uint64_t mask) { return __builtin_popcountll(mask); }
  // As in x86_avx2.h: eight bytes at a time, by a table of 256 shuffles, after `map`.
  template <typename Map>
  static SQC_INLINE int8x16_t expand16(const std::uint8_t* p, std::uint64_t mask, std::uint64_t before, int half, Map map) {
    const auto offset = [&](int byte) { return byte == 0 ? 0 : (before >> (8 * byte - 8)) & 0xff; };
    const auto eight = [&](int byte) {
      const int8x8_t stored = map(vld1_u8(p + offset(byte)));
      return vtbl1_s8(stored, vreinterpret_s8_u8(vld1_u8(kExpandTable.shuffle[(mask >> (8 * byte)) & 0xff])));
    };
    return vcombine_s8(eight(2 * half), eight(2 * half + 1));
  }
  template <typename Map>
  static SQC_INLINE Tile expand64(const std::uint8_t* p, std::uint64_t mask, Map map) {
    const std::uint64_t before = counts_up_to_each_byte(mask);
    return {{expand16(p, mask, before, 0, map), expand16(p, mask, before, 1, map), expand16(p, mask, before, 2, map),
             expand16(p, mask, before, 3, map)}};
  }
  static SQC_INLINE Tile expand(const std::uint8_t* p, std::uint64_t mask) {
    return expand64(p, mask, [](uint8x8_t v) { return vreinterpret_s8_u8(v); });
  }
  template <int Shift>
  static SQC_INLINE TileT expand_codes(const std::uint8_t* p, std::uint64_t mask, Table table) {
    return expand64(p, mask, [&](uint8x8_t v) {
      const uint8x8_t shifted = Shift == 0 ? v : vshr_n_u8(v, Shift == 0 ? 1 : Shift);
      return vqtbl1_s8(table.v, vand_u8(shifted, vdup_n_u8(15)));
    });
  }
};

}  // namespace neon_dotprod
}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_ARM_NEON_DOTPROD_H_
