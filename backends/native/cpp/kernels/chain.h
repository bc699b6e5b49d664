// Products of a few rows of floats with vectors of sixteen columns: the inner loop of attention and fgemm.
//
//   c[r][w * 16 + lane] += sum over i of a[r][i] * b[w][i][lane]
//
// Each element is one chain of fma in ascending i, which starts at what c holds: the result does not depend on
// how many rows and vectors share the registers, nor on where a long sum is cut.

#ifndef SQC_KERNELS_CHAIN_H_
#define SQC_KERNELS_CHAIN_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {

template <class S>
static SQC_INLINE typename S::F32 load_as_float(const float* p) {
  return S::load_f(p);
}
template <class S>
static SQC_INLINE typename S::F32 load_as_float(const std::int8_t* p) {
  return S::to_float(S::load_i8(p));
}
template <class S>
static SQC_INLINE typename S::F32 load_as_float(const std::uint16_t* p) {  // bfloat16
  return S::load_bf16(p);
}

// The columns: vector w of step i lies at data + w * vector_stride + i * step.
template <class T>
struct Columns {
  const T* data;
  std::int64_t vectors, vector_stride, step;
};

// What to fetch into the cache while a product runs, because it comes next: `bytes` of each vector, 64 a step.
struct Ahead {
  const char* data;
  std::int64_t bytes, vector_stride;
};

template <class S, int Rows, int Vectors, class T>
static SQC_INLINE void chain(const float* a, std::int64_t a_stride, const T* b, std::int64_t vector_stride,
                             std::int64_t step, std::int64_t count, float* c, std::int64_t c_stride, Ahead ahead) {
  typename S::F32 sum[Rows][Vectors];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int w = 0; w < Vectors; ++w) sum[r][w] = S::load_f(c + r * c_stride + w * 16);
  }
  for (std::int64_t i = 0; i < count; ++i, b += step) {
    if (i * 64 < ahead.bytes) {
      SQC_UNROLL for (int w = 0; w < Vectors; ++w) S::prefetch(ahead.data + w * ahead.vector_stride + i * 64);
    }
    typename S::F32 column[Vectors];
    SQC_UNROLL for (int w = 0; w < Vectors; ++w) column[w] = load_as_float<S>(b + w * vector_stride);
    SQC_UNROLL for (int r = 0; r < Rows; ++r) {
      const auto factor = S::set_f(a[r * a_stride + i]);
      SQC_UNROLL for (int w = 0; w < Vectors; ++w) sum[r][w] = S::fma_f(factor, column[w], sum[r][w]);
    }
  }
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int w = 0; w < Vectors; ++w) S::store_f(c + r * c_stride + w * 16, sum[r][w]);
  }
}

// All vectors for `rows` <= MaxRows rows.
template <class S, int MaxRows, int Vectors, class T>
static SQC_INLINE void chain_rows(std::int64_t rows, const float* a, std::int64_t a_stride, const Columns<T>& b,
                                  std::int64_t count, float* c, std::int64_t c_stride, Ahead ahead) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return chain_rows<S, MaxRows - 1, Vectors>(rows, a, a_stride, b, count, c, c_stride, ahead);
  }
  // One row alone needs several vectors to hide the latency of its chain, whatever the registers hold.
  constexpr int kVectors = MaxRows == 1 && Vectors < 4 ? 4 : Vectors;
  std::int64_t w = 0;
  for (; w + kVectors <= b.vectors; w += kVectors, ahead.data += kVectors * ahead.vector_stride) {
    chain<S, MaxRows, kVectors>(a, a_stride, b.data + w * b.vector_stride, b.vector_stride, b.step, count, c + w * 16,
                                c_stride, ahead);
  }
  if constexpr (kVectors > 1) {
    for (; w < b.vectors; ++w, ahead.data += ahead.vector_stride) {
      chain<S, MaxRows, 1>(a, a_stride, b.data + w * b.vector_stride, b.vector_stride, b.step, count, c + w * 16,
                           c_stride, ahead);
    }
  }
}

// Any number of rows, in blocks that differ by at most one.
template <class S, int MaxRows, int Vectors, class T>
static void chain_all(std::int64_t rows, const float* a, std::int64_t a_stride, const Columns<T>& b, std::int64_t count,
                      float* c, std::int64_t c_stride) {
  const std::int64_t blocks = (rows + MaxRows - 1) / MaxRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t r = rows * block / blocks;
    chain_rows<S, MaxRows, Vectors>(rows * (block + 1) / blocks - r, a + r * a_stride, a_stride, b, count,
                                    c + r * c_stride, c_stride, {nullptr, 0, 0});
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_CHAIN_H_
