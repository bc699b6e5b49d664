// Owned memory, aligned for every vector load, and on huge pages where the system grants them.

#ifndef SQC_BASE_ALIGNED_BUFFER_H_
#define SQC_BASE_ALIGNED_BUFFER_H_

#include <cstddef>
#include <cstdint>

#include "base/status.h"

namespace sqc {

class AlignedBuffer {
 public:
  static constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector
  // From here on a buffer is aligned to huge pages and asks for them: decoding streams through all
  // weights, and with 4 KiB pages it misses the TLB on each.
  static constexpr std::size_t kHugePage = std::size_t{2} << 20;

  AlignedBuffer() noexcept = default;
  ~AlignedBuffer() { release(); }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  AlignedBuffer(AlignedBuffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    if (this != &other) {
      release();
      data_ = other.data_;
      size_ = other.size_;
      other.data_ = nullptr;
      other.size_ = 0;
    }
    return *this;
  }

  // Replaces the contents by `size_bytes` zeros. On failure the buffer is empty.
  Status allocate(std::size_t size_bytes) noexcept;
  void release() noexcept;

  std::uint8_t* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace sqc

#endif  // SQC_BASE_ALIGNED_BUFFER_H_
