// Products of two computed float matrices.

#include <initializer_list>

#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

constexpr std::int64_t kLanes = 16;

// c[n] = a . b[n] for contiguous rows b[n]; sixteen partial sums, added in one order.
float dot(const float* a, std::int64_t a_step, const float* b, std::int64_t k) noexcept {
  float sums[kLanes] = {};
  std::int64_t i = 0;
  if (a_step == 1) {
    for (; i + kLanes <= k; i += kLanes) {
      for (std::int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * b[i + lane];
    }
  }
  for (; i < k; ++i) sums[i % kLanes] += a[i * a_step] * b[i];
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

// One row of a product of matrices at any strides.
void multiply_row(const float* a, std::int64_t a_step, const float* b, std::int64_t b_row, std::int64_t b_column,
                  std::int64_t k, std::int64_t n, float* c) noexcept {
  if (b_row == 1) {
    for (std::int64_t j = 0; j < n; ++j) c[j] = dot(a, a_step, b + j * b_column, k);
    return;
  }
  for (std::int64_t j = 0; j < n; ++j) c[j] = 0.0f;
  for (std::int64_t i = 0; i < k; ++i) {
    const float factor = a[i * a_step];
    const float* row = b + i * b_row;
    if (b_column == 1) {
      for (std::int64_t j = 0; j < n; ++j) c[j] += factor * row[j];
    } else {
      for (std::int64_t j = 0; j < n; ++j) c[j] += factor * row[j * b_column];
    }
  }
}

// The offset of matrix `index` of a batch, whose shape is `out`'s, in a tensor that is broadcast to it.
std::int64_t matrix_offset(const Tensor& tensor, const Tensor& out, std::int64_t index) noexcept {
  std::int64_t offset = 0;
  for (int d = out.rank - 2; d-- > 0;) {
    const int own = d - (out.rank - tensor.rank);
    if (own >= 0 && tensor.shape[own] != 1) offset += index % out.shape[d] * tensor.stride[own];
    index /= out.shape[d];
  }
  return offset;
}

}  // namespace

// a [.., M, K] x b [.., K, N], batches broadcast.
Status prepare_matmul(PrepareContext& c) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1), &out = c.out();
  SQC_REQUIRE(a.dtype == DType::f32 && b.dtype == DType::f32 && out.dtype == DType::f32);
  SQC_REQUIRE(a.rank >= 2 && b.rank >= 2 && out.rank >= a.rank && out.rank >= b.rank);
  SQC_REQUIRE(a.shape[a.rank - 1] == b.shape[b.rank - 2]);
  SQC_REQUIRE(out.shape[out.rank - 2] == a.shape[a.rank - 2] && out.shape[out.rank - 1] == b.shape[b.rank - 1]);
  for (const Tensor* tensor : {&a, &b}) {
    for (int d = 0; d + 2 < tensor->rank; ++d) {
      SQC_REQUIRE(tensor->shape[d] == 1 || tensor->shape[d] == out.shape[d + out.rank - tensor->rank]);
    }
  }
  return Status::ok();
}

Status run_matmul(RunContext& c) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1), &out = c.out();
  const std::int64_t m = out.shape[out.rank - 2], n = out.shape[out.rank - 1], k = a.shape[a.rank - 1];
  if (out.count() == 0) return Status::ok();
  return for_rows(c.pool, out.rows(), out.count() * k, [&](std::int64_t row) {
    const std::int64_t batch = row / m;
    multiply_row(a.as<float>() + matrix_offset(a, out, batch) + row % m * a.stride[a.rank - 2], a.stride[a.rank - 1],
                 b.as<float>() + matrix_offset(b, out, batch), b.stride[b.rank - 2], b.stride[b.rank - 1], k, n,
                 out.as<float>() + row * n);
  });
}

}  // namespace sqc
