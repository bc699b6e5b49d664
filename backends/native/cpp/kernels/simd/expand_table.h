// For instruction sets without vpexpandb: how to spread stored bytes over eight places.

#ifndef SQC_KERNELS_SIMD_EXPAND_TABLE_H_
#define SQC_KERNELS_SIMD_EXPAND_TABLE_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {

struct ExpandTable {
  // shuffle[mask][i]: which stored byte goes to place i; 0x80, "zero" to both pshufb and tbl, if bit i is
  // clear. 2 KiB, so that it stays in the L1 cache.
  alignas(64) std::uint8_t shuffle[256][8];
};

constexpr ExpandTable make_expand_table() {
  ExpandTable table = {};
  for (int mask = 0; mask < 256; ++mask) {
    std::uint8_t next = 0;
    for (int i = 0; i < 8; ++i) {
      table.shuffle[mask][i] = 0x80;
      if ((mask >> i) & 1) table.shuffle[mask][i] = next++;
    }
  }
  return table;
}

constexpr ExpandTable kExpandTable = make_expand_table();

// Byte i: how many of the bits 0 to 8 i + 7 are set.
SQC_INLINE std::uint64_t counts_up_to_each_byte(std::uint64_t mask) {
  std::uint64_t c = mask - ((mask >> 1) & 0x5555555555555555u);
  c = (c & 0x3333333333333333u) + ((c >> 2) & 0x3333333333333333u);
  c = (c + (c >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return c * 0x0101010101010101u;
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_SIMD_EXPAND_TABLE_H_
