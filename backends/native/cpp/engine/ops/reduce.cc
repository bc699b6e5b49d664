// Reductions over the last dimensions (the compiler permutes others there), running sums, and the largest.

#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

// The elements that one result is made of: the last `inner` dimensions, at any strides.
template <typename T, class F>
void for_inner(const Tensor& in, int inner, const T* first, F f) noexcept {
  const int begin = in.rank - inner;
  const std::int64_t last = inner > 0 ? in.shape[in.rank - 1] : 1, step = inner > 0 ? in.stride[in.rank - 1] : 0;
  std::int64_t runs = 1;
  for (int d = begin; d + 1 < in.rank; ++d) runs *= in.shape[d];
  for (std::int64_t run = 0; run < runs; ++run) {
    std::int64_t rest = run, offset = 0;
    for (int d = in.rank - 1; d-- > begin;) {
      offset += rest % in.shape[d] * in.stride[d];
      rest /= in.shape[d];
    }
    for (std::int64_t i = 0; i < last; ++i) f(first[offset + i * step]);
  }
}

// `outer` results, each from the elements behind one index of the dimensions before.
template <typename T, typename R, class Make>
Status reduce(RunContext& c, Make make) noexcept {
  const Tensor& in = c.in(0);
  const int inner = static_cast<int>(c.integer(0));
  R* out = c.out().as<R>();
  return for_rows(c.pool, c.out().count(), in.count(), [&](std::int64_t row) {
    out[row] = make(in.as<T>() + row_offset(in, inner, row), inner);
  });
}

// Sums of floats are kept in double precision: their order would be seen otherwise.
template <typename T>
using Sum = std::conditional_t<std::is_floating_point_v<T>, double, std::make_unsigned_t<std::int64_t>>;

template <typename T>
Status sum(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  return reduce<T, T>(c, [&](const T* first, int inner) {
    Sum<T> total = 0;
    for_inner(in, inner, first, [&](T x) { total += static_cast<Sum<T>>(x); });
    return static_cast<T>(total);
  });
}

// The first of the largest, or of the smallest if `sign` is -1; a NaN wins.
template <typename T, int sign>
Status extreme(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  return reduce<T, T>(c, [&](const T* first, int inner) {
    T best = *first;
    for_inner(in, inner, first, [&](T x) { best = best != best || (sign > 0 ? best >= x : best <= x) ? best : x; });
    return best;
  });
}

template <int sign>
Status extreme_of(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return extreme<float, sign>(c);
    case DType::i64: return extreme<std::int64_t, sign>(c);
    default: return extreme<std::int32_t, sign>(c);
  }
}

template <typename T, int sign>
Status arg_extreme(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  const std::int64_t columns = in.columns(), step = in.rank > 0 ? in.stride[in.rank - 1] : 0;
  std::int64_t* out = c.out().as<std::int64_t>();
  return for_rows(c.pool, c.out().count(), in.count(), [&](std::int64_t row) {
    const T* x = in.as<T>() + row_offset(in, 1, row);
    std::int64_t best = 0;
    for (std::int64_t i = 1; i < columns; ++i) {
      const T a = x[best * step], b = x[i * step];
      if (a == a && (b != b || (sign > 0 ? b > a : b < a))) best = i;
    }
    out[row] = best;
  });
}

template <int sign>
Status arg_extreme_of(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return arg_extreme<float, sign>(c);
    case DType::i64: return arg_extreme<std::int64_t, sign>(c);
    default: return arg_extreme<std::int32_t, sign>(c);
  }
}

bool is_number(DType dtype) noexcept {
  return dtype == DType::f32 || dtype == DType::i64 || dtype == DType::i32;
}

// ints: how many dimensions are reduced, 0 to all; the output has the others.
Status check_reduce(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  const std::int64_t inner = c.integer(0);
  SQC_REQUIRE(inner >= 0 && inner <= in.rank && c.out().rank == in.rank - inner);
  for (int d = 0; d < c.out().rank; ++d) SQC_REQUIRE(c.out().shape[d] == in.shape[d]);
  return Status::ok();
}

}  // namespace

Status prepare_number_reduce(PrepareContext& c) noexcept {
  SQC_RETURN_IF_ERROR(check_reduce(c));
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype && is_number(c.in(0).dtype));
  return Status::ok();
}

// Of nothing there is no largest.
Status prepare_extreme_reduce(PrepareContext& c) noexcept {
  SQC_RETURN_IF_ERROR(prepare_number_reduce(c));
  SQC_REQUIRE(c.in(0).count() > 0 || c.out().count() == 0);
  return Status::ok();
}

Status prepare_float_reduce(PrepareContext& c) noexcept {
  SQC_RETURN_IF_ERROR(check_reduce(c));
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.out().dtype == DType::f32);
  return Status::ok();
}

Status prepare_bool_reduce(PrepareContext& c) noexcept {
  SQC_RETURN_IF_ERROR(check_reduce(c));
  SQC_REQUIRE(c.in(0).dtype == DType::boolean && c.out().dtype == DType::boolean);
  return Status::ok();
}

Status prepare_arg_reduce(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  SQC_REQUIRE(is_number(in.dtype) && c.out().dtype == DType::i64);
  SQC_REQUIRE(in.rank >= 1 && in.shape[in.rank - 1] >= 1 && c.out().rank == in.rank - 1);
  for (int d = 0; d < c.out().rank; ++d) SQC_REQUIRE(c.out().shape[d] == in.shape[d]);
  return Status::ok();
}

Status run_reduce_sum(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return sum<float>(c);
    case DType::i64: return sum<std::int64_t>(c);
    default: return sum<std::int32_t>(c);
  }
}

Status run_reduce_mean(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  const double count = static_cast<double>(c.out().count() == 0 ? 1 : in.count() / c.out().count());
  return reduce<float, float>(c, [&](const float* first, int inner) {
    double total = 0;
    for_inner(in, inner, first, [&](float x) { total += x; });
    return static_cast<float>(total / count);
  });
}

Status run_reduce_max(RunContext& c) noexcept { return extreme_of<1>(c); }
Status run_reduce_min(RunContext& c) noexcept { return extreme_of<-1>(c); }

Status run_reduce_any(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  return reduce<std::uint8_t, bool>(c, [&](const std::uint8_t* first, int inner) {
    bool any = false;
    for_inner(in, inner, first, [&](std::uint8_t x) { any = any || x != 0; });
    return any;
  });
}

Status run_reduce_all(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  return reduce<std::uint8_t, bool>(c, [&](const std::uint8_t* first, int inner) {
    bool all = true;
    for_inner(in, inner, first, [&](std::uint8_t x) { all = all && x != 0; });
    return all;
  });
}

Status run_argmax(RunContext& c) noexcept { return arg_extreme_of<1>(c); }
Status run_argmin(RunContext& c) noexcept { return arg_extreme_of<-1>(c); }

Status prepare_cumsum(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype && c.in(0).same_shape(c.out()) && c.in(0).rank >= 1);
  SQC_REQUIRE(c.in(0).dtype == DType::f32 || c.in(0).dtype == DType::i64);
  return Status::ok();
}

namespace {

template <typename T>
Status running_sum(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  const std::int64_t columns = in.columns(), step = in.stride[in.rank - 1];
  return for_rows(c.pool, in.rows(), in.count(), [&](std::int64_t row) {
    const T* x = in.as<T>() + row_offset(in, 1, row);
    T* out = c.out().as<T>() + row * columns;
    Sum<T> total = 0;
    for (std::int64_t i = 0; i < columns; ++i) {
      total += static_cast<Sum<T>>(x[i * step]);
      out[i] = static_cast<T>(total);
    }
  });
}

}  // namespace

Status run_cumsum(RunContext& c) noexcept {
  return c.in(0).dtype == DType::f32 ? running_sum<float>(c) : running_sum<std::int64_t>(c);
}

// ints: whether the largest are wanted (1) or the smallest (0). Outputs: values and indices [..., k], sorted;
// among equals the first comes first.
Status prepare_top_k(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  SQC_REQUIRE(in.dtype == DType::f32 && c.out(0).dtype == DType::f32 && c.out(1).dtype == DType::i64);
  SQC_REQUIRE(in.rank >= 1 && c.out(0).rank == in.rank && c.out(1).same_shape(c.out(0)));
  for (int d = 0; d + 1 < in.rank; ++d) SQC_REQUIRE(c.out(0).shape[d] == in.shape[d]);
  SQC_REQUIRE(c.out(0).columns() <= in.columns());
  c.need_scratch(in.columns() * 8 * c.threads);
  return Status::ok();
}

Status run_top_k(RunContext& c) noexcept {
  const Tensor& in = c.in(0);
  const std::int64_t columns = in.columns(), k = c.out(0).columns(), step = in.stride[in.rank - 1];
  const bool largest = c.integer(0) != 0;
  auto* order = reinterpret_cast<std::int64_t*>(c.scratch);
  for (std::int64_t row = 0; row < in.rows() && k > 0; ++row) {
    const float* x = in.as<float>() + row_offset(in, 1, row);
    for (std::int64_t i = 0; i < columns; ++i) order[i] = i;
    // A NaN counts as larger than any number.
    const auto key = [&](std::int64_t i) { return x[i * step] != x[i * step] ? INFINITY : x[i * step]; };
    const auto before = [&](std::int64_t a, std::int64_t b) {
      const float p = key(a), q = key(b);
      return p == q ? a < b : largest ? p > q : p < q;
    };
    std::partial_sort(order, order + k, order + columns, before);
    for (std::int64_t i = 0; i < k; ++i) {
      c.out(0).as<float>()[row * k + i] = x[order[i] * step];
      c.out(1).as<std::int64_t>()[row * k + i] = order[i];
    }
  }
  return Status::ok();
}

}  // namespace sqc
