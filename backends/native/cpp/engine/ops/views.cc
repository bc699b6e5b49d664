// reshape, permute, expand, slice: other views of the same memory. contiguous, cat and sometimes reshape copy.

#include <cstring>

#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

template <typename T>
Status copy_as(ThreadPool& pool, const Tensor& to, const Tensor& from) noexcept {
  return Iteration<2>({&to, &from}).run(pool, [](std::int64_t n, std::uint8_t* const* data, const std::int64_t* stride) {
    std::uint8_t* out = data[0];
    const std::uint8_t* in = data[1];
    if (stride[0] == sizeof(T) && stride[1] == sizeof(T)) {
      std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(T));
      return;
    }
    for (std::int64_t i = 0; i < n; ++i) std::memcpy(out + i * stride[0], in + i * stride[1], sizeof(T));
  });
}

// Sets the strides that show `from` with the shape of `to`; false if there are none. Dimensions of `from`
// that lie behind each other in memory are a run, and each run is cut anew.
bool find_strides(const Tensor& from, Tensor& to) noexcept {
  if (from.is_contiguous()) return true;  // as `to` is already
  int d = to.rank - 1;
  std::int64_t run = 1, cut = 1;  // elements of the run, and of the dimensions cut from it
  std::int64_t step = from.stride[from.rank - 1];
  for (int s = from.rank; s-- > 0;) {
    run *= from.shape[s];
    if (s > 0 && (from.shape[s - 1] == 1 || from.stride[s - 1] == run * step)) continue;
    while (d >= 0 && (cut < run || to.shape[d] == 1)) {
      to.stride[d] = cut * step;
      cut *= to.shape[d--];
    }
    if (cut != run) return false;
    if (s > 0) step = from.stride[s - 1];
    run = cut = 1;
  }
  return d < 0;
}

}  // namespace

Status copy_elements(ThreadPool& pool, const Tensor& to, const Tensor& from) noexcept {
  switch (dtype_bytes(to.dtype)) {
    case 1: return copy_as<std::uint8_t>(pool, to, from);
    case 2: return copy_as<std::uint16_t>(pool, to, from);
    case 4: return copy_as<std::uint32_t>(pool, to, from);
    default: return copy_as<std::uint64_t>(pool, to, from);
  }
}

Status prepare_reshape(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  Tensor& out = c.out();
  SQC_REQUIRE(in.dtype == out.dtype && in.count() == out.count());
  Tensor shown = out;
  if (!find_strides(in, shown)) return Status::ok();  // copies, into `out` as it is
  out = shown;
  c.view(0, in, 0);
  return Status::ok();
}

Status run_reshape(RunContext& c) noexcept {
  // In the order of the input's elements, which is also that of the output's.
  Tensor flat = c.in(0);
  flat.data = c.out().data;
  flat.set_contiguous();
  return copy_elements(c.pool, flat, c.in(0));
}

Status prepare_permute(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  Tensor& out = c.out();
  SQC_REQUIRE(in.dtype == out.dtype && in.rank == out.rank && c.ints() == in.rank);
  unsigned seen = 0;
  for (int d = 0; d < in.rank; ++d) {
    const std::int64_t from = c.integer(d);
    SQC_REQUIRE(from >= 0 && from < in.rank);
    SQC_REQUIRE(out.shape[d] == in.shape[from]);
    out.stride[d] = in.stride[from];
    seen |= 1u << from;
  }
  SQC_REQUIRE(seen == (1u << in.rank) - 1);
  c.view(0, in, 0);
  return Status::ok();
}

Status run_permute(RunContext&) noexcept { return Status::ok(); }

Status prepare_expand(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  Tensor& out = c.out();
  SQC_REQUIRE(in.dtype == out.dtype && broadcasts_to(in, out));
  const int added = out.rank - in.rank;
  for (int d = 0; d < out.rank; ++d) {
    out.stride[d] = d < added || in.shape[d - added] == 1 ? 0 : in.stride[d - added];
  }
  c.view(0, in, 0);
  return Status::ok();
}

Status run_expand(RunContext&) noexcept { return Status::ok(); }

// ints: dimension, first element, step.
Status prepare_slice(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  Tensor& out = c.out();
  const std::int64_t dim = c.integer(0), first = c.integer(1), step = c.integer(2);
  SQC_REQUIRE(in.dtype == out.dtype && in.rank == out.rank && dim >= 0 && dim < in.rank);
  SQC_REQUIRE(first >= 0 && first <= in.shape[dim] && step >= 1);
  for (int d = 0; d < in.rank; ++d) {
    out.stride[d] = in.stride[d];
    if (d != dim) SQC_REQUIRE(out.shape[d] == in.shape[d]);
  }
  SQC_REQUIRE(out.shape[dim] == 0 || (step <= in.shape[dim] && (out.shape[dim] - 1) * step < in.shape[dim] - first));
  out.stride[dim] *= step;
  c.view(0, in, out.shape[dim] == 0 ? 0 : first * in.stride[dim]);
  return Status::ok();
}

Status run_slice(RunContext&) noexcept { return Status::ok(); }

Status prepare_contiguous(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype && c.in(0).same_shape(c.out()));
  if (c.in(0).is_contiguous()) c.view(0, c.in(0), 0);
  return Status::ok();
}

Status run_contiguous(RunContext& c) noexcept { return copy_elements(c.pool, c.out(), c.in(0)); }

// Like contiguous, for operators that can step from row to row at any stride.
Status prepare_dense_rows(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  SQC_REQUIRE(in.dtype == c.out().dtype && in.same_shape(c.out()) && in.rank >= 1);
  if (in.stride[in.rank - 1] != 1 && in.shape[in.rank - 1] > 1) return Status::ok();
  for (int d = 0; d < in.rank; ++d) c.out().stride[d] = in.stride[d];
  c.view(0, in, 0);
  return Status::ok();
}

Status run_dense_rows(RunContext& c) noexcept { return copy_elements(c.pool, c.out(), c.in(0)); }

// ints: dimension.
Status prepare_cat(PrepareContext& c) noexcept {
  const Tensor& out = c.out();
  const std::int64_t dim = c.integer(0);
  SQC_REQUIRE(dim >= 0 && dim < out.rank);
  std::int64_t total = 0;
  for (int i = 0; i < c.inputs(); ++i) {
    const Tensor& in = c.in(i);
    SQC_REQUIRE(in.dtype == out.dtype && in.rank == out.rank);
    for (int d = 0; d < in.rank; ++d) {
      if (d != dim) SQC_REQUIRE(in.shape[d] == out.shape[d]);
    }
    total += in.shape[dim];
  }
  SQC_REQUIRE(total == out.shape[dim]);
  return Status::ok();
}

Status run_cat(RunContext& c) noexcept {
  const std::int64_t dim = c.integer(0);
  Tensor part = c.out();
  for (int i = 0; i < c.inputs(); ++i) {
    part.shape[dim] = c.in(i).shape[dim];
    SQC_RETURN_IF_ERROR(copy_elements(c.pool, part, c.in(i)));
    part.data += part.shape[dim] * part.stride[dim] * dtype_bytes(part.dtype);
  }
  return Status::ok();
}

}  // namespace sqc
