#include "base/aligned_buffer.h"

#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sqc {
namespace {

std::align_val_t alignment_of(std::size_t size) noexcept {
  return std::align_val_t{size >= AlignedBuffer::kHugePage ? AlignedBuffer::kHugePage
                                                           : AlignedBuffer::kAlignment};
}

}  // namespace

Status AlignedBuffer::allocate(std::size_t size_bytes) noexcept {
  release();
  if (size_bytes == 0) return Status::ok();
  void* memory = ::operator new(size_bytes, alignment_of(size_bytes), std::nothrow);
  if (memory == nullptr) {
    return Status::error(StatusCode::kOutOfMemory, "cannot allocate %zu bytes", size_bytes);
  }
#if defined(__linux__)
  // Advice before the first touch: pages are handed out by the memset below. Refusal is no error.
  if (size_bytes >= kHugePage) (void)madvise(memory, size_bytes, MADV_HUGEPAGE);
#endif
  std::memset(memory, 0, size_bytes);
  data_ = static_cast<std::uint8_t*>(memory);
  size_ = size_bytes;
  return Status::ok();
}

void AlignedBuffer::release() noexcept {
  if (data_ != nullptr) ::operator delete(data_, alignment_of(size_));
  data_ = nullptr;
  size_ = 0;
}

}  // namespace sqc
