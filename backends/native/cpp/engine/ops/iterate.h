// Walking over several tensors at once, element by element, whatever their strides.

#ifndef SQC_ENGINE_OPS_ITERATE_H_
#define SQC_ENGINE_OPS_ITERATE_H_

#include <cstdint>

#include "base/thread_pool.h"
#include "engine/tensor.h"

namespace sqc {

// Below so many elements a second thread costs more than it helps.
constexpr std::int64_t kElementsPerThread = 16384;

// Whether `operand` can be broadcast to `shape` of `rank` dimensions, as NumPy does it.
inline bool broadcasts_to(const Tensor& operand, const Tensor& result) noexcept {
  if (operand.rank > result.rank) return false;
  for (int i = 0; i < operand.rank; ++i) {
    const std::int64_t size = operand.shape[i];
    if (size != 1 && size != result.shape[result.rank - operand.rank + i]) return false;
  }
  return true;
}

// The elements of N tensors in the order of the first, whose shape it is; the others are broadcast to it.
// Dimensions that lie behind each other in all of them are one.
template <int N>
struct Iteration {
  int rank = 0;
  std::int64_t count = 1;
  std::int64_t shape[kMaxRank] = {};
  std::int64_t stride[N][kMaxRank] = {};  // in bytes
  std::uint8_t* data[N] = {};

  explicit Iteration(const Tensor* const (&tensors)[N]) noexcept {
    const Tensor& result = *tensors[0];
    count = result.count();
    for (int t = 0; t < N; ++t) data[t] = tensors[t]->data;
    for (int d = 0; d < result.rank; ++d) {
      if (result.shape[d] == 1) continue;
      std::int64_t step[N];
      for (int t = 0; t < N; ++t) {
        const Tensor& tensor = *tensors[t];
        const int own = d - (result.rank - tensor.rank);
        step[t] = own < 0 || tensor.shape[own] == 1 ? 0 : tensor.stride[own] * dtype_bytes(tensor.dtype);
      }
      bool merges = rank > 0;
      for (int t = 0; t < N && merges; ++t) merges = stride[t][rank - 1] == step[t] * result.shape[d];
      const int at = merges ? rank - 1 : rank++;
      shape[at] = merges ? shape[at] * result.shape[d] : result.shape[d];
      for (int t = 0; t < N; ++t) stride[t][at] = step[t];
    }
    if (rank == 0) {
      shape[0] = 1;
      rank = 1;
    }
  }

  // Calls f(count, data, strides) for runs of the innermost dimension that together are elements
  // [begin, end).
  template <class F>
  void walk(std::int64_t begin, std::int64_t end, F f) const noexcept {
    std::int64_t index[kMaxRank];
    std::int64_t rest = begin;
    std::uint8_t* at[N];
    for (int t = 0; t < N; ++t) at[t] = data[t];
    for (int d = rank; d-- > 0;) {
      index[d] = rest % shape[d];
      rest /= shape[d];
      for (int t = 0; t < N; ++t) at[t] += index[d] * stride[t][d];
    }
    std::int64_t inner[N];
    for (int t = 0; t < N; ++t) inner[t] = stride[t][rank - 1];
    while (begin < end) {
      const std::int64_t left = shape[rank - 1] - index[rank - 1];
      const std::int64_t run = left < end - begin ? left : end - begin;
      f(run, at, inner);
      begin += run;
      for (int t = 0; t < N; ++t) at[t] += run * inner[t];
      index[rank - 1] += run;
      for (int d = rank - 1; d > 0 && index[d] == shape[d]; --d) {
        index[d] = 0;
        ++index[d - 1];
        for (int t = 0; t < N; ++t) at[t] += stride[t][d - 1] - shape[d] * stride[t][d];
      }
    }
  }

  template <class F>
  Status run(ThreadPool& pool, F f) const noexcept {
    if (count == 0) return Status::ok();
    if (count < 2 * kElementsPerThread || pool.threads() == 1) {
      walk(0, count, f);
      return Status::ok();
    }
    return pool.run([&](int thread) {
      const Range range = split_evenly(count, 64, pool.threads(), thread);
      if (range.begin < range.end) walk(range.begin, range.end, f);
    });
  }
};

// Calls f(row) for rows [0, rows), split over the threads where the work is worth it.
template <class F>
Status for_rows(ThreadPool& pool, std::int64_t rows, std::int64_t elements, F f) noexcept {
  if (elements < 2 * kElementsPerThread || pool.threads() == 1 || rows == 1) {
    for (std::int64_t row = 0; row < rows; ++row) f(row);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range range = split_evenly(rows, 1, pool.threads(), thread);
    for (std::int64_t row = range.begin; row < range.end; ++row) f(row);
  });
}

// Where row `row` of a tensor begins, in elements: the index of all dimensions but the last `inner`.
inline std::int64_t row_offset(const Tensor& tensor, int inner, std::int64_t row) noexcept {
  std::int64_t offset = 0;
  for (int d = tensor.rank - inner; d-- > 0;) {
    offset += row % tensor.shape[d] * tensor.stride[d];
    row /= tensor.shape[d];
  }
  return offset;
}

// Copies `from`, broadcast, to `to`; both have elements of the same size.
Status copy_elements(ThreadPool& pool, const Tensor& to, const Tensor& from) noexcept;

}  // namespace sqc

#endif  // SQC_ENGINE_OPS_ITERATE_H_
