// CRC-32 as zlib, PNG and Ethernet have it: the checksum of everything in a `.sqm` file.

#ifndef SQC_BASE_CRC32_H_
#define SQC_BASE_CRC32_H_

#include <cstddef>
#include <cstdint>

namespace sqc {

// The checksum of `size` bytes that follow those whose checksum is `crc`.
std::uint32_t crc32(const void* data, std::size_t size, std::uint32_t crc = 0) noexcept;

}  // namespace sqc

#endif  // SQC_BASE_CRC32_H_
