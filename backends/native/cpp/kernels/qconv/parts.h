// 8-bit convolutions by weights of which parts are stored, four weights each: what the families for different parts
// (kernels/qconvblock, kernels/qconvsparse) have in common. The math is qconv.h's, for one group.
//
// Inputs at all taps are counted in units: of four inputs, or of one, as the family's parts take them. Units are cut into
// chunks, so that what a tile of pixels sees of a chunk stays in the L1 cache. For each chunk, for each output, its parts
// follow each other: which unit of the chunk (a byte), or which four of them, and four weights.

#ifndef SQC_KERNELS_QCONV_PARTS_H_
#define SQC_KERNELS_QCONV_PARTS_H_

#include "kernels/qconv/qconv.h"

namespace sqc {

constexpr std::int64_t kQconvPartPixels = kQconvRows;   // of a tile: pointers are looked up for all at once
constexpr std::int64_t kQconvPartStripPanels = 16;      // whose sums are kept: 64 KiB
constexpr std::int64_t kQconvPartMaxChunk = 256;

struct QconvParts {
  QconvParams dense;           // everything but weights, which are ignored; one group
  std::int64_t chunk;          // units, 1 to 256
  const std::uint8_t* index;   // [parts], or [parts][4]
  const std::int8_t* values;   // [parts][4]
  const std::uint64_t* start;  // [chunks][outputs in sixteens], and the number of parts
};

// Bytes of scratch that a thread needs: sums of a strip, units of a tile, zeros, pointers.
std::int64_t qconv_parts_scratch_bytes(const QconvParams& dense) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_PARTS_H_
