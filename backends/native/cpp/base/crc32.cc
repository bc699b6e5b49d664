#include "base/crc32.h"

#include <cstring>

namespace sqc {
namespace {

// tables[i][b]: what byte b contributes when i more bytes follow it in the same step ("slicing by 16").
struct Tables {
  std::uint32_t value[16][256];
};

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ ((rest & 1) != 0 ? 0xedb88320u : 0u);
    tables.value[0][byte] = rest;
  }
  for (int i = 1; i < 16; ++i) {
    for (std::uint32_t byte = 0; byte < 256; ++byte) {
      const std::uint32_t before = tables.value[i - 1][byte];
      tables.value[i][byte] = (before >> 8) ^ tables.value[0][before & 0xff];
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

}  // namespace

std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t crc) noexcept {
  const auto* bytes = static_cast<const unsigned char*>(data);
  std::uint32_t rest = ~crc;
  for (; size >= 16; size -= 16, bytes += 16) {
    std::uint32_t word[4];
    std::memcpy(word, bytes, 16);
    word[0] ^= rest;
    rest = 0;
    for (int i = 0; i < 4; ++i) {
      rest ^= kTables.value[15 - 4 * i][word[i] & 0xff] ^ kTables.value[14 - 4 * i][word[i] >> 8 & 0xff] ^
              kTables.value[13 - 4 * i][word[i] >> 16 & 0xff] ^ kTables.value[12 - 4 * i][word[i] >> 24];
    }
  }
  for (; size > 0; --size, ++bytes) rest = (rest >> 8) ^ kTables.value[0][(rest ^ *bytes) & 0xff];
  return ~rest;
}

}  // namespace sqc
