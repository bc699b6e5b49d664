// Tensors as operators see them: typed, strided, up to eight dimensions, memory owned by someone else.

#ifndef SQC_ENGINE_TENSOR_H_
#define SQC_ENGINE_TENSOR_H_

#include <cstdint>

#include "engine/format.h"

namespace sqc {

constexpr int kMaxRank = format::kMaxRank;

// Element types, with the numbers they have in files: (name, number, bytes).
#define SQC_DTYPES(X) \
  X(f32, 0, 4) X(i64, 1, 8) X(i32, 2, 4) X(i8, 3, 1) X(u8, 4, 1) X(boolean, 5, 1) X(f16, 6, 2) X(u64, 7, 8) \
  X(bf16, 8, 2)

enum class DType : std::uint8_t {
#define SQC_DECLARE_DTYPE(name, number, bytes) name = number,
  SQC_DTYPES(SQC_DECLARE_DTYPE)
#undef SQC_DECLARE_DTYPE
};
constexpr std::uint8_t kDTypeCount = 9;

constexpr std::int64_t dtype_bytes(DType dtype) noexcept {
  switch (dtype) {
#define SQC_DTYPE_BYTES(name, number, bytes) \
  case DType::name: return bytes;
    SQC_DTYPES(SQC_DTYPE_BYTES)
#undef SQC_DTYPE_BYTES
  }
  return 1;
}

constexpr const char* dtype_name(DType dtype) noexcept {
  switch (dtype) {
#define SQC_DTYPE_NAME(name, number, bytes) \
  case DType::name: return #name;
    SQC_DTYPES(SQC_DTYPE_NAME)
#undef SQC_DTYPE_NAME
  }
  return "?";
}

// How the bytes of a constant are arranged: plain is row-major, the others are a kernel's packed form, to
// which the value's shape is only a count of bytes. An operator accepts the layout it was written for.
#define SQC_LAYOUTS(X)                                                                          \
  X(plain, 0) X(qgemm, 1) X(q4gemm, 2) X(qsparse_masks, 3) X(qsparse_values, 4) X(panel_starts, 5) \
  X(q4sparse_masks, 6) X(q4sparse_values, 7) X(qblock_index, 8) X(qblock_values, 9) X(qblock_start, 10) \
  X(panels, 11) X(group_panels, 12) X(fgemm, 13)

enum class Layout : std::uint8_t {
#define SQC_DECLARE_LAYOUT(name, number) name = number,
  SQC_LAYOUTS(SQC_DECLARE_LAYOUT)
#undef SQC_DECLARE_LAYOUT
};
constexpr std::uint8_t kLayoutCount = 14;

struct Tensor {
  DType dtype = DType::f32;
  Layout layout = Layout::plain;
  int rank = 0;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[kMaxRank] = {};  // in elements; 0 where broadcast
  std::int32_t storage = -1;           // whose bytes they are: an index into the execution's storages
  std::int64_t offset = 0;             // bytes from the storage's begin to element 0
  std::uint8_t* data = nullptr;        // element 0; known when a run begins

  std::int64_t count() const noexcept {
    std::int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  std::int64_t bytes() const noexcept { return count() * dtype_bytes(dtype); }

  // Elements before the last dimension, and in it; a scalar is one row of one.
  std::int64_t columns() const noexcept { return rank == 0 ? 1 : shape[rank - 1]; }
  std::int64_t rows() const noexcept {
    std::int64_t n = 1;
    for (int i = 0; i + 1 < rank; ++i) n *= shape[i];
    return n;
  }

  bool is_contiguous() const noexcept {
    std::int64_t expected = 1;
    for (int i = rank; i-- > 0;) {
      if (shape[i] == 0) return true;
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
  void set_contiguous() noexcept {
    std::int64_t expected = 1;
    for (int i = rank; i-- > 0;) {
      stride[i] = expected;
      expected *= shape[i] > 0 ? shape[i] : 1;
    }
  }
  bool same_shape(const Tensor& other) const noexcept {
    if (rank != other.rank) return false;
    for (int i = 0; i < rank; ++i) {
      if (shape[i] != other.shape[i]) return false;
    }
    return true;
  }

  template <typename T>
  T* as() const noexcept {
    return reinterpret_cast<T*>(data);
  }
};

}  // namespace sqc

#endif  // SQC_ENGINE_TENSOR_H_
