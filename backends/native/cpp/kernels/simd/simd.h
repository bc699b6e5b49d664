// What the files in this folder have in common.
//
// Each defines one type, `Simd`: sixteen lanes of int32 (I32) and float (F32), whatever registers that
// takes, and the two dot products that the integer kernels are made of. A kernel family writes its
// algorithm once, as templates over such a type (its generic.h), and gets one translation unit per
// instruction set with that set's compile flags.
//
// Everything lies in an unnamed namespace and is inlined: were a function shared between translation
// units, the linker could keep the copy compiled for AVX-512 and call it on a CPU that lacks it. For the
// same reason nothing here or in a generic.h calls templates of the standard library.
//
// All types compute the same bits. Integer sums wrap and never saturate. Float operations are those of
// IEEE 754, fused only where fma_f says so; max_f(a, b) is `a > b ? a : b`, min_f(a, b) is
// `a < b ? a : b`, so that a NaN gives b and the sign of zero is defined.
//
// The dot products work on tiles: 16 outputs times 4 consecutive k, 64 bytes, the 4 k of an output
// together ("N16K4"). This is one AVX-512 register, two AVX2 or four NEON registers, so that one packed
// file serves all of them.
//
//   dot_us: sum over 4 k of (act_u8 - kActOffset) * weight_s8. Unsigned activations and signed weights is
//     what vpdpbusd takes. sdot takes signed ones: there kActOffset is 128.
//   dot_table: sum over 4 k of (table[code] + kTableOffset) * act_s8. The same instruction with the roles
//     exchanged, so that sums over *activations* correct for the offset; the quantizer has them.

//   load_entries(weights): 64 signed bytes as such a tile.
//   look_up<Shift>(codes, table): the tile of table entries of the four bits at Shift of 64 bytes. Of those four
//     the upper ones may be another code's: tables for codes of fewer bits repeat their entries.
//   merge<Shift, Bit>(low, high): bytes whose lowest two bits are those at Shift of `low`, and whose third is the
//     one at Bit of `high`.
//
// Planes hold one byte of each of 64 pixels, in an order of the instruction set's own (kernels/qconvsparse):
//
//   split_planes(pixels): 64 pixels of four bytes to four planes, in place.
//   join_planes<Vectors>(planes, tiles): the first Vectors x 16 pixels of any four planes as row tiles: their bytes
//     are a pixel's four k.
//
// Rows of bytes become columns, 16 at a time:
//
//   load_columns(rows, offset, v): of 16 rows the 16 bytes at `offset`: v[j] has bytes 4 j and on of each row.
//   transpose_bytes(from, from_step, to, to_step): 16 rows of 16 bytes, each a step behind the one before.
//
// Where kHasQuads, 64 channels are taken at once, with the bytes of four places together (kernels/qdepthwise).
//
// Sparse tiles are a mask of 64 bits, bit i for byte i of the tile, and the bytes whose bit is set:
//
//   expand(values, mask): a weight tile; other bytes are zero.
//   expand_codes<Shift>(values, mask, table): table entries of the nibbles at bit Shift of the values;
//     other bytes stand for zero.
// Both may read up to 64 bytes from `values`, however few the mask asks for.

#ifndef SQC_KERNELS_SIMD_SIMD_H_
#define SQC_KERNELS_SIMD_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define SQC_INLINE inline __attribute__((always_inline))
#define SQC_RESTRICT __restrict__
#else
#define SQC_INLINE inline
#define SQC_RESTRICT
#endif

#if defined(__clang__)
#define SQC_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define SQC_UNROLL _Pragma("GCC unroll 64")
#else
#define SQC_UNROLL
#endif

#endif  // SQC_KERNELS_SIMD_SIMD_H_
