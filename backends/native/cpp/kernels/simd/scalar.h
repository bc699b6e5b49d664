// Plain C++: what every other instruction set is tested against. See simd.h.

#ifndef SQC_KERNELS_SIMD_SCALAR_H_
#define SQC_KERNELS_SIMD_SCALAR_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {
namespace scalar {

struct Simd {
  struct I32 {
    std::int32_t v[16];
  };
  struct F32 {
    float v[16];
  };

  // Signed overflow is undefined in C++; sums wrap as the vector instructions do.
  static SQC_INLINE std::int32_t wrap(std::uint32_t x) { return static_cast<std::int32_t>(x); }
  static SQC_INLINE std::uint32_t bits(std::int32_t x) { return static_cast<std::uint32_t>(x); }

  template <typename F>
  static SQC_INLINE I32 each_i(F f) {
    I32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }
  template <typename F>
  static SQC_INLINE F32 each_f(F f) {
    F32 r;
    for (int i = 0; i < 16; ++i) r.v[i] = f(i);
    return r;
  }

  static SQC_INLINE I32 set_i(std::int32_t x) {
    return each_i([&](int) { return x; });
  }
  static SQC_INLINE I32 load_i(const std::int32_t* p) {
    return each_i([&](int i) { return p[i]; });
  }
  static SQC_INLINE I32 load_i8(const std::int8_t* p) {
    return each_i([&](int i) { return static_cast<std::int32_t>(p[i]); });
  }
  static SQC_INLINE I32 load_u8(const std::uint8_t* p) {
    return each_i([&](int i) { return static_cast<std::int32_t>(p[i]); });
  }
  static SQC_INLINE void store_i(std::int32_t* p, I32 a) { std::memcpy(p, a.v, sizeof a.v); }
  // The low byte of each lane.
  static SQC_INLINE void store_bytes(void* p, I32 a) {
    unsigned char bytes[16];
    for (int i = 0; i < 16; ++i) bytes[i] = static_cast<unsigned char>(bits(a.v[i]));
    std::memcpy(p, bytes, sizeof bytes);
  }
  static SQC_INLINE I32 add_i(I32 a, I32 b) {
    return each_i([&](int i) { return wrap(bits(a.v[i]) + bits(b.v[i])); });
  }
  static SQC_INLINE I32 sub_i(I32 a, I32 b) {
    return each_i([&](int i) { return wrap(bits(a.v[i]) - bits(b.v[i])); });
  }
  static SQC_INLINE I32 mul_i(I32 a, I32 b) {
    return each_i([&](int i) { return wrap(bits(a.v[i]) * bits(b.v[i])); });
  }
  static SQC_INLINE I32 max_i(I32 a, I32 b) {
    return each_i([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }

  static SQC_INLINE I32 and_i(I32 a, I32 b) {
    return each_i([&](int i) { return a.v[i] & b.v[i]; });
  }
  static SQC_INLINE I32 or_i(I32 a, I32 b) {
    return each_i([&](int i) { return a.v[i] | b.v[i]; });
  }
  template <int Bits>
  static SQC_INLINE I32 shift_left(I32 a) {
    return each_i([&](int i) { return wrap(bits(a.v[i]) << Bits); });
  }
  // Copies of the sign come in.
  template <int Bits>
  static SQC_INLINE I32 shift_right(I32 a) {
    return each_i([&](int i) { return a.v[i] >> Bits; });
  }

  static SQC_INLINE F32 set_f(float x) {
    return each_f([&](int) { return x; });
  }
  static SQC_INLINE F32 load_f(const float* p) {
    return each_f([&](int i) { return p[i]; });
  }
  static SQC_INLINE void store_f(float* p, F32 a) { std::memcpy(p, a.v, sizeof a.v); }
  static SQC_INLINE float float_of(std::uint32_t word) {
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static SQC_INLINE std::uint32_t word_of(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
  }
  static SQC_INLINE float from_half(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
    std::uint32_t word;
    if (exponent == 0) {  // zero or subnormal: mantissa units of 2^-24
      const float value = static_cast<float>(mantissa) * 0x1p-24f;
      std::memcpy(&word, &value, sizeof word);
      word |= sign;
    } else if (exponent == 31) {
      word = sign | 0x7f800000u | (mantissa << 13) | (mantissa != 0 ? 0x400000u : 0u);  // NaNs turn quiet
    } else {
      word = sign | ((exponent + 112) << 23) | (mantissa << 13);
    }
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  static SQC_INLINE F32 load_half(const std::uint16_t* p) {
    return each_f([&](int i) { return from_half(p[i]); });
  }
  static SQC_INLINE F32 to_float(I32 a) {
    return each_f([&](int i) { return static_cast<float>(a.v[i]); });
  }
  static SQC_INLINE F32 load_bf16(const std::uint16_t* p) {
    return each_f([&](int i) { return float_of(static_cast<std::uint32_t>(p[i]) << 16); });
  }
  static SQC_INLINE F32 add_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] + b.v[i]; });
  }
  static SQC_INLINE F32 sub_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] - b.v[i]; });
  }
  static SQC_INLINE F32 mul_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] * b.v[i]; });
  }
  static SQC_INLINE F32 div_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] / b.v[i]; });
  }
  static SQC_INLINE F32 fma_f(F32 a, F32 b, F32 c) {
    return each_f([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
  }
  static SQC_INLINE F32 max_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static SQC_INLINE F32 min_f(F32 a, F32 b) {
    return each_f([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  // The largest lane, none of which is a NaN; of zeros of both signs either.
  static SQC_INLINE float largest_lane(F32 a) {
    float largest = a.v[0];
    for (int i = 1; i < 16; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
    return largest;
  }
  // a < b ? x : y
  static SQC_INLINE F32 select_less(F32 a, F32 b, F32 x, F32 y) {
    return each_f([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
  }
  // The same bits as the other type. Lane by lane: of whole arrays copied to the other type, gcc 12 for Arm
  // lost some lanes at -O3.
  static SQC_INLINE I32 as_int(F32 a) {
    return each_i([&](int i) { return wrap(word_of(a.v[i])); });
  }
  static SQC_INLINE F32 as_float(I32 a) {
    return each_f([&](int i) { return float_of(bits(a.v[i])); });
  }
  // To the nearest integer, halves to even. Lanes must lie within int32.
  static SQC_INLINE I32 round_i(F32 a) {
    return each_i([&](int i) { return static_cast<std::int32_t>(__builtin_nearbyintf(a.v[i])); });
  }
  // The bits without the sign: ordered as magnitudes are, and infinities and NaNs come last.
  static SQC_INLINE I32 abs_bits(F32 a) {
    return each_i([&](int i) {
      std::uint32_t word;
      std::memcpy(&word, &a.v[i], sizeof word);
      return wrap(word & 0x7fffffffu);
    });
  }

  static SQC_INLINE void prefetch(const void*) {}

  using Acc = I32;
  struct Act {
    std::int32_t v[4];
  };
  struct Tile {
    std::int8_t v[64];
  };
  static constexpr bool kHasQuads = false;
  static constexpr std::int32_t kActOffset = 0;

  static SQC_INLINE Acc zero() { return set_i(0); }
  static SQC_INLINE Acc add(Acc a, Acc b) { return add_i(a, b); }
  static SQC_INLINE I32 reduce(Acc a) { return a; }
  static SQC_INLINE Act load_act_u8(const std::uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static SQC_INLINE void store_tile(std::int8_t* p, const Tile& t) { std::memcpy(p, t.v, sizeof t.v); }
  static SQC_INLINE Tile load_tile(const std::int8_t* p) {
    Tile t;
    std::memcpy(t.v, p, sizeof t.v);
    return t;
  }
  static SQC_INLINE Acc dot(Acc acc, const Act& a, const Tile& t) {
    return each_i([&](int i) {
      const std::int8_t* w = t.v + 4 * i;
      return wrap(bits(acc.v[i]) + bits(a.v[0] * w[0] + a.v[1] * w[1] + a.v[2] * w[2] + a.v[3] * w[3]));
    });
  }
  static SQC_INLINE Acc dot_us(Acc acc, const Act& a, const Tile& t) { return dot(acc, a, t); }

  // Sixteen rows of a, 4 k each, times 4 weights of one output.
  struct RowTile {
    std::uint8_t v[64];
  };
  using Weight4 = Act;
  static SQC_INLINE RowTile load_row_tile(const std::uint8_t* p) {
    RowTile t;
    std::memcpy(t.v, p, sizeof t.v);
    return t;
  }
  static SQC_INLINE Weight4 load_weight4(const std::int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static SQC_INLINE Acc dot_row_tile(Acc acc, const RowTile& t, const Weight4& w) {
    return each_i([&](int i) {
      const std::uint8_t* a = t.v + 4 * i;
      return wrap(bits(acc.v[i]) + bits(a[0] * w.v[0] + a[1] * w.v[1] + a[2] * w.v[2] + a[3] * w.v[3]));
    });
  }
  static SQC_INLINE void split_planes(std::uint8_t* p) {
    std::uint8_t pixels[256];
    std::memcpy(pixels, p, sizeof pixels);
    for (int i = 0; i < 256; ++i) p[i % 4 * 64 + i / 4] = pixels[i];
  }
  template <int Vectors>
  static SQC_INLINE void join_planes(const std::uint8_t* const* planes, RowTile* tiles) {
    for (int i = 0; i < Vectors * 64; ++i) tiles[i / 64].v[i % 64] = planes[i % 4][i / 4];
  }
  static SQC_INLINE void transpose(I32* rows) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < i; ++j) {
        const std::int32_t x = rows[i].v[j];
        rows[i].v[j] = rows[j].v[i];
        rows[j].v[i] = x;
      }
    }
  }

  static SQC_INLINE void load_columns(const std::uint8_t* const* rows, std::int64_t offset, I32* v) {
    for (int j = 0; j < 4; ++j) {
      for (int i = 0; i < 16; ++i) std::memcpy(&v[j].v[i], rows[i] + offset + 4 * j, 4);
    }
  }
  static SQC_INLINE void transpose_bytes(const std::uint8_t* from, std::int64_t from_step, std::uint8_t* to,
                                         std::int64_t to_step) {
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 16; ++j) to[j * to_step + i] = from[i * from_step + j];
    }
  }

  using AccT = I32;
  using ActS = Act;
  using TileT = Tile;
  struct Table {
    std::int8_t v[16];
  };
  static constexpr std::int32_t kTableOffset = 0;

  static SQC_INLINE AccT zero_t() { return set_i(0); }
  static SQC_INLINE AccT add_t(AccT a, AccT b) { return add_i(a, b); }
  static SQC_INLINE I32 reduce_t(AccT a) { return a; }
  static SQC_INLINE ActS load_act_s8(const std::int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static SQC_INLINE Table load_table(const std::int8_t* p) {
    Table t;
    std::memcpy(t.v, p, sizeof t.v);
    return t;
  }
  // 64 bytes of codes hold two tiles: the low nibbles, then the high ones.
  static SQC_INLINE void unpack(const std::uint8_t* p, const Table& table, TileT& low, TileT& high) {
    for (int i = 0; i < 64; ++i) low.v[i] = table.v[p[i] & 15], high.v[i] = table.v[p[i] >> 4];
  }
  static SQC_INLINE TileT load_entries(const std::int8_t* p) { return load_tile(p); }
  struct Codes {
    std::uint8_t v[64];
  };
  static SQC_INLINE Codes load_codes(const std::uint8_t* p) {
    Codes c;
    std::memcpy(c.v, p, sizeof c.v);
    return c;
  }
  template <int Shift>
  static SQC_INLINE TileT look_up(const Codes& c, const Table& table) {
    TileT t;
    for (int i = 0; i < 64; ++i) t.v[i] = table.v[(c.v[i] >> Shift) & 15];
    return t;
  }
  template <int Shift, int Bit>
  static SQC_INLINE Codes merge(const Codes& low, const Codes& high) {
    Codes c;
    for (int i = 0; i < 64; ++i) {
      c.v[i] = static_cast<std::uint8_t>(((low.v[i] >> Shift) & 3) | ((high.v[i] >> Bit) & 1) << 2);
    }
    return c;
  }
  static SQC_INLINE void store_tile_t(std::int8_t* p, const TileT& t) { std::memcpy(p, t.v, sizeof t.v); }
  static SQC_INLINE TileT load_tile_t(const std::int8_t* p) { return load_tile(p); }
  static SQC_INLINE AccT dot_table(AccT acc, const TileT& t, const ActS& a) { return dot(acc, a, t); }

  static SQC_INLINE std::int64_t count(std::uint64_t mask) { return __builtin_popcountll(mask); }
  static SQC_INLINE Tile expand(const std::uint8_t* p, std::uint64_t mask) {
    Tile t = {};
    for (int i = 0; i < 64; ++i) {
      if ((mask >> i) & 1) t.v[i] = static_cast<std::int8_t>(*p++);
    }
    return t;
  }
  template <int Shift>
  static SQC_INLINE TileT expand_codes(const std::uint8_t* p, std::uint64_t mask, const Table& table) {
    TileT t = {};
    for (int i = 0; i < 64; ++i) {
      if ((mask >> i) & 1) t.v[i] = table.v[(*p++ >> Shift) & 15];
    }
    return t;
  }
};

}  // namespace scalar
}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_SCALAR_H_
