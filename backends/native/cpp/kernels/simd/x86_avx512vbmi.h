// AVX-512 with VNNI, VBMI and VBMI2. See simd.h.

#ifndef SQC_KERNELS_SIMD_X86_AVX512VBMI_H_
#define SQC_KERNELS_SIMD_X86_AVX512VBMI_H_

#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {
namespace {
namespace avx512vbmi {

struct Simd : avx512vnni::Simd {
  // vpermb looks at six bits of an index. The table stands in the register four times, so two of them do
  // not matter, and neither nibble needs a mask: the low one carries bits of the high one, the shifted
  // high one bits of its neighbour. 5 instructions for 128 weights instead of 7.
  static SQC_INLINE void unpack(const std::uint8_t* p, Table table, TileT& low, TileT& high) {
    const __m512i codes = _mm512_loadu_si512(p);
    low = _mm512_permutexvar_epi8(codes, table);
    high = _mm512_permutexvar_epi8(_mm512_srli_epi16(codes, 4), table);
  }

  template <int Shift>
  static SQC_INLINE TileT look_up(Codes c, Table table) {
    return _mm512_permutexvar_epi8(_mm512_srli_epi16(c, Shift), table);
  }

  // vpexpandb from a register: from memory, zero-masked, or merged into a zero that the compiler cannot
  // see through (some Zen cores were reported to wait for the old value of a zero-masked result) measured
  // the same within 3 % on Zen 4 with gcc 12, about 3.5 cycles a tile with the load and the product.
  static SQC_INLINE std::int64_t count(std::uint64_t mask) { return _mm_popcnt_u64(mask); }
  static SQC_INLINE Tile expand(const std::uint8_t* p, std::uint64_t mask) {
    return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(p));
  }
  template <int Shift>
  static SQC_INLINE TileT expand_codes(const std::uint8_t* p, std::uint64_t mask, Table table) {
    const __m512i stored = _mm512_loadu_si512(p);
    const __m512i entries = _mm512_permutexvar_epi8(Shift == 0 ? stored : _mm512_srli_epi16(stored, Shift), table);
    return _mm512_mask_expand_epi8(_mm512_set1_epi8(-128), mask, entries);  // 128 is zero with the offset
  }
};

}  // namespace avx512vbmi
}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_X86_AVX512VBMI_H_
