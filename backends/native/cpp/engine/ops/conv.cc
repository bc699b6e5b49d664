// Convolutions of images whose channels lie together, in floats and in codes.
//
// ints of all: kernel, stride, padding before, padding behind, dilation, spread, each in both directions; groups,
// and channels in and out of a group. What they mean says kernels/window.h.

#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"
#include "engine/ops/packed_weights.h"

namespace sqc {
namespace {

constexpr std::int64_t kLargest = std::int64_t{1} << 24;    // of a side of an image, a kernel, a stride, …
constexpr std::int64_t kMostTaps = std::int64_t{1} << 20;
constexpr std::int64_t kMostChannels = std::int64_t{1} << 24;

enum Int { kKernel, kStride = 2, kBefore = 4, kBehind = 6, kDilation = 8, kSpread = 10, kGroups = 12, kIn, kOut };
enum CodeInt { kInZero = 15, kOutZero, kOtherZero, kChunk };

// Where the arrays by output begin: behind x and the weight, which is three arrays if only parts of it are stored.
constexpr int kDenseArrays = 2, kPartArrays = 4;

std::int64_t round_up_to(std::int64_t n, std::int64_t unit) noexcept { return (n + unit - 1) / unit * unit; }

// The geometry of an operator whose input 0 and output 0 are images.
Status read_window(const Operands& c, Window* w) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  SQC_REQUIRE(x.rank == 4 && y.rank == 4 && x.shape[0] == y.shape[0] && x.is_contiguous());
  for (int d = 1; d < 3; ++d) SQC_REQUIRE(x.shape[d] < kLargest && y.shape[d] < kLargest);
  for (int d = 0; d < 2; ++d) {
    const std::int64_t kernel = c.integer(kKernel + d), stride = c.integer(kStride + d), before = c.integer(kBefore + d),
                       behind = c.integer(kBehind + d), dilation = c.integer(kDilation + d), spread = c.integer(kSpread + d);
    SQC_REQUIRE(kernel >= 1 && stride >= 1 && dilation >= 1 && spread >= 1);
    SQC_REQUIRE(kernel < kLargest && stride < kLargest && dilation < kLargest && spread < kLargest);
    SQC_REQUIRE(before > -kLargest && before < kLargest && behind > -kLargest && behind < kLargest);
    const std::int64_t size = x.shape[1 + d] == 0 ? 0 : (x.shape[1 + d] - 1) * spread + 1;
    const std::int64_t room = size + before + behind - dilation * (kernel - 1) - 1;
    if (room < 0) {
      return misfit("the kernel covers %lld places, more than the %lld of the padded image",
                    static_cast<long long>(dilation * (kernel - 1) + 1), static_cast<long long>(size + before + behind));
    }
    SQC_REQUIRE(y.shape[1 + d] == room / stride + 1);
  }
  *w = {x.shape[0],         x.shape[1],         x.shape[2],         y.shape[1],         y.shape[2],
        c.integer(kKernel), c.integer(kKernel + 1), c.integer(kStride), c.integer(kStride + 1), c.integer(kBefore),
        c.integer(kBefore + 1), c.integer(kDilation), c.integer(kDilation + 1), c.integer(kSpread), c.integer(kSpread + 1)};
  SQC_REQUIRE(w->taps() <= kMostTaps);
  const std::int64_t groups = c.integer(kGroups), in = c.integer(kIn), out = c.integer(kOut);
  SQC_REQUIRE(groups >= 1 && groups <= kMostChannels && in >= 0 && in <= kMostChannels && out >= 0 && out <= kMostChannels);
  return Status::ok();
}

Status wrong_weights(const char* what) noexcept {
  return Status::error(StatusCode::kDamaged, "the file is damaged: the weights of a convolution have wrong %s", what);
}

// Kernels follow starts and indices without looking. Each part has four weights: of one of the units, if it has one
// index, or each of its own.
Status check_parts(const PackedWeights& w, std::int64_t outputs, std::int64_t units, std::int64_t indices) noexcept {
  std::int64_t chunk = 0;
  SQC_RETURN_IF_ERROR(w.integer(kChunk, &chunk));
  if (chunk < 1 || chunk > kQconvPartMaxChunk) return wrong_weights("blocks");
  const std::int64_t chunks = (units + chunk - 1) / chunk, starts = chunks * outputs + 1, count = w.bytes(1) / indices;
  if (!w.is(1, DType::u8, Layout::qblock_index, count * indices) || !w.is(2, DType::i8, Layout::qblock_values, count * 4) ||
      !w.is(3, DType::u64, Layout::qblock_start, starts)) {
    return wrong_weights("arrays");
  }
  const auto* index = w.data<std::uint8_t>(1);
  const auto* start = w.data<std::uint64_t>(3);
  if (start[0] != 0 || start[starts - 1] != static_cast<std::uint64_t>(count)) return wrong_weights("starts");
  for (std::int64_t i = 0; i + 1 < starts; ++i) {
    if (start[i] > start[i + 1] || start[i + 1] > static_cast<std::uint64_t>(count)) return wrong_weights("starts");
    // The last chunk may be shorter.
    const std::int64_t first = i / outputs * chunk, room = units - first < chunk ? units - first : chunk;
    const auto width = static_cast<std::uint64_t>(indices);
    for (std::uint64_t b = start[i] * width; b < start[i + 1] * width; ++b) {
      if (index[b] >= room) return wrong_weights("blocks");
    }
  }
  return Status::ok();
}

}  // namespace

Status check_convolution_weights(const Plan& plan, const format::Operator& step) noexcept {
  const auto id = static_cast<OperatorId>(step.kind);
  const bool sparse = id == OperatorId::conv_q8_sparse, parts = sparse || id == OperatorId::conv_q8_block;
  const bool codes = parts || id == OperatorId::conv_q8 || id == OperatorId::conv_q8_depthwise;
  const bool depthwise = id == OperatorId::conv_depthwise || id == OperatorId::conv_q8_depthwise;
  if (!codes && id != OperatorId::conv && id != OperatorId::conv_depthwise) return Status::ok();
  const PackedWeights w(plan, step);
  std::int64_t height = 0, width = 0, groups = 0, in = 0, out = 0;
  SQC_RETURN_IF_ERROR(w.integer(kKernel, &height));
  SQC_RETURN_IF_ERROR(w.integer(kKernel + 1, &width));
  SQC_RETURN_IF_ERROR(w.integer(kGroups, &groups));
  SQC_RETURN_IF_ERROR(w.integer(kIn, &in));
  SQC_RETURN_IF_ERROR(w.integer(kOut, &out));
  if (height < 1 || width < 1 || height > kMostTaps || width > kMostTaps || height * width > kMostTaps || groups < 1 ||
      groups > kMostChannels || in < 0 || in > kMostChannels || out < 0 || out > kMostChannels) {
    return wrong_weights("sizes");
  }
  if (depthwise && (in != 1 || out != 1)) return wrong_weights("sizes");
  // Outputs of a group in sixteens, products of one output, and everything: none of them overflows.
  const std::int64_t outputs = depthwise ? round_up_to(groups, 16) : groups * round_up_to(out, 16);
  const std::int64_t k = height * width * (codes && !depthwise ? round_up_to(in, 4) : in);
  std::int64_t count = 0;
  if (__builtin_mul_overflow(outputs, k, &count) || count > (std::int64_t{1} << 48)) return wrong_weights("sizes");
  if (!codes) {
    // Of a depthwise convolution in floats nothing is filled up.
    const std::int64_t floats = depthwise ? height * width * groups : count;
    if (!w.is(1, DType::f32, depthwise ? Layout::plain : Layout::fgemm, floats)) return wrong_weights("arrays");
    if (w.has(2) && !w.is(2, DType::f32, depthwise ? Layout::plain : Layout::panels, depthwise ? groups : outputs)) {
      return wrong_weights("biases");
    }
    return Status::ok();
  }
  if (!depthwise) SQC_RETURN_IF_ERROR(qgemm_check_sizes(out, k));
  if (parts) {
    if (groups != 1) return wrong_weights("sizes");
    SQC_RETURN_IF_ERROR(check_parts(w, outputs, sparse ? k : k / 4, sparse ? 4 : 1));
  } else if (!w.is(1, DType::i8, depthwise ? Layout::plain : Layout::qgemm, count)) {
    return wrong_weights("arrays");
  }
  const int arrays = parts ? kPartArrays : kDenseArrays;
  if (!w.is(arrays, DType::i32, Layout::panels, outputs) || !w.is(arrays + 1, DType::i32, Layout::panels, outputs) ||
      !w.is(arrays + 2, DType::f32, Layout::panels, outputs) || !w.is(arrays + 3, DType::f32, Layout::panels, outputs)) {
    return wrong_weights("scales");
  }
  return Status::ok();
}

namespace {

// That the weight's layout is its operator's was checked with the file.
bool is_depthwise(const Operands& c) noexcept { return c.in(1).layout == Layout::plain; }

FconvParams float_params(const Operands& c, const Window& window) noexcept {
  FconvParams p = {};
  p.window = window;
  p.groups = c.integer(kGroups);
  p.in_channels = c.integer(kIn);
  p.out_channels = c.integer(kOut);
  p.depthwise = is_depthwise(c);
  p.x_stride = c.in(0).shape[3];
  p.y_stride = c.out().shape[3];
  p.low = static_cast<float>(c.number(0));
  p.high = static_cast<float>(c.number(1));
  return p;
}

}  // namespace

// Inputs: x f32 [N, H, W, C], the weight, and bias if there is one. floats: the lowest and highest result. Output
// [N, H', W', O].
Status prepare_conv(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.out().dtype == DType::f32 && c.in(0).layout == Layout::plain);
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  const FconvParams p = float_params(c, window);
  SQC_REQUIRE(c.in(0).shape[3] == p.groups * p.in_channels && c.out().shape[3] == p.groups * p.out_channels);
  c.accept_packed();
  c.need_scratch(fconv_scratch_bytes(p) * c.threads);
  return Status::ok();
}

namespace {

Status run_float(RunContext& c) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  FconvParams p = float_params(c, window);
  p.x = c.in(0).as<float>();
  p.weights = c.in(1).as<float>();
  p.bias = c.has(2) ? c.in(2).as<float>() : nullptr;
  p.y = c.out().as<float>();
  return fconv(c.pool, c.kernels.fconv, p, c.scratch);
}

}  // namespace

Status run_conv(RunContext& c) noexcept { return run_float(c); }
Status run_conv_depthwise(RunContext& c) noexcept { return run_float(c); }

namespace {

// Whether input i is an image of codes with pixels as `y` has, of `channels` channels or more.
bool is_image_like(const Operands& c, int i, const Tensor& y, std::int64_t channels) noexcept {
  const Tensor& image = c.in(i);
  return image.dtype == DType::u8 && image.layout == Layout::plain && image.rank == 4 && image.is_contiguous() &&
         image.shape[0] == y.shape[0] && image.shape[1] == y.shape[1] && image.shape[2] == y.shape[2] &&
         image.shape[3] >= channels;
}

// `arrays` is the input with the first array by output: sums. The other image is four behind it, the table five.
QconvOutput code_output(const Operands& c, int arrays) noexcept {
  QconvOutput y = {};
  y.stride = c.out().shape[3];
  y.low = static_cast<float>(c.number(0));
  y.high = static_cast<float>(c.number(1));
  y.own_scale = static_cast<float>(c.number(2));
  y.other_scale = static_cast<float>(c.number(3));
  y.sum_low = static_cast<float>(c.number(4));
  y.sum_high = static_cast<float>(c.number(5));
  y.zero = static_cast<std::int32_t>(c.integer(kOutZero));
  y.other_zero = static_cast<std::int32_t>(c.integer(kOtherZero));
  if (c.has(arrays + 4)) y.other_stride = c.in(arrays + 4).shape[3];
  return y;
}

QconvParams code_params(const Operands& c, const Window& window, int arrays) noexcept {
  QconvParams p = {};
  p.window = window;
  p.groups = c.integer(kGroups);
  p.in_channels = c.integer(kIn);
  p.out_channels = c.integer(kOut);
  p.x_stride = c.in(0).shape[3];
  p.x_zero = static_cast<std::int32_t>(c.integer(kInZero));
  p.y = code_output(c, arrays);
  return p;
}

QdepthwiseParams depthwise_params(const Operands& c, const Window& window) noexcept {
  QdepthwiseParams p = {};
  p.window = window;
  p.channels = c.integer(kGroups);
  p.x_stride = c.in(0).shape[3];
  p.x_zero = static_cast<std::int32_t>(c.integer(kInZero));
  p.y = code_output(c, kDenseArrays);
  return p;
}

bool is_code(std::int64_t zero) noexcept { return zero >= 0 && zero <= 255; }

// Whole numbers of steps that a byte can hold, counted from the zero point.
bool are_bounds(double low, double high, std::int64_t zero) noexcept {
  const auto z = static_cast<double>(zero);
  return low >= -z && high <= 255.0 - z && low <= high && low == static_cast<double>(static_cast<int>(low)) &&
         high == static_cast<double>(static_cast<int>(high));
}

template <class Params>
void set_data(const RunContext& c, int arrays, Params* p) noexcept {
  p->x = c.in(0).data;
  p->weights = c.in(1).as<std::int8_t>();
  p->bias = c.in(arrays + 1).as<std::int32_t>();
  p->scale = c.in(arrays + 2).as<float>();
  p->offset = c.in(arrays + 3).as<float>();
  if (c.out().dtype == DType::f32) {
    p->y.values = c.out().as<float>();
  } else {
    p->y.codes = c.out().data;
  }
  p->y.other = c.has(arrays + 4) ? c.in(arrays + 4).data : nullptr;
  p->y.table = c.has(arrays + 5) ? c.in(arrays + 5).data : nullptr;
}

}  // namespace

namespace {

Status check_codes(PrepareContext& c, const Window& window, int arrays, bool depthwise) noexcept {
  const Tensor &x = c.in(0), &y = c.out();
  const std::int64_t groups = c.integer(kGroups), in = c.integer(kIn), channels = groups * c.integer(kOut);
  const std::int64_t read = depthwise ? round_up_to(groups, 16) : groups * round_up_to(in, 4);
  const int other = arrays + 4, table = arrays + 5;
  SQC_REQUIRE(x.dtype == DType::u8 && x.layout == Layout::plain && window.batch >= 0);
  SQC_REQUIRE(depthwise || groups == 1 || in % 4 == 0);
  SQC_REQUIRE(x.shape[3] >= read && is_code(c.integer(kInZero)));
  if (y.dtype == DType::f32) {
    SQC_REQUIRE(!c.has(other) && !c.has(table) && y.shape[3] == channels);
    return Status::ok();
  }
  const std::int64_t zero = c.integer(kOutZero), other_zero = c.integer(kOtherZero);
  SQC_REQUIRE(y.dtype == DType::u8 && y.shape[3] == round_up_to(channels, 16) && is_code(zero));
  if (c.has(other)) {
    // The sum has the output's zero point; codes before it only have to stay whole numbers of a few digits.
    SQC_REQUIRE(is_image_like(c, other, y, y.shape[3]) && is_code(other_zero));
    SQC_REQUIRE(are_bounds(c.number(4), c.number(5), zero));
    SQC_REQUIRE(c.number(0) >= -255.0 && c.number(1) <= 255.0 && c.number(0) <= c.number(1));
  } else {
    SQC_REQUIRE(are_bounds(c.number(0), c.number(1), zero));
  }
  if (c.has(table)) {
    SQC_REQUIRE(c.in(table).dtype == DType::u8 && c.in(table).layout == Layout::plain && c.in(table).is_contiguous());
    SQC_REQUIRE(c.in(table).count() == 256);
  }
  return Status::ok();
}

}  // namespace

// Inputs: x u8 [N, H, W, P]; the weight; sums of each output's weights, biases less the zero point's share, scales and
// offsets in steps of the output; another image to add, and a table u8 [256] that codes are looked up in, if there
// are any. Further ints: the zero points of x, of the result before the table, and of the other image. floats: the
// lowest and highest result, the scales of result and other image, the lowest and highest sum. Output u8
// [N, H', W', P'], or f32 [N, H', W', O] without other image and table.
Status prepare_conv_q8(PrepareContext& c) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  const bool depthwise = is_depthwise(c);
  SQC_RETURN_IF_ERROR(check_codes(c, window, kDenseArrays, depthwise));
  c.accept_packed();
  c.need_scratch((depthwise ? qdepthwise_scratch_bytes(depthwise_params(c, window))
                            : qconv_scratch_bytes(code_params(c, window, kDenseArrays))) * c.threads);
  return Status::ok();
}

// The same with the weight in three inputs: index, values, start; see kernels/qconv/parts.h. One more of the ints: units of a chunk.
Status prepare_conv_q8_parts(PrepareContext& c) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  SQC_RETURN_IF_ERROR(check_codes(c, window, kPartArrays, false));
  c.accept_packed();
  c.need_scratch(qconv_parts_scratch_bytes(code_params(c, window, kPartArrays)) * c.threads);
  return Status::ok();
}

Status run_conv_q8(RunContext& c) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  QconvParams p = code_params(c, window, kDenseArrays);
  set_data(c, kDenseArrays, &p);
  p.sum = c.in(kDenseArrays).as<std::int32_t>();
  return qconv(c.pool, c.kernels.qconv, p, c.scratch);
}

Status run_conv_q8_depthwise(RunContext& c) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  QdepthwiseParams p = depthwise_params(c, window);
  set_data(c, kDenseArrays, &p);
  return qdepthwise(c.pool, c.kernels.qdepthwise, p, c.scratch);
}

namespace {

// Parameters of a kernel family whose weights are index, values and start.
template <class Params>
Status part_params(const RunContext& c, Params* p) noexcept {
  Window window;
  SQC_RETURN_IF_ERROR(read_window(c, &window));
  *p = {code_params(c, window, kPartArrays), c.integer(kChunk), c.in(1).as<std::uint8_t>(), c.in(2).as<std::int8_t>(),
        c.in(3).as<std::uint64_t>()};
  set_data(c, kPartArrays, &p->dense);
  p->dense.sum = c.in(kPartArrays).as<std::int32_t>();
  return Status::ok();
}

}  // namespace

Status run_conv_q8_block(RunContext& c) noexcept {
  QconvblockParams p;
  SQC_RETURN_IF_ERROR(part_params(c, &p));
  return qconvblock(c.pool, c.kernels.qconvblock, p, c.scratch);
}

Status run_conv_q8_sparse(RunContext& c) noexcept {
  QconvsparseParams p;
  SQC_RETURN_IF_ERROR(part_params(c, &p));
  return qconvsparse(c.pool, c.kernels.qconvsparse, p, c.scratch);
}

}  // namespace sqc
