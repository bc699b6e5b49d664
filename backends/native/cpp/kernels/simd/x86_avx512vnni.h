// AVX-512 with VNNI: sixteen lanes are one register, and vpdpbusd is the dot product. See simd.h.
//
// vpdpbusd and not vpdpbusds: the latter saturates, and then the order of the sums would matter.

#ifndef SQC_KERNELS_SIMD_X86_AVX512VNNI_H_
#define SQC_KERNELS_SIMD_X86_AVX512VNNI_H_

// gcc 12 takes the undefined lanes of its own _mm512_undefined_* for uninitialised variables.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include "kernels/simd/simd.h"

namespace sqc {
namespace {
namespace avx512vnni {

struct Simd {
  using I32 = __m512i;
  using F32 = __m512;

  static SQC_INLINE std::int32_t load32(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

  static SQC_INLINE I32 set_i(std::int32_t x) { return _mm512_set1_epi32(x); }
  static SQC_INLINE I32 load_i(const std::int32_t* p) { return _mm512_loadu_si512(p); }
  static SQC_INLINE I32 load_i8(const std::int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SQC_INLINE I32 load_u8(const std::uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static SQC_INLINE void store_i(std::int32_t* p, I32 a) { _mm512_storeu_si512(p, a); }
  static SQC_INLINE void store_bytes(void* p, I32 a) {
    _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static SQC_INLINE I32 add_i(I32 a, I32 b) { return _mm512_add_epi32(a, b); }
  static SQC_INLINE I32 sub_i(I32 a, I32 b) { return _mm512_sub_epi32(a, b); }
  static SQC_INLINE I32 mul_i(I32 a, I32 b) { return _mm512_mullo_epi32(a, b); }
  static SQC_INLINE I32 max_i(I32 a, I32 b) { return _mm512_max_epi32(a, b); }

  static SQC_INLINE I32 and_i(I32 a, I32 b) { return _mm512_and_si512(a, b); }
  static SQC_INLINE I32 or_i(I32 a, I32 b) { return _mm512_or_si512(a, b); }
  template <int Bits>
  static SQC_INLINE I32 shift_left(I32 a) {
    return _mm512_slli_epi32(a, Bits);
  }
  template <int Bits>
  static SQC_INLINE I32 shift_right(I32 a) {
    return _mm512_srai_epi32(a, Bits);
  }

  static SQC_INLINE F32 set_f(float x) { return _mm512_set1_ps(x); }
  static SQC_INLINE F32 load_f(const float* p) { return _mm512_loadu_ps(p); }
  static SQC_INLINE void store_f(float* p, F32 a) { _mm512_storeu_ps(p, a); }
  static SQC_INLINE F32 load_half(const std::uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static SQC_INLINE F32 to_float(I32 a) { return _mm512_cvtepi32_ps(a); }
  static SQC_INLINE F32 load_bf16(const std::uint16_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static SQC_INLINE F32 add_f(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  static SQC_INLINE F32 sub_f(F32 a, F32 b) { return _mm512_sub_ps(a, b); }
  static SQC_INLINE F32 mul_f(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  static SQC_INLINE F32 div_f(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  static SQC_INLINE F32 fma_f(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
  static SQC_INLINE F32 max_f(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  static SQC_INLINE F32 min_f(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  static SQC_INLINE float largest_lane(F32 a) { return _mm512_reduce_max_ps(a); }
  static SQC_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
  }
  static SQC_INLINE I32 as_int(F32 a) { return _mm512_castps_si512(a); }
  static SQC_INLINE F32 as_float(I32 a) { return _mm512_castsi512_ps(a); }
  static SQC_INLINE I32 round_i(F32 a) { return _mm512_cvtps_epi32(a); }
  static SQC_INLINE I32 abs_bits(F32 a) {
    return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff));
  }

  static SQC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  using Acc = __m512i;
  using Act = __m512i;
  using Tile = __m512i;
  static constexpr std::int32_t kActOffset = 0;

  static SQC_INLINE Acc zero() { return _mm512_setzero_si512(); }
  static SQC_INLINE Acc add(Acc a, Acc b) { return _mm512_add_epi32(a, b); }
  static SQC_INLINE I32 reduce(Acc a) { return a; }
  static SQC_INLINE Act load_act_u8(const std::uint8_t* p) { return _mm512_set1_epi32(load32(p)); }
  static SQC_INLINE void store_tile(std::int8_t* p, Tile t) { _mm512_storeu_si512(p, t); }
  static SQC_INLINE Tile load_tile(const std::int8_t* p) { return _mm512_loadu_si512(p); }
  static SQC_INLINE Acc dot_us(Acc acc, Act a, Tile t) { return _mm512_dpbusd_epi32(acc, a, t); }

  // Sixteen rows of a, 4 k each, times 4 weights of one output.
  using RowTile = __m512i;
  using Weight4 = __m512i;
  static SQC_INLINE RowTile load_row_tile(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  static SQC_INLINE Weight4 load_weight4(const std::int8_t* p) { return _mm512_set1_epi32(load32(p)); }
  static SQC_INLINE Acc dot_row_tile(Acc acc, RowTile t, Weight4 w) { return _mm512_dpbusd_epi32(acc, t, w); }
  // Quarter q of a plane holds of each sixteen pixels the four from 4 q on, so that four planes become row tiles by
  // shuffles within quarters.
  static SQC_INLINE void split_planes(std::uint8_t* p) {
    const __m512i by_channel = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i t[4];
    SQC_UNROLL for (int i = 0; i < 4; ++i) t[i] = _mm512_shuffle_epi8(_mm512_loadu_si512(p + 64 * i), by_channel);
    const __m512i low01 = _mm512_unpacklo_epi32(t[0], t[1]), high01 = _mm512_unpackhi_epi32(t[0], t[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(t[2], t[3]), high23 = _mm512_unpackhi_epi32(t[2], t[3]);
    _mm512_storeu_si512(p, _mm512_unpacklo_epi64(low01, low23));
    _mm512_storeu_si512(p + 64, _mm512_unpackhi_epi64(low01, low23));
    _mm512_storeu_si512(p + 128, _mm512_unpacklo_epi64(high01, high23));
    _mm512_storeu_si512(p + 192, _mm512_unpackhi_epi64(high01, high23));
  }
  template <int Vectors>
  static SQC_INLINE void join_planes(const std::uint8_t* const* planes, RowTile* tiles) {
    __m512i a[4];
    SQC_UNROLL for (int i = 0; i < 4; ++i) a[i] = _mm512_loadu_si512(planes[i]);
    const __m512i low01 = _mm512_unpacklo_epi8(a[0], a[1]), low23 = _mm512_unpacklo_epi8(a[2], a[3]);
    tiles[0] = _mm512_unpacklo_epi16(low01, low23);
    if constexpr (Vectors > 1) tiles[1] = _mm512_unpackhi_epi16(low01, low23);
    if constexpr (Vectors > 2) {
      const __m512i high01 = _mm512_unpackhi_epi8(a[0], a[1]), high23 = _mm512_unpackhi_epi8(a[2], a[3]);
      tiles[2] = _mm512_unpacklo_epi16(high01, high23);
      if constexpr (Vectors > 3) tiles[3] = _mm512_unpackhi_epi16(high01, high23);
    }
  }
  // 16 x 16: within quarters of the registers, then the quarters.
  static SQC_INLINE void transpose(I32* rows) {
    I32 pairs[16], quads[16], halves[16];
    SQC_UNROLL for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    SQC_UNROLL for (int i = 0; i < 16; i += 4) {
      quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
      quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
      quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
      quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    SQC_UNROLL for (int i = 0; i < 4; ++i) {
      halves[i] = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0x88);
      halves[4 + i] = _mm512_shuffle_i32x4(quads[i], quads[4 + i], 0xdd);
      halves[8 + i] = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0x88);
      halves[12 + i] = _mm512_shuffle_i32x4(quads[8 + i], quads[12 + i], 0xdd);
    }
    SQC_UNROLL for (int i = 0; i < 8; ++i) {
      rows[i] = _mm512_shuffle_i32x4(halves[i], halves[8 + i], 0x88);
      rows[8 + i] = _mm512_shuffle_i32x4(halves[i], halves[8 + i], 0xdd);
    }
  }

  static SQC_INLINE __m128i load_16(const std::uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  // Sixteen bytes in each quarter.
  static SQC_INLINE __m512i load_quarters(const std::uint8_t* a, const std::uint8_t* b, const std::uint8_t* c,
                                          const std::uint8_t* d) {
    __m512i v = _mm512_castsi128_si512(load_16(a));
    v = _mm512_inserti32x4(v, load_16(b), 1);
    v = _mm512_inserti32x4(v, load_16(c), 2);
    return _mm512_inserti32x4(v, load_16(d), 3);
  }
  static SQC_INLINE void load_columns(const std::uint8_t* const* rows, std::int64_t offset, I32* v) {
    __m512i r[4];
    SQC_UNROLL for (int i = 0; i < 4; ++i) {
      r[i] = load_quarters(rows[i] + offset, rows[4 + i] + offset, rows[8 + i] + offset, rows[12 + i] + offset);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(r[0], r[1]), high01 = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(r[2], r[3]), high23 = _mm512_unpackhi_epi32(r[2], r[3]);
    v[0] = _mm512_unpacklo_epi64(low01, low23);
    v[1] = _mm512_unpackhi_epi64(low01, low23);
    v[2] = _mm512_unpacklo_epi64(high01, high23);
    v[3] = _mm512_unpackhi_epi64(high01, high23);
  }
  // Four rows together in each quarter, and then the quarters' 32 bits.
  static SQC_INLINE void transpose_bytes(const std::uint8_t* from, std::int64_t from_step, std::uint8_t* to,
                                         std::int64_t to_step) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m512i r[4];
    SQC_UNROLL for (int i = 0; i < 4; ++i) {
      const std::uint8_t* row = from + i * from_step;
      r[i] = load_quarters(row, row + 4 * from_step, row + 8 * from_step, row + 12 * from_step);
    }
    const __m512i low01 = _mm512_unpacklo_epi8(r[0], r[1]), high01 = _mm512_unpackhi_epi8(r[0], r[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(r[2], r[3]), high23 = _mm512_unpackhi_epi8(r[2], r[3]);
    const __m512i columns[4] = {_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
                                _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    SQC_UNROLL for (int j = 0; j < 4; ++j, to += 4 * to_step) {
      const __m512i v = _mm512_permutexvar_epi32(order, columns[j]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(v));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + to_step), _mm512_extracti32x4_epi32(v, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * to_step), _mm512_extracti32x4_epi32(v, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 3 * to_step), _mm512_extracti32x4_epi32(v, 3));
    }
  }

  // Bytes of 64 channels at four places, and sums of their products; see qdepthwise.
  static constexpr bool kHasQuads = true;
  using Bytes = __m512i;
  struct Quad {
    __m512i v[4];
  };
  using QuadSums = Quad;
  static SQC_INLINE Bytes no_bytes() { return _mm512_setzero_si512(); }
  static SQC_INLINE Bytes load_bytes(const void* p, std::int64_t count) {
    return count >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8((std::uint64_t{1} << count) - 1, p);
  }
  static SQC_INLINE QuadSums no_sums() {
    const __m512i z = _mm512_setzero_si512();
    return {{z, z, z, z}};
  }
  // Within quarters of the registers: quarter q of v[j] has channels 16 q + 4 j and on.
  static SQC_INLINE Quad interleave(const Bytes* a) {
    const __m512i low01 = _mm512_unpacklo_epi8(a[0], a[1]), high01 = _mm512_unpackhi_epi8(a[0], a[1]);
    const __m512i low23 = _mm512_unpacklo_epi8(a[2], a[3]), high23 = _mm512_unpackhi_epi8(a[2], a[3]);
    return {{_mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
             _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)}};
  }
  static SQC_INLINE void add_products(QuadSums& sums, const Quad& a, const Quad& w) {
    SQC_UNROLL for (int j = 0; j < 4; ++j) sums.v[j] = _mm512_dpbusd_epi32(sums.v[j], a.v[j], w.v[j]);
  }
  // Puts the channels in order: v[q] has channels 16 q and on.
  static SQC_INLINE void order(QuadSums& s) {
    const __m512i a = _mm512_shuffle_i32x4(s.v[0], s.v[1], 0x44), b = _mm512_shuffle_i32x4(s.v[0], s.v[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(s.v[2], s.v[3], 0x44), d = _mm512_shuffle_i32x4(s.v[2], s.v[3], 0xee);
    s.v[0] = _mm512_shuffle_i32x4(a, c, 0x88);
    s.v[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    s.v[2] = _mm512_shuffle_i32x4(b, d, 0x88);
    s.v[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }

  using AccT = __m512i;
  using ActS = __m512i;
  using TileT = __m512i;
  using Table = __m512i;
  static constexpr std::int32_t kTableOffset = 128;  // entries become the unsigned side

  static SQC_INLINE AccT zero_t() { return _mm512_setzero_si512(); }
  static SQC_INLINE AccT add_t(AccT a, AccT b) { return _mm512_add_epi32(a, b); }
  static SQC_INLINE I32 reduce_t(AccT a) { return a; }
  static SQC_INLINE ActS load_act_s8(const std::int8_t* p) { return _mm512_set1_epi32(load32(p)); }
  static SQC_INLINE Table load_table(const std::int8_t* p) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_broadcast_i32x4(_mm_xor_si128(entries, _mm_set1_epi8(-128)));
  }
  static SQC_INLINE void unpack(const std::uint8_t* p, Table table, TileT& low, TileT& high) {
    const __m512i codes = _mm512_loadu_si512(p), nibble = _mm512_set1_epi8(15);
    low = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, nibble));
    high = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(codes, 4), nibble));
  }
  static SQC_INLINE TileT load_entries(const std::int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi8(-128));
  }
  using Codes = __m512i;
  static SQC_INLINE Codes load_codes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
  // Shifts are of 16 bits at a time: what a byte gets from its neighbour lies above its own bits.
  template <int Shift>
  static SQC_INLINE TileT look_up(Codes c, Table table) {
    return _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(c, Shift), _mm512_set1_epi8(15)));
  }
  template <int Shift, int Bit>
  static SQC_INLINE Codes merge(Codes low, Codes high) {
    const __m512i upper = Bit < 2 ? _mm512_slli_epi16(high, Bit < 2 ? 2 - Bit : 0) : _mm512_srli_epi16(high, Bit < 2 ? 0 : Bit - 2);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(4), upper, _mm512_srli_epi16(low, Shift), 0xca);
  }
  static SQC_INLINE void store_tile_t(std::int8_t* p, TileT t) { _mm512_storeu_si512(p, t); }
  static SQC_INLINE TileT load_tile_t(const std::int8_t* p) { return _mm512_loadu_si512(p); }
  static SQC_INLINE AccT dot_table(AccT acc, TileT t, ActS a) { return _mm512_dpbusd_epi32(acc, t, a); }
};

}  // namespace avx512vnni
}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_X86_AVX512VNNI_H_
