// What else is done with images whose channels lie together: to and from codes, pooling, resizing, padding.

#include <cmath>
#include <cstring>
#include <limits>

#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 24;  // of a side of an image, a kernel, a stride, …

bool is_code(std::int64_t zero) noexcept { return zero >= 0 && zero <= 255; }

// Whole numbers of steps that a byte can hold, counted from the zero point.
bool are_bounds(double low, double high, std::int64_t zero) noexcept {
  const auto z = static_cast<double>(zero);
  return low >= -z && high <= 255.0 - z && low <= high && low == static_cast<double>(static_cast<int>(low)) &&
         high == static_cast<double>(static_cast<int>(high));
}

bool is_image(const Tensor& x) noexcept {
  return x.rank == 4 && x.is_contiguous() && x.shape[1] < kLargest && x.shape[2] < kLargest;
}

}  // namespace

namespace {

// How many columns a pixel holds, and how far the next pixel's are: one, in files that do not say.
std::int64_t pixel_taps(const Operands& c) noexcept { return c.ints() > 7 ? c.integer(7) : 1; }
std::int64_t pixel_step(const Operands& c) noexcept { return c.ints() > 8 ? c.integer(8) : 1; }

}  // namespace

// Input: x f32 [N, C, H, W], however it lies. ints: the zero point, the lowest and highest code, the border of zero
// points: above, below, left, right; columns of a pixel, and from one pixel to the next. floats: the scale. Output u8
// [N, H', W', P] with P >= C times the columns of a pixel.
Status prepare_quantize_image(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(x.dtype == DType::f32 && y.dtype == DType::u8 && x.rank == 4 && y.rank == 4);
  SQC_REQUIRE(is_code(c.integer(0)) && is_code(c.integer(1)) && is_code(c.integer(2)) && c.integer(1) <= c.integer(2));
  SQC_REQUIRE(c.number(0) > 0.0);
  for (int i = 3; i < 7; ++i) SQC_REQUIRE(c.integer(i) >= 0 && c.integer(i) < kLargest);
  SQC_REQUIRE(x.shape[2] < kLargest && x.shape[3] < kLargest);
  SQC_REQUIRE(y.shape[0] == x.shape[0] && y.shape[1] == x.shape[2] + c.integer(3) + c.integer(4));
  const std::int64_t taps = pixel_taps(c), step = pixel_step(c), columns = x.shape[3] + c.integer(5) + c.integer(6);
  SQC_REQUIRE(taps >= 1 && step >= 1 && taps <= kQimageTapBytes && step <= kQimageMaxStep);
  SQC_REQUIRE(x.shape[1] < kLargest && (taps * step == 1 || x.shape[1] * taps <= kQimageTapBytes));
  if (columns < taps) {
    return misfit("the kernel covers %lld places, more than the %lld of the padded image", static_cast<long long>(taps),
                  static_cast<long long>(columns));
  }
  SQC_REQUIRE(y.shape[2] == (columns - taps) / step + 1 && y.shape[3] >= x.shape[1] * taps);
  return Status::ok();
}

Status run_quantize_image(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  QimageParams p = {};
  p.batch = x.shape[0];
  p.channels = x.shape[1];
  p.height = x.shape[2];
  p.width = x.shape[3];
  p.x = x.as<float>();
  p.batch_stride = x.stride[0];
  p.channel_stride = x.stride[1];
  p.row_stride = x.stride[2];
  p.column_stride = x.stride[3];
  p.scale = static_cast<float>(c.number(0));
  p.zero = static_cast<std::int32_t>(c.integer(0));
  p.low = static_cast<float>(c.integer(1) - c.integer(0));
  p.high = static_cast<float>(c.integer(2) - c.integer(0));
  p.y = y.data;
  p.pixel = y.shape[3];
  p.top = c.integer(3);
  p.bottom = c.integer(4);
  p.left = c.integer(5);
  p.right = c.integer(6);
  p.taps = pixel_taps(c);
  p.step = pixel_step(c);
  return qimage(c.pool, c.kernels.qimage, p);
}

// Inputs: a and b, u8 [N, .., P]; b may have size 1 in all dimensions between. ints: the zero points of a, b and the
// result. floats: the scales of a and b, in steps of the result, and the lowest and highest result, counted from its
// zero point. Products take the first scale alone.
Status prepare_codes_binary(PrepareContext& c) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1), &y = c.out();
  SQC_REQUIRE(a.dtype == DType::u8 && b.dtype == DType::u8 && y.dtype == DType::u8);
  SQC_REQUIRE(a.rank >= 2 && a.same_shape(y) && b.rank == a.rank && a.is_contiguous() && b.is_contiguous());
  SQC_REQUIRE(b.shape[0] == a.shape[0] && b.columns() == a.columns());
  if (!b.same_shape(a)) {
    for (int d = 1; d + 1 < a.rank; ++d) SQC_REQUIRE(b.shape[d] == 1);
  }
  SQC_REQUIRE(is_code(c.integer(0)) && is_code(c.integer(1)) && is_code(c.integer(2)));
  SQC_REQUIRE(are_bounds(c.number(2), c.number(3), c.integer(2)));
  return Status::ok();
}

namespace {

Status run_binary(RunContext& c, QbinaryOperation operation) noexcept {
  const Tensor &a = c.in(0), &b = c.in(1);
  QbinaryParams p = {};
  p.operation = operation;
  p.rows = a.rows();
  p.columns = a.columns();
  p.rows_for_b = b.same_shape(a) || a.shape[0] == 0 ? 1 : p.rows / a.shape[0];
  if (p.rows == 0) return Status::ok();
  p.a = a.data;
  p.b = b.data;
  p.y = c.out().data;
  p.a_zero = static_cast<std::int32_t>(c.integer(0));
  p.b_zero = static_cast<std::int32_t>(c.integer(1));
  p.zero = static_cast<std::int32_t>(c.integer(2));
  p.a_scale = static_cast<float>(c.number(0));
  p.b_scale = static_cast<float>(c.number(1));
  p.low = static_cast<float>(c.number(2));
  p.high = static_cast<float>(c.number(3));
  return qbinary(c.pool, c.kernels.qbinary, p);
}

}  // namespace

Status run_add_codes(RunContext& c) noexcept { return run_binary(c, QbinaryOperation::add); }
Status run_mul_codes(RunContext& c) noexcept { return run_binary(c, QbinaryOperation::mul); }

// Inputs: codes u8, table u8 [256]. Output: the table's entry of each code.
Status prepare_look_up_codes(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &table = c.in(1);
  SQC_REQUIRE(x.dtype == DType::u8 && c.out().dtype == DType::u8 && x.same_shape(c.out()) && x.is_contiguous());
  SQC_REQUIRE(table.dtype == DType::u8 && table.count() == 256 && table.is_contiguous());
  return Status::ok();
}

Status run_look_up_codes(RunContext& c) noexcept {
  const Tensor* const operands[] = {&c.out(), &c.in(0)};
  const std::uint8_t* table = c.in(1).data;
  return Iteration<2>({operands[0], operands[1]}).run(c.pool, [table](std::int64_t n, std::uint8_t* const* data, const std::int64_t*) {
    for (std::int64_t i = 0; i < n; ++i) data[0][i] = table[data[1][i]];
  });
}

// --- pooling -------------------------------------------------------------------------------------------

namespace {

enum Int { kKernel, kStride = 2, kPadding = 4, kDilation = 6 };

// The rows or columns of an image that a window sees: from `first` on, every `step`, before `end`.
struct Places {
  std::int64_t first, end, step;
};

Places places(std::int64_t out, std::int64_t stride, std::int64_t padding, std::int64_t dilation, std::int64_t kernel,
              std::int64_t size) noexcept {
  std::int64_t first = out * stride - padding, end = first + (kernel - 1) * dilation + 1;
  if (first < 0) first += (-first + dilation - 1) / dilation * dilation;
  return {first, end < size ? end : size, dilation};
}

Status check_pool(PrepareContext& c, int ints) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(is_image(x) && is_image(y) && x.dtype == y.dtype && x.shape[0] == y.shape[0] && x.shape[3] == y.shape[3]);
  for (int i = 0; i < ints; ++i) SQC_REQUIRE(c.integer(i) >= (i < 4 || i >= 6 ? 1 : 0) && c.integer(i) < kLargest);
  return Status::ok();
}

// v where it is larger, or a NaN.
std::uint8_t larger(std::uint8_t m, std::uint8_t v) noexcept { return v > m ? v : m; }
std::int8_t larger(std::int8_t m, std::int8_t v) noexcept { return v > m ? v : m; }
float larger(float m, float v) noexcept { return v > m || v != v ? v : m; }

// The largest of each of Channels neighbouring channels.
template <typename T, std::int64_t Channels>
void largest_of(const T* from, const Tensor& x, const Places& rows, const Places& columns, T lowest, T* to) noexcept {
  T found[Channels];
  for (std::int64_t k = 0; k < Channels; ++k) found[k] = lowest;
  for (std::int64_t i = rows.first; i < rows.end; i += rows.step) {
    for (std::int64_t j = columns.first; j < columns.end; j += columns.step) {
      const T* pixel = from + (i * x.shape[2] + j) * x.shape[3];
      for (std::int64_t k = 0; k < Channels; ++k) found[k] = larger(found[k], pixel[k]);
    }
  }
  for (std::int64_t k = 0; k < Channels; ++k) to[k] = found[k];
}

template <typename T>
Status pool_largest(RunContext& c, T lowest) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t channels = y.shape[3], pixels = y.rows(), work = y.count() * c.integer(0) * c.integer(1);
  return for_rows(c.pool, pixels, work, [&](std::int64_t pixel) {
    const std::int64_t image = pixel / y.shape[2] / y.shape[1];
    const Places rows = places(pixel / y.shape[2] % y.shape[1], c.integer(kStride), c.integer(kPadding),
                               c.integer(kDilation), c.integer(kKernel), x.shape[1]);
    const Places columns = places(pixel % y.shape[2], c.integer(kStride + 1), c.integer(kPadding + 1),
                                  c.integer(kDilation + 1), c.integer(kKernel + 1), x.shape[2]);
    T* to = y.as<T>() + pixel * channels;
    const T* from = x.as<T>() + image * x.shape[1] * x.shape[2] * channels;
    // Some channels at a time, in registers.
    constexpr std::int64_t kChannels = 64 / sizeof(T);
    std::int64_t k = 0;
    for (; k + kChannels <= channels; k += kChannels) largest_of<T, kChannels>(from + k, x, rows, columns, lowest, to + k);
    for (; k < channels; ++k) largest_of<T, 1>(from + k, x, rows, columns, lowest, to + k);
  });
}

}  // namespace

// x [N, H, W, C] of floats or bytes. ints: kernel, stride, padding and dilation, in both directions; what a window has
// outside the image does not count, and a window that has nothing inside gives the lowest value.
Status prepare_max_pool(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 || c.in(0).dtype == DType::u8 || c.in(0).dtype == DType::i8);
  return check_pool(c, 8);
}

Status run_max_pool(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::u8: return pool_largest<std::uint8_t>(c, 0);
    case DType::i8: return pool_largest<std::int8_t>(c, -128);
    default: return pool_largest<float>(c, -std::numeric_limits<float>::infinity());
  }
}

// x f32 [N, H, W, C]. ints: kernel, stride and padding, in both directions; whether padding counts; the divisor, or 0
// for the number of places that count.
Status prepare_average_pool(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && (c.integer(6) == 0 || c.integer(6) == 1));
  SQC_REQUIRE(c.integer(7) > -kLargest * kLargest && c.integer(7) < kLargest * kLargest);
  return check_pool(c, 6);
}

Status run_average_pool(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t channels = y.shape[3], work = y.count() * c.integer(0) * c.integer(1);
  return for_rows(c.pool, y.rows(), work, [&](std::int64_t pixel) {
    std::int64_t first[2], end[2], whole = 1, inside = 1;
    const std::int64_t at[2] = {pixel / y.shape[2] % y.shape[1], pixel % y.shape[2]};
    for (int d = 0; d < 2; ++d) {
      const std::int64_t size = x.shape[1 + d], padding = c.integer(kPadding + d);
      first[d] = at[d] * c.integer(kStride + d) - padding;
      end[d] = first[d] + c.integer(kKernel + d);
      end[d] = end[d] < size + padding ? end[d] : size + padding;
      whole *= end[d] - first[d];
      first[d] = first[d] > 0 ? first[d] : 0;
      end[d] = end[d] < size ? end[d] : size;
      inside *= end[d] > first[d] ? end[d] - first[d] : 0;
    }
    float* to = y.as<float>() + pixel * channels;
    for (std::int64_t k = 0; k < channels; ++k) to[k] = 0.0f;
    const float* image = x.as<float>() + pixel / y.shape[2] / y.shape[1] * x.stride[0];
    for (std::int64_t i = first[0]; i < end[0]; ++i) {
      for (std::int64_t j = first[1]; j < end[1]; ++j) {
        const float* from = image + (i * x.shape[2] + j) * channels;
        for (std::int64_t k = 0; k < channels; ++k) to[k] += from[k];
      }
    }
    const std::int64_t count = c.integer(7) != 0 ? c.integer(7) : c.integer(6) != 0 ? whole : inside;
    const auto divisor = static_cast<float>(count);
    for (std::int64_t k = 0; k < channels; ++k) to[k] /= divisor;
  });
}

// x f32 [N, H, W, C] -> [N, H', W', C]: the mean of the rows from floor(i H / H') to ceil((i + 1) H / H'), columns
// likewise.
Status prepare_adaptive_average(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(x.dtype == DType::f32 && y.dtype == DType::f32 && is_image(x) && is_image(y));
  SQC_REQUIRE(x.shape[0] == y.shape[0] && x.shape[3] == y.shape[3]);
  SQC_REQUIRE(y.count() == 0 || (x.shape[1] > 0 && x.shape[2] > 0));
  return Status::ok();
}

Status run_adaptive_average(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t channels = y.shape[3];
  return for_rows(c.pool, y.rows(), x.count() + y.count(), [&](std::int64_t pixel) {
    std::int64_t first[2], end[2];
    const std::int64_t at[2] = {pixel / y.shape[2] % y.shape[1], pixel % y.shape[2]};
    for (int d = 0; d < 2; ++d) {
      first[d] = at[d] * x.shape[1 + d] / y.shape[1 + d];
      end[d] = ((at[d] + 1) * x.shape[1 + d] + y.shape[1 + d] - 1) / y.shape[1 + d];
    }
    float* to = y.as<float>() + pixel * channels;
    for (std::int64_t k = 0; k < channels; ++k) to[k] = 0.0f;
    const float* image = x.as<float>() + pixel / y.shape[2] / y.shape[1] * x.stride[0];
    for (std::int64_t i = first[0]; i < end[0]; ++i) {
      for (std::int64_t j = first[1]; j < end[1]; ++j) {
        const float* from = image + (i * x.shape[2] + j) * channels;
        for (std::int64_t k = 0; k < channels; ++k) to[k] += from[k];
      }
    }
    const auto divisor = static_cast<float>((end[0] - first[0]) * (end[1] - first[1]));
    for (std::int64_t k = 0; k < channels; ++k) to[k] /= divisor;
  });
}

// The mean of whole images of codes: x u8 [N, H, W, P] -> [N, 1, 1, P]. ints: the zero points of x and of the result.
// floats: the scale of x in steps of the result, and the lowest and highest result, counted from its zero point.
// code = round(clamp(float(sum of x - x_zero) * (scale / float(pixels)))) + zero.
Status prepare_average_codes(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(x.dtype == DType::u8 && y.dtype == DType::u8 && is_image(x) && is_image(y));
  SQC_REQUIRE(x.shape[0] == y.shape[0] && y.shape[1] == 1 && y.shape[2] == 1 && x.shape[3] == y.shape[3]);
  SQC_REQUIRE(x.shape[1] * x.shape[2] <= (1 << 23) && (y.count() == 0 || x.shape[1] * x.shape[2] > 0));
  SQC_REQUIRE(is_code(c.integer(0)) && is_code(c.integer(1)) && are_bounds(c.number(1), c.number(2), c.integer(1)));
  return Status::ok();
}

Status run_average_codes(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t channels = y.shape[3], pixels = x.shape[1] * x.shape[2];
  const auto scale = static_cast<float>(c.number(0)) / static_cast<float>(pixels);
  const auto low = static_cast<float>(c.number(1)), high = static_cast<float>(c.number(2));
  const auto x_zero = static_cast<std::int32_t>(c.integer(0)), zero = static_cast<std::int32_t>(c.integer(1));
  constexpr std::int64_t kChannels = 64;  // at a time: their sums stay in the cache
  const std::int64_t parts = (channels + kChannels - 1) / kChannels;
  return for_rows(c.pool, x.shape[0] * parts, x.count(), [&](std::int64_t part) {
    const std::int64_t image = part / parts, first = part % parts * kChannels;
    const std::int64_t count = channels - first < kChannels ? channels - first : kChannels;
    std::int32_t sums[kChannels] = {};
    const std::uint8_t* from = x.data + image * pixels * channels + first;
    for (std::int64_t i = 0; i < pixels; ++i, from += channels) {
      for (std::int64_t k = 0; k < count; ++k) sums[k] += from[k];
    }
    for (std::int64_t k = 0; k < count; ++k) {
      const float value = static_cast<float>(sums[k] - x_zero * static_cast<std::int32_t>(pixels)) * scale;
      const float bounded = value > low ? (value < high ? value : high) : low;
      y.data[image * channels + first + k] = static_cast<std::uint8_t>(static_cast<std::int32_t>(std::nearbyint(bounded)) + zero);
    }
  });
}

// --- resizing and padding ------------------------------------------------------------------------------

namespace {

Status check_resize(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(is_image(x) && is_image(y) && x.dtype == y.dtype && x.shape[0] == y.shape[0] && x.shape[3] == y.shape[3]);
  SQC_REQUIRE(y.count() == 0 || (x.shape[1] > 0 && x.shape[2] > 0));
  SQC_REQUIRE(c.number(0) >= 0.0 && c.number(1) >= 0.0 && c.number(0) < 1e9 && c.number(1) < 1e9);
  return Status::ok();
}

}  // namespace

// x [N, H, W, C] -> [N, H', W', C]: the pixel floor(i * scale), and the last one at most. floats: input pixels for an
// output pixel, in both directions.
Status prepare_resize_nearest(PrepareContext& c) noexcept { return check_resize(c); }

Status run_resize_nearest(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t bytes = y.shape[3] * dtype_bytes(y.dtype);
  const auto place = [&](std::int64_t at, int d) {
    const auto found = static_cast<std::int64_t>(std::floor(static_cast<float>(at) * static_cast<float>(c.number(d))));
    return found < x.shape[1 + d] ? found : x.shape[1 + d] - 1;
  };
  return for_rows(c.pool, y.shape[0] * y.shape[1], y.count(), [&](std::int64_t row) {
    const std::uint8_t* from = x.data + (row / y.shape[1] * x.shape[1] + place(row % y.shape[1], 0)) * x.shape[2] * bytes;
    std::uint8_t* to = y.data + row * y.shape[2] * bytes;
    for (std::int64_t j = 0; j < y.shape[2]; ++j) {
      std::memcpy(to + j * bytes, from + place(j, 1) * bytes, static_cast<std::size_t>(bytes));
    }
  });
}

// x f32 [N, H, W, C] -> [N, H', W', C], between the four nearest pixels. ints: whether corners are aligned. floats:
// input pixels for an output pixel, in both directions.
Status prepare_resize_bilinear(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && (c.integer(0) == 0 || c.integer(0) == 1));
  return check_resize(c);
}

Status run_resize_bilinear(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t channels = y.shape[3];
  struct Between {
    std::int64_t low, high;
    float share;  // of the higher one
  };
  const auto between = [&](std::int64_t at, int d) -> Between {
    const auto scale = static_cast<float>(c.number(d));
    float place = c.integer(0) != 0 ? scale * static_cast<float>(at) : scale * (static_cast<float>(at) + 0.5f) - 0.5f;
    place = place > 0.0f ? place : 0.0f;
    const std::int64_t last = x.shape[1 + d] - 1;
    std::int64_t low = static_cast<std::int64_t>(place);
    low = low < last ? low : last;
    const float share = place - static_cast<float>(low);
    return {low, low < last ? low + 1 : last, share < 1.0f ? share : 1.0f};
  };
  return for_rows(c.pool, y.shape[0] * y.shape[1], 4 * y.count(), [&](std::int64_t row) {
    const Between h = between(row % y.shape[1], 0);
    const float* image = x.as<float>() + row / y.shape[1] * x.stride[0];
    const float* upper = image + h.low * x.shape[2] * channels;
    const float* lower = image + h.high * x.shape[2] * channels;
    float* to = y.as<float>() + row * y.shape[2] * channels;
    for (std::int64_t j = 0; j < y.shape[2]; ++j, to += channels) {
      const Between w = between(j, 1);
      const std::int64_t left = w.low * channels, right = w.high * channels;
      for (std::int64_t k = 0; k < channels; ++k) {
        const float above = (1.0f - w.share) * upper[left + k] + w.share * upper[right + k];
        const float below = (1.0f - w.share) * lower[left + k] + w.share * lower[right + k];
        to[k] = (1.0f - h.share) * above + h.share * below;
      }
    }
  });
}

// Inputs: x, and one element of its type that fills what is added. ints: elements before the first, for each dimension.
Status prepare_pad(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(x.dtype == y.dtype && c.in(1).dtype == x.dtype && c.in(1).count() == 1);
  SQC_REQUIRE(x.rank == y.rank && x.rank == c.ints());
  for (int d = 0; d < x.rank; ++d) SQC_REQUIRE(c.integer(d) >= 0 && c.integer(d) <= y.shape[d] - x.shape[d]);
  return Status::ok();
}

Status run_pad(RunContext& c) noexcept {
  Tensor part = c.out(), filler = c.in(1);
  filler.rank = part.rank;
  for (int d = 0; d < part.rank; ++d) filler.shape[d] = 1, filler.stride[d] = 0;
  SQC_RETURN_IF_ERROR(copy_elements(c.pool, part, filler));
  for (int d = 0; d < part.rank; ++d) {
    part.data += c.integer(d) * part.stride[d] * dtype_bytes(part.dtype);
    part.shape[d] = c.in(0).shape[d];
  }
  return copy_elements(c.pool, part, c.in(0));
}

}  // namespace sqc
