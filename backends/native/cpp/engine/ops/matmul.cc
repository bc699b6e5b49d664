// Products of two computed float matrices.

#include <cmath>
#include <initializer_list>

#include "base/work_shares.h"
#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"
#include "engine/ops/quantized_rows.h"

namespace sqc {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 40;  // bytes of a matrix
constexpr std::int64_t kSmall = 32768;  // multiplications that are done before another thread is awake

// Where things lie in a thread's scratch memory: b in panels of 16 columns, a in rows without gaps if it has none.
struct Places {
  std::int64_t a, bytes;
};

Places places_of(const Operands& c) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1);
  const std::int64_t m = a.shape[a.rank - 2], k = a.shape[a.rank - 1], n = b.shape[b.rank - 1];
  Places p = {};
  p.a = round_up(fgemm_packed_bytes(n, k, FgemmType::f32), 64);
  p.bytes = p.a + (a.stride[a.rank - 1] == 1 || k <= 1 ? 0 : round_up(m * k * 4, 64));
  return p;
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

// a [.., M, K] x b [.., K, N], batches broadcast. Each sum is one chain of fma in ascending k, so that a row does
// not depend on how many others there are.
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
  // What is packed is at most 16 times larger than b: its size cannot overflow.
  SQC_REQUIRE(out.count() == 0 || (a.bytes() <= kLargest && b.bytes() <= kLargest));
  if (out.count() > 0) c.need_scratch(places_of(c).bytes * c.threads);
  return Status::ok();
}

Status run_matmul(RunContext& c) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1), &out = c.out();
  if (out.count() == 0) return Status::ok();
  FgemmParams p = {};
  p.m = out.shape[out.rank - 2];
  p.n = out.shape[out.rank - 1];
  p.k = a.shape[a.rank - 1];
  p.c_stride = p.n;
  p.low = -INFINITY;
  p.high = INFINITY;
  const Places places = places_of(c);
  const std::int64_t batches = out.rows() / p.m, panels = (p.n + 15) / 16;
  const std::int64_t a_row = a.stride[a.rank - 2], a_column = a.stride[a.rank - 1];
  const auto run = c.kernels.fgemm.run;
  // Matrices that follow each other may have one b, which is packed once.
  const auto batch = [&](std::int64_t index, std::int64_t* packed, std::uint8_t* scratch) {
    FgemmParams part = p;
    const std::int64_t b_offset = matrix_offset(b, out, index);
    if (*packed != b_offset) {
      (void)fgemm_pack(p.n, p.k, b.as<float>() + b_offset, b.stride[b.rank - 1], b.stride[b.rank - 2], FgemmType::f32, scratch);
      *packed = b_offset;
    }
    part.b = scratch;
    part.a = a.as<float>() + matrix_offset(a, out, index);
    part.a_stride = a_row;
    if (a_column != 1 && p.k > 1) {
      auto* rows = reinterpret_cast<float*>(scratch + places.a);
      for (std::int64_t row = 0; row < p.m; ++row) {
        for (std::int64_t i = 0; i < p.k; ++i) rows[row * p.k + i] = part.a[row * a_row + i * a_column];
      }
      part.a = rows;
      part.a_stride = p.k;
    }
    part.c = out.as<float>() + index * p.m * p.n;
    return part;
  };
  const int threads = c.pool.threads();
  const bool is_small = out.count() <= kSmall / (p.k > 0 ? p.k : 1);
  if (!is_small && batches >= threads) {
    return run_shared(c.pool, batches, 1, 1, [&](int thread, Range part) {
      std::int64_t packed = -1;
      std::uint8_t* scratch = c.scratch + thread * places.bytes;
      for (std::int64_t i = part.begin; i < part.end; ++i) run(batch(i, &packed, scratch), 0, panels, nullptr);
    });
  }
  std::int64_t packed = -1;
  for (std::int64_t i = 0; i < batches; ++i) {
    const FgemmParams part = batch(i, &packed, c.scratch);
    if (is_small) {
      run(part, 0, panels, nullptr);
      continue;
    }
    SQC_RETURN_IF_ERROR(run_shared(c.pool, panels, 4, 4, [&](int, Range share) {
      run(part, share.begin, share.end, nullptr);
    }));
  }
  return Status::ok();
}

}  // namespace sqc
