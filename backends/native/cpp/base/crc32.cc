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
    unsigned char step[16];
    std::memcpy(step, bytes, 16);
    for (int i = 0; i < 4; ++i) step[i] = static_cast<unsigned char>(step[i] ^ (rest >> (8 * i)));
    rest = 0;
    for (int i = 0; i < 16; ++i) rest ^= kTables.value[15 - i][step[i]];
  }
  for (; size > 0; --size, ++bytes) rest = (rest >> 8) ^ kTables.value[0][(rest ^ *bytes) & 0xff];
  return ~rest;
}

}  // namespace sqc
