// AVX2 with FMA and F16C: sixteen lanes are two registers. See simd.h.
//
// vpmaddubsw adds two byte products in 16 bits and saturates: 255 * 127 * 2 does not fit. dot_us takes
// any bytes, so it widens both sides and uses vpmaddwd, which is exact. dot_table knows more: |act| is at
// most 128 and a table entry at most 127, 128 * 127 * 2 fits, so |act| * (entry with act's sign) is exact
// in vpmaddubsw, at half the instructions.

#ifndef SQC_KERNELS_SIMD_X86_AVX2_H_
#define SQC_KERNELS_SIMD_X86_AVX2_H_

#include <immintrin.h>

#include "kernels/simd/expand_table.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {
namespace avx2 {

struct Simd {
  struct I32 {
    __m256i v[2];
  };
  struct F32 {
    __m256 v[2];
  };

  static SQC_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static SQC_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static SQC_INLINE void store256(void* p, __m256i a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
  static SQC_INLINE std::int32_t load32(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }

  static SQC_INLINE I32 set_i(std::int32_t x) { return {{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}}; }
  static SQC_INLINE I32 load_i(const std::int32_t* p) { return {{load256(p), load256(p + 8)}}; }
  static SQC_INLINE I32 load_i8(const std::int8_t* p) {
    const __m128i bytes = load128(p);
    return {{_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))}};
  }
  static SQC_INLINE I32 load_u8(const std::uint8_t* p) {
    const __m128i bytes = load128(p);
    return {{_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))}};
  }
  static SQC_INLINE void store_i(std::int32_t* p, I32 a) {
    store256(p, a.v[0]);
    store256(p + 8, a.v[1]);
  }
  static SQC_INLINE void store_bytes(void* p, I32 a) {
    const __m256i low = _mm256_set1_epi32(0xff);
    // The packs work within 128-bit halves: 0-3 8-11 | 4-7 12-15, put in order by the permutation.
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a.v[0], low), _mm256_and_si256(a.v[1], low));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(static_cast<__m128i*>(p), bytes);
  }
  static SQC_INLINE I32 add_i(I32 a, I32 b) {
    return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1])}};
  }
  static SQC_INLINE I32 sub_i(I32 a, I32 b) {
    return {{_mm256_sub_epi32(a.v[0], b.v[0]), _mm256_sub_epi32(a.v[1], b.v[1])}};
  }
  static SQC_INLINE I32 mul_i(I32 a, I32 b) {
    return {{_mm256_mullo_epi32(a.v[0], b.v[0]), _mm256_mullo_epi32(a.v[1], b.v[1])}};
  }
  static SQC_INLINE I32 max_i(I32 a, I32 b) {
    return {{_mm256_max_epi32(a.v[0], b.v[0]), _mm256_max_epi32(a.v[1], b.v[1])}};
  }

  static SQC_INLINE I32 and_i(I32 a, I32 b) {
    return {{_mm256_and_si256(a.v[0], b.v[0]), _mm256_and_si256(a.v[1], b.v[1])}};
  }
  static SQC_INLINE I32 or_i(I32 a, I32 b) {
    return {{_mm256_or_si256(a.v[0], b.v[0]), _mm256_or_si256(a.v[1], b.v[1])}};
  }
  template <int Bits>
  static SQC_INLINE I32 shift_left(I32 a) {
    return {{_mm256_slli_epi32(a.v[0], Bits), _mm256_slli_epi32(a.v[1], Bits)}};
  }
  template <int Bits>
  static SQC_INLINE I32 shift_right(I32 a) {
    return {{_mm256_srai_epi32(a.v[0], Bits), _mm256_srai_epi32(a.v[1], Bits)}};
  }

  static SQC_INLINE F32 set_f(float x) { return {{_mm256_set1_ps(x), _mm256_set1_ps(x)}}; }
  static SQC_INLINE F32 load_f(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
  static SQC_INLINE void store_f(float* p, F32 a) {
    _mm256_storeu_ps(p, a.v[0]);
    _mm256_storeu_ps(p + 8, a.v[1]);
  }
  static SQC_INLINE F32 load_half(const std::uint16_t* p) {
    return {{_mm256_cvtph_ps(load128(p)), _mm256_cvtph_ps(load128(p + 8))}};
  }
  static SQC_INLINE F32 to_float(I32 a) { return {{_mm256_cvtepi32_ps(a.v[0]), _mm256_cvtepi32_ps(a.v[1])}}; }
  static SQC_INLINE __m256 from_bf16(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }
  static SQC_INLINE F32 load_bf16(const std::uint16_t* p) {
    return {{from_bf16(load128(p)), from_bf16(load128(p + 8))}};
  }
  static SQC_INLINE F32 add_f(F32 a, F32 b) {
    return {{_mm256_add_ps(a.v[0], b.v[0]), _mm256_add_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE F32 sub_f(F32 a, F32 b) {
    return {{_mm256_sub_ps(a.v[0], b.v[0]), _mm256_sub_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE F32 mul_f(F32 a, F32 b) {
    return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE F32 div_f(F32 a, F32 b) {
    return {{_mm256_div_ps(a.v[0], b.v[0]), _mm256_div_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE F32 fma_f(F32 a, F32 b, F32 c) {
    return {{_mm256_fmadd_ps(a.v[0], b.v[0], c.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], c.v[1])}};
  }
  static SQC_INLINE F32 max_f(F32 a, F32 b) {
    return {{_mm256_max_ps(a.v[0], b.v[0]), _mm256_max_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE F32 min_f(F32 a, F32 b) {
    return {{_mm256_min_ps(a.v[0], b.v[0]), _mm256_min_ps(a.v[1], b.v[1])}};
  }
  static SQC_INLINE float largest_lane(F32 a) {
    const __m256 eight = _mm256_max_ps(a.v[0], a.v[1]);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static SQC_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
    return {{_mm256_blendv_ps(y.v[0], x.v[0], _mm256_cmp_ps(a.v[0], b.v[0], _CMP_LT_OQ)),
             _mm256_blendv_ps(y.v[1], x.v[1], _mm256_cmp_ps(a.v[1], b.v[1], _CMP_LT_OQ))}};
  }
  static SQC_INLINE I32 as_int(F32 a) { return {{_mm256_castps_si256(a.v[0]), _mm256_castps_si256(a.v[1])}}; }
  static SQC_INLINE F32 as_float(I32 a) { return {{_mm256_castsi256_ps(a.v[0]), _mm256_castsi256_ps(a.v[1])}}; }
  static SQC_INLINE I32 round_i(F32 a) { return {{_mm256_cvtps_epi32(a.v[0]), _mm256_cvtps_epi32(a.v[1])}}; }
  static SQC_INLINE I32 abs_bits(F32 a) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    return {{_mm256_and_si256(_mm256_castps_si256(a.v[0]), mask), _mm256_and_si256(_mm256_castps_si256(a.v[1]), mask)}};
  }

  static SQC_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  // Register j: outputs 4j to 4j+3, two partial sums each.
  struct Acc {
    __m256i v[4];
  };
  struct Act {
    __m256i v;
  };
  struct Tile {
    __m256i v[4];
  };
  static constexpr bool kHasQuads = false;
  static constexpr std::int32_t kActOffset = 0;

  static SQC_INLINE Acc zero() {
    const __m256i z = _mm256_setzero_si256();
    return {{z, z, z, z}};
  }
  static SQC_INLINE Acc add(Acc a, Acc b) {
    return {{_mm256_add_epi32(a.v[0], b.v[0]), _mm256_add_epi32(a.v[1], b.v[1]), _mm256_add_epi32(a.v[2], b.v[2]),
             _mm256_add_epi32(a.v[3], b.v[3])}};
  }
  static SQC_INLINE I32 reduce(Acc a) {
    // vphaddd works within 128-bit halves: outputs 0 1 4 5 | 2 3 6 7.
    return {{_mm256_permute4x64_epi64(_mm256_hadd_epi32(a.v[0], a.v[1]), 0xd8),
             _mm256_permute4x64_epi64(_mm256_hadd_epi32(a.v[2], a.v[3]), 0xd8)}};
  }
  static SQC_INLINE Act load_act_u8(const std::uint8_t* p) {
    return {_mm256_cvtepu8_epi16(_mm_set1_epi32(load32(p)))};
  }
  static SQC_INLINE void store_tile(std::int8_t* p, const Tile& t) {
    // vpacksswb works within 128-bit halves; the permutation puts the quarters in order.
    SQC_UNROLL for (int i = 0; i < 2; ++i) {
      store256(p + 32 * i, _mm256_permute4x64_epi64(_mm256_packs_epi16(t.v[2 * i], t.v[2 * i + 1]), 0xd8));
    }
  }
  static SQC_INLINE Tile load_tile(const std::int8_t* p) {
    return {{_mm256_cvtepi8_epi16(load128(p)), _mm256_cvtepi8_epi16(load128(p + 16)),
             _mm256_cvtepi8_epi16(load128(p + 32)), _mm256_cvtepi8_epi16(load128(p + 48))}};
  }
  static SQC_INLINE Acc dot_us(Acc acc, Act a, const Tile& t) {
    return {{_mm256_add_epi32(acc.v[0], _mm256_madd_epi16(t.v[0], a.v)),
             _mm256_add_epi32(acc.v[1], _mm256_madd_epi16(t.v[1], a.v)),
             _mm256_add_epi32(acc.v[2], _mm256_madd_epi16(t.v[2], a.v)),
             _mm256_add_epi32(acc.v[3], _mm256_madd_epi16(t.v[3], a.v))}};
  }

  // Sixteen rows of a, 4 k each, times 4 weights of one output.
  using RowTile = Tile;
  using Weight4 = Act;
  static SQC_INLINE RowTile load_row_tile(const std::uint8_t* p) {
    return {{_mm256_cvtepu8_epi16(load128(p)), _mm256_cvtepu8_epi16(load128(p + 16)),
             _mm256_cvtepu8_epi16(load128(p + 32)), _mm256_cvtepu8_epi16(load128(p + 48))}};
  }
  static SQC_INLINE Weight4 load_weight4(const std::int8_t* p) {
    return {_mm256_cvtepi8_epi16(_mm_set1_epi32(load32(p)))};
  }
  static SQC_INLINE Acc dot_row_tile(Acc acc, const RowTile& t, Weight4 w) { return dot_us(acc, w, t); }
  static SQC_INLINE void split_planes(std::uint8_t* p) {
    const __m128i by_channel = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m128i t[16];
    SQC_UNROLL for (int i = 0; i < 16; ++i) t[i] = _mm_shuffle_epi8(load128(p + 16 * i), by_channel);
    SQC_UNROLL for (int i = 0; i < 4; ++i) {
      const __m128i low01 = _mm_unpacklo_epi32(t[4 * i], t[4 * i + 1]), high01 = _mm_unpackhi_epi32(t[4 * i], t[4 * i + 1]);
      const __m128i low23 = _mm_unpacklo_epi32(t[4 * i + 2], t[4 * i + 3]), high23 = _mm_unpackhi_epi32(t[4 * i + 2], t[4 * i + 3]);
      const __m128i planes[4] = {_mm_unpacklo_epi64(low01, low23), _mm_unpackhi_epi64(low01, low23),
                                 _mm_unpacklo_epi64(high01, high23), _mm_unpackhi_epi64(high01, high23)};
      SQC_UNROLL for (int c = 0; c < 4; ++c) _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 64 * c + 16 * i), planes[c]);
    }
  }
  template <int Vectors>
  static SQC_INLINE void join_planes(const std::uint8_t* const* planes, RowTile* tiles) {
    SQC_UNROLL for (int i = 0; i < Vectors; ++i) {
      const __m128i a = load128(planes[0] + 16 * i), b = load128(planes[1] + 16 * i);
      const __m128i c = load128(planes[2] + 16 * i), d = load128(planes[3] + 16 * i);
      const __m128i low01 = _mm_unpacklo_epi8(a, b), high01 = _mm_unpackhi_epi8(a, b);
      const __m128i low23 = _mm_unpacklo_epi8(c, d), high23 = _mm_unpackhi_epi8(c, d);
      tiles[i] = {{_mm256_cvtepu8_epi16(_mm_unpacklo_epi16(low01, low23)), _mm256_cvtepu8_epi16(_mm_unpackhi_epi16(low01, low23)),
                   _mm256_cvtepu8_epi16(_mm_unpacklo_epi16(high01, high23)),
                   _mm256_cvtepu8_epi16(_mm_unpackhi_epi16(high01, high23))}};
    }
  }
  // By way of memory: a product ends with one of these for 256 sums, each a sum over all of k.
  static SQC_INLINE void transpose(I32* rows) {
    std::int32_t from[16][16], to[16][16];
    for (int i = 0; i < 16; ++i) store_i(from[i], rows[i]);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[j][i] = from[i][j];
    }
    for (int i = 0; i < 16; ++i) rows[i] = load_i(to[i]);
  }

  static SQC_INLINE void load_columns(const std::uint8_t* const* rows, std::int64_t offset, I32* v) {
    SQC_UNROLL for (int half = 0; half < 2; ++half, rows += 8) {
      __m256i r[4];
      SQC_UNROLL for (int i = 0; i < 4; ++i) {
        r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load128(rows[i] + offset)), load128(rows[4 + i] + offset), 1);
      }
      const __m256i low01 = _mm256_unpacklo_epi32(r[0], r[1]), high01 = _mm256_unpackhi_epi32(r[0], r[1]);
      const __m256i low23 = _mm256_unpacklo_epi32(r[2], r[3]), high23 = _mm256_unpackhi_epi32(r[2], r[3]);
      v[0].v[half] = _mm256_unpacklo_epi64(low01, low23);
      v[1].v[half] = _mm256_unpackhi_epi64(low01, low23);
      v[2].v[half] = _mm256_unpacklo_epi64(high01, high23);
      v[3].v[half] = _mm256_unpackhi_epi64(high01, high23);
    }
  }
  // Rows i and i + 8 byte by byte, four times over.
  static SQC_INLINE void transpose_bytes(const std::uint8_t* from, std::int64_t from_step, std::uint8_t* to,
                                         std::int64_t to_step) {
    __m128i a[16], b[16];
    SQC_UNROLL for (int i = 0; i < 16; ++i) a[i] = load128(from + i * from_step);
    SQC_UNROLL for (int pass = 0; pass < 4; ++pass) {
      SQC_UNROLL for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
        b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
      }
      SQC_UNROLL for (int i = 0; i < 16; ++i) a[i] = b[i];
    }
    SQC_UNROLL for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_step), a[i]);
  }

  using AccT = I32;
  struct ActS {
    __m256i value, magnitude;
  };
  struct TileT {
    __m256i v[2];
  };
  struct Table {
    __m256i v;
  };
  static constexpr std::int32_t kTableOffset = 0;

  static SQC_INLINE AccT zero_t() { return set_i(0); }
  static SQC_INLINE AccT add_t(AccT a, AccT b) { return add_i(a, b); }
  static SQC_INLINE I32 reduce_t(AccT a) { return a; }
  static SQC_INLINE ActS load_act_s8(const std::int8_t* p) {
    const __m256i a = _mm256_set1_epi32(load32(p));
    return {a, _mm256_abs_epi8(a)};
  }
  static SQC_INLINE Table load_table(const std::int8_t* p) { return {_mm256_broadcastsi128_si256(load128(p))}; }
  static SQC_INLINE void unpack(const std::uint8_t* p, Table table, TileT& low, TileT& high) {
    const __m256i nibble = _mm256_set1_epi8(15);
    SQC_UNROLL for (int i = 0; i < 2; ++i) {
      const __m256i codes = load256(p + 32 * i);
      low.v[i] = _mm256_shuffle_epi8(table.v, _mm256_and_si256(codes, nibble));
      high.v[i] = _mm256_shuffle_epi8(table.v, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
    }
  }
  static SQC_INLINE TileT load_entries(const std::int8_t* p) { return {{load256(p), load256(p + 32)}}; }
  using Codes = TileT;
  static SQC_INLINE Codes load_codes(const std::uint8_t* p) { return {{load256(p), load256(p + 32)}}; }
  // Shifts are of 16 bits at a time: what a byte gets from its neighbour lies above its own bits.
  template <int Shift>
  static SQC_INLINE TileT look_up(Codes c, Table table) {
    const __m256i nibble = _mm256_set1_epi8(15);
    return {{_mm256_shuffle_epi8(table.v, _mm256_and_si256(_mm256_srli_epi16(c.v[0], Shift), nibble)),
             _mm256_shuffle_epi8(table.v, _mm256_and_si256(_mm256_srli_epi16(c.v[1], Shift), nibble))}};
  }
  template <int Shift, int Bit>
  static SQC_INLINE Codes merge(Codes low, Codes high) {
    const __m256i third = _mm256_set1_epi8(4);
    Codes c;
    SQC_UNROLL for (int i = 0; i < 2; ++i) {
      const __m256i upper = Bit < 2 ? _mm256_slli_epi16(high.v[i], Bit < 2 ? 2 - Bit : 0)
                                    : _mm256_srli_epi16(high.v[i], Bit < 2 ? 0 : Bit - 2);
      c.v[i] = _mm256_or_si256(_mm256_and_si256(third, upper),
                               _mm256_andnot_si256(third, _mm256_srli_epi16(low.v[i], Shift)));
    }
    return c;
  }
  static SQC_INLINE void store_tile_t(std::int8_t* p, TileT t) {
    store256(p, t.v[0]);
    store256(p + 32, t.v[1]);
  }
  static SQC_INLINE TileT load_tile_t(const std::int8_t* p) { return {{load256(p), load256(p + 32)}}; }
  static SQC_INLINE AccT dot_table(AccT acc, TileT t, ActS a) {
    const __m256i ones = _mm256_set1_epi16(1);
    SQC_UNROLL for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(t.v[i], a.value));
      acc.v[i] = _mm256_add_epi32(acc.v[i], _mm256_madd_epi16(pairs, ones));
    }
    return acc;
  }

  static SQC_INLINE std::int64_t count(std::uint64_t mask) { return __builtin_popcountll(mask); }
  // Eight bytes at a time: a byte of the mask selects one of 256 shuffles. `map` turns stored bytes into
  // weights; it comes before the shuffle, which fills with zeros.
  template <typename Map>
  static SQC_INLINE __m128i expand16(const std::uint8_t* p, std::uint64_t mask, std::uint64_t before, int half, Map map) {
    const auto offset = [&](int byte) { return byte == 0 ? 0 : (before >> (8 * byte - 8)) & 0xff; };
    const auto eight = [&](int byte) {
      const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + offset(byte)));
      const std::uint8_t* shuffle = kExpandTable.shuffle[(mask >> (8 * byte)) & 0xff];
      return _mm_shuffle_epi8(map(stored), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(shuffle)));
    };
    return _mm_unpacklo_epi64(eight(2 * half), eight(2 * half + 1));
  }
  static SQC_INLINE Tile expand(const std::uint8_t* p, std::uint64_t mask) {
    const std::uint64_t before = counts_up_to_each_byte(mask);
    const auto same = [](__m128i v) { return v; };
    return {{_mm256_cvtepi8_epi16(expand16(p, mask, before, 0, same)), _mm256_cvtepi8_epi16(expand16(p, mask, before, 1, same)),
             _mm256_cvtepi8_epi16(expand16(p, mask, before, 2, same)),
             _mm256_cvtepi8_epi16(expand16(p, mask, before, 3, same))}};
  }
  template <int Shift>
  static SQC_INLINE TileT expand_codes(const std::uint8_t* p, std::uint64_t mask, Table table) {
    const std::uint64_t before = counts_up_to_each_byte(mask);
    const __m128i entries = _mm256_castsi256_si128(table.v);
    const auto look_up = [&](__m128i v) {
      return _mm_shuffle_epi8(entries, _mm_and_si128(_mm_srli_epi16(v, Shift), _mm_set1_epi8(15)));
    };
    return {{_mm256_set_m128i(expand16(p, mask, before, 1, look_up), expand16(p, mask, before, 0, look_up)),
             _mm256_set_m128i(expand16(p, mask, before, 3, look_up), expand16(p, mask, before, 2, look_up))}};
  }
};

}  // namespace avx2
}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_X86_AVX2_H_
