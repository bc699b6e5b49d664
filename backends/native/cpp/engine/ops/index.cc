// Operators that move elements by indices: computed ones, and those that the data holds.

#include <atomic>
#include <cstring>

#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {

// ints: first number, step. Output [n] of i64.
Status prepare_iota(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.out().dtype == DType::i64 && c.out().rank == 1);
  return Status::ok();
}

Status run_iota(RunContext& c) noexcept {
  auto* out = c.out().as<std::int64_t>();
  const auto first = static_cast<std::uint64_t>(c.integer(0)), step = static_cast<std::uint64_t>(c.integer(1));
  for (std::int64_t i = 0; i < c.out().count(); ++i) {
    out[i] = static_cast<std::int64_t>(first + static_cast<std::uint64_t>(i) * step);
  }
  return Status::ok();
}

namespace {

Status out_of_range(std::int64_t index, std::int64_t size) noexcept {
  return Status::error(StatusCode::kInvalidArgument, "index %lld is out of range for a dimension of %lld",
                       static_cast<long long>(index), static_cast<long long>(size));
}

// A negative index counts from the end.
bool normalize_index(std::int64_t& index, std::int64_t size) noexcept {
  if (index < 0) index += size;
  return index >= 0 && index < size;
}

// The largest rank that the broadcast indices have, and their sizes.
void index_shape(const Operands& c, Tensor* shape) noexcept {
  shape->rank = 0;
  for (int i = 1; i < c.inputs(); ++i) shape->rank = c.in(i).rank > shape->rank ? c.in(i).rank : shape->rank;
  for (int d = 0; d < shape->rank; ++d) shape->shape[d] = 1;
  for (int i = 1; i < c.inputs(); ++i) {
    const int added = shape->rank - c.in(i).rank;
    for (int d = 0; d < c.in(i).rank; ++d) {
      if (c.in(i).shape[d] != 1) shape->shape[d + added] = c.in(i).shape[d];
    }
  }
}

}  // namespace

// Inputs: x, and indices i64 that are broadcast to one shape I; they index neighbouring dimensions of x from
// ints[0] on. Output: x's dimensions before, I, x's dimensions after. With one index for dimension 0 this is
// an embedding.
Status prepare_index(PrepareContext& c) noexcept {
  const Tensor &in = c.in(0), &out = c.out();
  const int indexed = c.inputs() - 1;
  const std::int64_t first = c.integer(0);
  SQC_REQUIRE(in.dtype == out.dtype && first >= 0 && first <= in.rank - indexed);
  Tensor shape;
  index_shape(c, &shape);
  for (int i = 1; i < c.inputs(); ++i) {
    SQC_REQUIRE(c.in(i).dtype == DType::i64 && broadcasts_to(c.in(i), shape));
  }
  SQC_REQUIRE(out.rank == in.rank - indexed + shape.rank);
  for (int d = 0; d < out.rank; ++d) {
    const int own = static_cast<int>(first);
    const std::int64_t size = d < own ? in.shape[d] : d < own + shape.rank ? shape.shape[d - own]
                                                                            : in.shape[d - shape.rank + indexed];
    SQC_REQUIRE(out.shape[d] == size);
  }
  return Status::ok();
}

Status run_index(RunContext& c) noexcept {
  const Tensor &in = c.in(0), &out = c.out();
  const int first = static_cast<int>(c.integer(0)), indexed = c.inputs() - 1;
  Tensor shape;
  index_shape(c, &shape);
  // One part for each index of I and of the dimensions before: a copy of the dimensions after.
  Tensor to, from;
  to.dtype = from.dtype = out.dtype;
  to.rank = from.rank = in.rank - first - indexed;
  for (int d = 0; d < to.rank; ++d) {
    to.shape[d] = from.shape[d] = in.shape[first + indexed + d];
    from.stride[d] = in.stride[first + indexed + d];
  }
  to.set_contiguous();
  const bool whole = from.is_contiguous();
  const std::int64_t size = dtype_bytes(in.dtype), part = to.count(), places = shape.count();
  std::int64_t outer = 1;
  for (int d = 0; d < first; ++d) outer *= in.shape[d];
  if (part == 0 || outer == 0) return Status::ok();
  std::int64_t coordinates[kMaxRank] = {};
  for (std::int64_t place = 0; place < places; ++place) {
    std::int64_t rest = place, offset = 0;
    for (int d = shape.rank; d-- > 0;) {
      coordinates[d] = rest % shape.shape[d];
      rest /= shape.shape[d];
    }
    for (int i = 0; i < indexed; ++i) {
      const Tensor& indices = c.in(i + 1);
      std::int64_t at = 0;
      for (int d = 0; d < indices.rank; ++d) {
        if (indices.shape[d] != 1) at += coordinates[d + shape.rank - indices.rank] * indices.stride[d];
      }
      std::int64_t index = indices.as<std::int64_t>()[at];
      if (!normalize_index(index, in.shape[first + i])) return out_of_range(index, in.shape[first + i]);
      offset += index * in.stride[first + i];
    }
    for (std::int64_t o = 0; o < outer; ++o) {
      std::int64_t before = 0, left = o;
      for (int d = first; d-- > 0;) {
        before += left % in.shape[d] * in.stride[d];
        left /= in.shape[d];
      }
      from.data = in.data + (before + offset) * size;
      to.data = out.data + (o * places + place) * part * size;
      if (whole) {
        std::memcpy(to.data, from.data, static_cast<std::size_t>(part * size));
      } else {
        SQC_RETURN_IF_ERROR(copy_elements(c.pool, to, from));
      }
    }
  }
  return Status::ok();
}

// Inputs: x, indices i64 of the same rank, no dimension but the last larger. Output [.., i] = x[.., index[.., i]].
Status prepare_gather(PrepareContext& c) noexcept {
  const Tensor &in = c.in(0), &indices = c.in(1);
  SQC_REQUIRE(in.dtype == c.out().dtype && indices.dtype == DType::i64);
  SQC_REQUIRE(in.rank >= 1 && in.rank == indices.rank && indices.same_shape(c.out()));
  for (int d = 0; d + 1 < in.rank; ++d) SQC_REQUIRE(indices.shape[d] <= in.shape[d]);
  return Status::ok();
}

Status run_gather(RunContext& c) noexcept {
  const Tensor &in = c.in(0), &indices = c.in(1), &out = c.out();
  const std::int64_t columns = out.columns(), size = dtype_bytes(in.dtype), range = in.columns();
  if (out.count() == 0) return Status::ok();
  for (std::int64_t row = 0; row < out.rows(); ++row) {
    std::int64_t rest = row, from = 0;
    for (int d = in.rank - 1; d-- > 0;) {
      from += rest % out.shape[d] * in.stride[d];
      rest /= out.shape[d];
    }
    const std::int64_t* index = indices.as<std::int64_t>() + row_offset(indices, 1, row);
    for (std::int64_t i = 0; i < columns; ++i) {
      std::int64_t at = index[i * indices.stride[in.rank - 1]];
      if (!normalize_index(at, range)) return out_of_range(at, range);
      std::memcpy(out.data + (row * columns + i) * size, in.data + (from + at * in.stride[in.rank - 1]) * size,
                  static_cast<std::size_t>(size));
    }
  }
  return Status::ok();
}

// The patches that a convolution multiplies. ints: kernel, stride, padding, dilation, each in both
// directions. x [N, C, H, W] -> [N, OH, OW, C * kernel height * kernel width].
Status prepare_unfold(PrepareContext& c) noexcept {
  const Tensor &in = c.in(0), &out = c.out();
  SQC_REQUIRE(in.dtype == DType::f32 && out.dtype == DType::f32 && in.rank == 4 && out.rank == 4);
  constexpr std::int64_t limit = std::int64_t{1} << 24;
  std::int64_t patch = in.shape[1];
  for (int d = 0; d < 2; ++d) {
    const std::int64_t kernel = c.integer(d), stride = c.integer(2 + d), padding = c.integer(4 + d),
                       dilation = c.integer(6 + d);
    SQC_REQUIRE(kernel >= 1 && stride >= 1 && padding >= 0 && dilation >= 1);
    SQC_REQUIRE(kernel < limit && stride < limit && padding < limit && dilation < limit && in.shape[2 + d] < limit);
    const std::int64_t room = in.shape[2 + d] + 2 * padding - dilation * (kernel - 1) - 1;
    SQC_REQUIRE(room >= 0 && out.shape[1 + d] == room / stride + 1);
    SQC_REQUIRE(!__builtin_mul_overflow(patch, kernel, &patch));
  }
  SQC_REQUIRE(out.shape[0] == in.shape[0] && out.shape[3] == patch);
  return Status::ok();
}

Status run_unfold(RunContext& c) noexcept {
  const Tensor &in = c.in(0), &out = c.out();
  const std::int64_t kernel_y = c.integer(0), kernel_x = c.integer(1), patch = out.shape[3];
  return for_rows(c.pool, out.rows(), out.count(), [&](std::int64_t row) {
    const std::int64_t x = row % out.shape[2], y = row / out.shape[2] % out.shape[1];
    const float* image = in.as<float>() + row / out.shape[2] / out.shape[1] * in.stride[0];
    float* to = out.as<float>() + row * patch;
    for (std::int64_t channel = 0; channel < in.shape[1]; ++channel) {
      for (std::int64_t i = 0; i < kernel_y; ++i) {
        const std::int64_t from_y = y * c.integer(2) - c.integer(4) + i * c.integer(6);
        for (std::int64_t j = 0; j < kernel_x; ++j) {
          const std::int64_t from_x = x * c.integer(3) - c.integer(5) + j * c.integer(7);
          const bool inside = from_y >= 0 && from_y < in.shape[2] && from_x >= 0 && from_x < in.shape[3];
          *to++ = inside ? image[channel * in.stride[1] + from_y * in.stride[2] + from_x * in.stride[3]] : 0.0f;
        }
      }
    }
  });
}

}  // namespace sqc
