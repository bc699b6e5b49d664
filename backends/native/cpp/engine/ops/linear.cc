// Products with packed weights, and the quantization of their activations: the operands of the kernels.

#include <cmath>

#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"
#include "engine/ops/quantized_rows.h"

namespace sqc {
namespace {

// --- quantize_rows -----------------------------------------------------------------------------------

// The scale and zero point of all of x, by the formula of kernels/quantize for one row.
void tensor_scale(const float* x, std::int64_t count, float* scale, std::int32_t* zero_point) noexcept {
  float low = 0.0f, high = 0.0f;
  bool finite = true;
  for (std::int64_t i = 0; i < count; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
    finite = finite && x[i] - x[i] == 0.0f;
  }
  *zero_point = 0;
  *scale = 1.0f;
  if (!finite) *scale = NAN;
  float span = high - low;
  if (!finite || span == 0.0f) return;
  span = span < __FLT_MAX__ ? span : __FLT_MAX__;
  *scale = span / 255.0f > 0x1p-63f ? span / 255.0f : 0x1p-63f;
  const float zero = -low / *scale;
  *zero_point = static_cast<std::int32_t>(std::nearbyint(zero < 255.0f ? zero : 255.0f));
}

}  // namespace

// Inputs: x [.., K]; for a given scale also the scale f32 and the zero point i32, one each. ints: RowScale,
// whether codes are signed, columns that share a scale (0: a row), columns that share a sum (0: a row).
// Outputs: codes [M, stride >= K padded], scale [M], [M, groups] or [1], zero point [M] or [1], sum [M, groups].
Status prepare_quantize_rows(PrepareContext& c) noexcept {
  const Tensor& x = c.in(0);
  SQC_REQUIRE(x.dtype == DType::f32 && x.rank >= 1 && x.is_contiguous());
  return check_rows(c, RowOperands{0, 1, 0});
}

Status run_quantize_rows(RunContext& c) noexcept {
  QuantizeParams params = row_params(c, RowOperands{0, 1, 0});
  params.x = c.in(0).as<float>();
  params.x_stride = params.k;
  // A tensor that is not finite has the scale NaN, and so has its product. The kernel refuses such a scale;
  // the codes do not matter.
  float one = 1.0f;
  if (row_scale(c, 0) == RowScale::affine_tensor) {
    tensor_scale(params.x, params.m * params.k, params.scale, params.zero_point);
    if (*params.scale != *params.scale) params.scale = &one;
  }
  return quantize(c.pool, c.kernels.quantize, params);
}

// --- 8-bit products ----------------------------------------------------------------------------------

namespace {

OperatorId id_of(const format::Operator& step) noexcept { return static_cast<OperatorId>(step.kind); }

// The constants of one product. The weight's arrays begin behind the three of the activation.
struct WeightArrays {
  const Plan& plan;
  const format::Operator& step;

  // Whether input i is a constant of that type and layout, with `count` elements.
  bool is(int i, DType dtype, Layout layout, std::int64_t count) const noexcept {
    const format::Value* value = find(i);
    return value != nullptr && value->dtype == static_cast<std::uint8_t>(dtype) &&
           value->layout == static_cast<std::uint8_t>(layout) && count >= 0 &&
           plan.tensors[value->source].bytes == static_cast<std::uint64_t>(count * dtype_bytes(dtype));
  }
  bool has(int i) const noexcept { return i < step.inputs && plan.lists[step.first_list + i] != format::kNone; }
  bool optional(int i, DType dtype, Layout layout, std::int64_t count) const noexcept {
    return !has(i) || is(i, dtype, layout, count);
  }
  std::int64_t bytes(int i) const noexcept {
    const format::Value* value = find(i);
    return value == nullptr ? 0 : static_cast<std::int64_t>(plan.tensors[value->source].bytes);
  }
  template <typename T>
  const T* data(int i) const noexcept {
    return reinterpret_cast<const T*>(plan.file + plan.tensors[find(i)->source].offset);
  }
  Status integer(int i, std::int64_t* value) const noexcept {
    return evaluate_size(plan, plan.lists[step.first_list + step.inputs + step.outputs + i], nullptr, value);
  }

 private:
  const format::Value* find(int i) const noexcept {
    if (!has(i)) return nullptr;
    const format::Value& value = plan.values[plan.lists[step.first_list + i]];
    return value.kind == static_cast<std::uint8_t>(format::ValueKind::constant) ? &value : nullptr;
  }
};

Status wrong_weights(const char* what) noexcept {
  return Status::error(StatusCode::kDamaged, "the file is damaged: the weights of a product have wrong %s", what);
}

// starts[0..panels] is ascending from 0, and ends where the values do.
bool starts_fit(const std::uint64_t* starts, std::int64_t panels, std::uint64_t end) noexcept {
  if (starts[0] != 0 || starts[panels] != end) return false;
  for (std::int64_t i = 0; i < panels; ++i) {
    if (starts[i] > starts[i + 1]) return false;
  }
  return true;
}

int bits_set(std::uint64_t x) noexcept { return __builtin_popcountll(x); }

Status check_q8_sparse(const WeightArrays& w, std::int64_t panels, std::int64_t k) noexcept {
  const std::int64_t tiles = (k + 3) / 4;
  if (!w.is(3, DType::u64, Layout::qsparse_masks, panels * tiles) ||
      !w.is(5, DType::u64, Layout::panel_starts, panels + 1) ||
      !w.is(4, DType::u8, Layout::qsparse_values, w.bytes(4)) || w.bytes(4) < kQsparseValueSlack) {
    return wrong_weights("arrays");
  }
  const auto* masks = w.data<std::uint64_t>(3);
  const auto* starts = w.data<std::uint64_t>(5);
  if (!starts_fit(starts, panels, static_cast<std::uint64_t>(w.bytes(4) - kQsparseValueSlack))) return wrong_weights("starts");
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    std::uint64_t count = 0;
    for (std::int64_t tile = 0; tile < tiles; ++tile) count += static_cast<unsigned>(bits_set(masks[panel * tiles + tile]));
    if (count != starts[panel + 1] - starts[panel]) return wrong_weights("masks");
  }
  return Status::ok();
}

Status check_q8_block(const WeightArrays& w, std::int64_t n, std::int64_t panels, std::int64_t k) noexcept {
  std::int64_t outputs = 0, chunk = 0;
  SQC_RETURN_IF_ERROR(w.integer(2, &outputs));
  SQC_RETURN_IF_ERROR(w.integer(3, &chunk));
  if ((outputs != 1 && outputs != 4 && outputs != 16) || chunk < 1 || chunk > 256) return wrong_weights("blocks");
  const std::int64_t count = w.bytes(3), starts = qblock_start_count(n, k, outputs, chunk);
  if (!w.is(3, DType::u8, Layout::qblock_index, count) || !w.is(4, DType::i8, Layout::qblock_values, count * outputs * 4) ||
      !w.is(5, DType::u64, Layout::qblock_start, starts) || !w.is(6, DType::u64, Layout::panel_starts, panels + 1)) {
    return wrong_weights("arrays");
  }
  const auto* index = w.data<std::uint8_t>(3);
  const auto* start = w.data<std::uint64_t>(5);
  if (!starts_fit(start, starts - 1, static_cast<std::uint64_t>(count)) ||
      !starts_fit(w.data<std::uint64_t>(6), panels, static_cast<std::uint64_t>(count))) {
    return wrong_weights("starts");
  }
  // Each index is a unit of its chunk; the last chunk may be shorter.
  const std::int64_t units = (k + 3) / 4, rows = panels * 16 / outputs;
  for (std::int64_t i = 0; i + 1 < starts; ++i) {
    const std::int64_t first = i / rows * chunk, room = units - first < chunk ? units - first : chunk;
    for (std::uint64_t b = start[i]; b < start[i + 1]; ++b) {
      if (index[b] >= room) return wrong_weights("blocks");
    }
  }
  return Status::ok();
}

Status check_q8(const WeightArrays& w) noexcept {
  std::int64_t n = 0, k = 0;
  SQC_RETURN_IF_ERROR(w.integer(0, &n));
  SQC_RETURN_IF_ERROR(w.integer(1, &k));
  SQC_RETURN_IF_ERROR(qgemm_check_sizes(n, k));
  if (n > (std::int64_t{1} << 31)) return wrong_weights("sizes");
  const std::int64_t panels = (n + 15) / 16;
  int arrays = 4;  // the first array behind those of the form
  switch (id_of(w.step)) {
    case OperatorId::linear_q8_sparse:
      SQC_RETURN_IF_ERROR(check_q8_sparse(w, panels, k));
      arrays = 6;
      break;
    case OperatorId::linear_q8_block:
      SQC_RETURN_IF_ERROR(check_q8_block(w, n, panels, k));
      arrays = 7;
      break;
    default:
      if (!w.is(3, DType::i8, Layout::qgemm, qgemm_packed_bytes(n, k))) return wrong_weights("arrays");
  }
  if (!w.is(arrays, DType::i32, Layout::panels, panels * 16) || !w.is(arrays + 1, DType::f32, Layout::panels, panels * 16) ||
      !w.optional(arrays + 2, DType::f32, Layout::panels, panels * 16)) {
    return wrong_weights("scales");
  }
  return Status::ok();
}

// Everything about the activation that the product depends on; the weights were checked with the file.
Status check_product(PrepareContext& c, std::int64_t k_read) noexcept {
  const Tensor &codes = c.in(0), &out = c.out();
  SQC_REQUIRE(codes.rank >= 1 && codes.is_contiguous() && codes.layout == Layout::plain);
  SQC_REQUIRE(codes.columns() >= k_read);
  SQC_REQUIRE(out.dtype == DType::f32 && out.rank >= 1 && out.columns() == c.integer(0) && out.rows() == codes.rows());
  c.accept_packed();
  return Status::ok();
}

// One for each row, or one for all.
bool fits_rows(const Tensor& tensor, DType dtype, std::int64_t rows) noexcept {
  return tensor.dtype == dtype && tensor.layout == Layout::plain && tensor.is_contiguous() &&
         (tensor.count() == rows || tensor.count() == 1);
}

}  // namespace

// Inputs: codes u8 [.., stride], scale f32 and zero point i32 ([M] or [1]), then the weight:
//   linear_q8         tiles
//   linear_q8_sparse  masks, values, starts
//   linear_q8_block   index, values, start, blocks before
// then sums, scales, and bias if there is one. ints: n, k; of blocks also their outputs and the chunk.
// floats: the lowest and highest result. Output [.., n].
Status prepare_linear_q8(PrepareContext& c) noexcept {
  const std::int64_t k = c.integer(1), m = c.in(0).rows();
  SQC_REQUIRE(c.in(0).dtype == DType::u8);
  SQC_RETURN_IF_ERROR(check_product(c, round_up(k, 4)));
  SQC_REQUIRE(fits_rows(c.in(1), DType::f32, m) && fits_rows(c.in(2), DType::i32, m));
  if (c.inputs() >= 9 && c.in(3).layout == Layout::qblock_index) {
    c.need_scratch(round_up(qblock_interleaved_bytes(m, k), 64) + c.threads * kQblockSumCount * 4);
  } else if (c.in(3).layout == Layout::qsparse_masks) {
    c.need_scratch(qsparse_scratch_bytes(m, k) * c.threads);
  }
  return Status::ok();
}

namespace {

QgemmParams q8_params(const RunContext& c, int sum) noexcept {
  const Tensor& codes = c.in(0);
  QgemmParams p = {};
  p.m = codes.rows();
  p.n = c.integer(0);
  p.k = c.integer(1);
  p.a = codes.data;
  p.a_stride = codes.columns();
  p.a_scale = c.in(1).as<float>();
  p.a_scale_stride = c.in(1).count() == 1 ? 0 : 1;
  p.a_zero = c.in(2).as<std::int32_t>();
  p.a_zero_stride = c.in(2).count() == 1 ? 0 : 1;
  p.b_sum = c.in(sum).as<std::int32_t>();
  p.b_scale = c.in(sum + 1).as<float>();
  p.bias = c.has(sum + 2) ? c.in(sum + 2).as<float>() : nullptr;
  p.c = c.out().as<float>();
  p.c_stride = p.n;
  p.low = static_cast<float>(c.number(0));
  p.high = static_cast<float>(c.number(1));
  return p;
}

}  // namespace

Status run_linear_q8(RunContext& c) noexcept {
  QgemmParams params = q8_params(c, 4);
  params.b = c.in(3).as<std::int8_t>();
  return qgemm(c.pool, c.kernels.qgemm, params);
}

Status run_linear_q8_sparse(RunContext& c) noexcept {
  const QsparseParams params = {q8_params(c, 6), c.in(3).as<std::uint64_t>(), c.in(4).as<std::uint8_t>(),
                                c.in(5).as<std::uint64_t>()};
  return qsparse(c.pool, c.kernels.qsparse, params, c.scratch);
}

Status run_linear_q8_block(RunContext& c) noexcept {
  const QgemmParams dense = q8_params(c, 7);
  const QblockParams params = {dense,
                               c.integer(2),
                               c.integer(3),
                               c.in(3).as<std::uint8_t>(),
                               c.in(4).as<std::int8_t>(),
                               c.in(5).as<std::uint64_t>(),
                               c.in(6).as<std::uint64_t>(),
                               c.scratch};
  auto* sums = reinterpret_cast<std::int32_t*>(c.scratch + round_up(qblock_interleaved_bytes(dense.m, dense.k), 64));
  return qblock(c.pool, c.kernels.qblock, params, sums);
}

// --- float products ----------------------------------------------------------------------------------

namespace {

FgemmType float_type(const Tensor& weight) noexcept {
  return weight.dtype == DType::bf16 ? FgemmType::bf16 : FgemmType::f32;
}

Status check_float(const WeightArrays& w) noexcept {
  std::int64_t n = 0, k = 0;
  SQC_RETURN_IF_ERROR(w.integer(0, &n));
  SQC_RETURN_IF_ERROR(w.integer(1, &k));
  constexpr std::int64_t limit = std::int64_t{1} << 31;
  if (n < 0 || k < 0 || n > limit || k > limit) return wrong_weights("sizes");
  const std::int64_t outputs = round_up(n, 16);
  if ((!w.is(1, DType::f32, Layout::fgemm, outputs * k) && !w.is(1, DType::bf16, Layout::fgemm, outputs * k)) ||
      !w.optional(2, DType::f32, Layout::panels, outputs)) {
    return wrong_weights("arrays");
  }
  return Status::ok();
}

}  // namespace

// Inputs: x [.., k], the packed weight f32 or bf16, and bias if there is one. ints: n, k. floats: the lowest and highest
// result. Output [.., n].
Status prepare_linear(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.in(0).rank >= 1 && c.in(0).columns() == c.integer(1));
  SQC_RETURN_IF_ERROR(check_product(c, c.integer(1)));
  c.need_scratch(fgemm_scratch_bytes(c.in(0).rows(), float_type(c.in(1))) * c.threads);
  return Status::ok();
}

Status run_linear(RunContext& c) noexcept {
  FgemmParams p = {};
  p.m = c.in(0).rows();
  p.n = c.integer(0);
  p.k = c.integer(1);
  p.a = c.in(0).as<float>();
  p.a_stride = p.k;
  p.b_type = float_type(c.in(1));
  p.b = c.in(1).data;
  p.bias = c.has(2) ? c.in(2).as<float>() : nullptr;
  p.c = c.out().as<float>();
  p.c_stride = p.n;
  p.low = static_cast<float>(c.number(0));
  p.high = static_cast<float>(c.number(1));
  return fgemm(c.pool, c.kernels.fgemm, p, c.scratch);
}

// --- products with group scales ----------------------------------------------------------------------

namespace {

constexpr std::int64_t kDefaultBits = 4;  // of files that do not say

Status check_q4(const WeightArrays& w) noexcept {
  std::int64_t n = 0, k = 0, group = 0;
  SQC_RETURN_IF_ERROR(w.integer(0, &n));
  SQC_RETURN_IF_ERROR(w.integer(1, &k));
  SQC_RETURN_IF_ERROR(w.integer(2, &group));
  SQC_RETURN_IF_ERROR(q4gemm_check_sizes(n, k, group));
  if (n > (std::int64_t{1} << 31)) return wrong_weights("sizes");
  const bool sparse = id_of(w.step) == OperatorId::linear_q4_sparse;
  const std::int64_t panels = (n + 15) / 16, groups = (k + group - 1) / group, tiles = groups * group / 4;
  const int table = sparse ? 6 : 4, scale = table + 1, bias = sparse ? 8 : 7;
  if (!w.is(table, DType::i8, Layout::plain, 16)) return wrong_weights("tables");
  for (int i = 0; i < 16; ++i) {
    if (w.data<std::int8_t>(table)[i] == -128) return wrong_weights("tables");
  }
  if ((!w.is(scale, DType::f16, Layout::group_panels, panels * 16 * groups) &&
       !w.is(scale, DType::f32, Layout::group_panels, panels * 16 * groups)) ||
      !w.optional(bias, DType::f32, Layout::panels, panels * 16)) {
    return wrong_weights("scales");
  }
  if (!sparse) {
    std::int64_t bits = kDefaultBits;
    if (w.step.ints > 3) SQC_RETURN_IF_ERROR(w.integer(3, &bits));
    if ((bits < 2 || bits > 4) && bits != 8) return wrong_weights("codes");
    if (!w.is(3, DType::u8, Layout::q4gemm, q4gemm_packed_bytes(n, k, group, static_cast<int>(bits))) ||
        !w.optional(6, DType::i8, Layout::group_panels, panels * 16 * groups)) {
      return wrong_weights("arrays");
    }
    return Status::ok();
  }
  if (!w.is(3, DType::u64, Layout::q4sparse_masks, panels * tiles) ||
      !w.is(5, DType::u64, Layout::panel_starts, panels + 1) ||
      !w.is(4, DType::u8, Layout::q4sparse_values, w.bytes(4)) || w.bytes(4) < kQ4sparseValueSlack) {
    return wrong_weights("arrays");
  }
  const auto* masks = w.data<std::uint64_t>(3);
  const auto* starts = w.data<std::uint64_t>(5);
  if (!starts_fit(starts, panels, static_cast<std::uint64_t>(w.bytes(4) - kQ4sparseValueSlack))) return wrong_weights("starts");
  // A group's bytes are as many as the longer of its two streams of nibbles is long.
  const std::int64_t half = group / 8;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    std::uint64_t count = 0;
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint64_t* group_masks = masks + panel * tiles + g * 2 * half;
      std::uint64_t low = 0, high = 0;
      for (std::int64_t t = 0; t < half; ++t) {
        low += static_cast<unsigned>(bits_set(group_masks[t]));
        high += static_cast<unsigned>(bits_set(group_masks[half + t]));
      }
      count += low > high ? low : high;
    }
    if (count != starts[panel + 1] - starts[panel]) return wrong_weights("masks");
  }
  return Status::ok();
}

}  // namespace

Status check_packed_weights(const Plan& plan, const format::Operator& step) noexcept {
  switch (id_of(step)) {
    case OperatorId::linear: return check_float({plan, step});
    case OperatorId::linear_q8:
    case OperatorId::linear_q8_sparse:
    case OperatorId::linear_q8_block: return check_q8({plan, step});
    case OperatorId::linear_q4:
    case OperatorId::linear_q4_sparse: return check_q4({plan, step});
    default: return Status::ok();
  }
}

// Inputs: codes i8 [.., stride], scale f32 ([M] or [M, groups]), sums i32 [M, groups], then the weight:
//   linear_q4         codes, table, scales, zero points or none
//   linear_q4_sparse  masks, values, starts, table, scales
// and bias if there is one. ints: n, k, group; of linear_q4 perhaps the bits of a code, 2, 3, 4 or 8, else 4.
// floats: the lowest and highest result. Output [.., n].
Status prepare_linear_q4(PrepareContext& c) noexcept {
  const std::int64_t k = c.integer(1), group = c.integer(2), m = c.in(0).rows(), groups = (k + group - 1) / group;
  SQC_REQUIRE(c.in(0).dtype == DType::i8);
  SQC_RETURN_IF_ERROR(check_product(c, groups * group));
  const Tensor &scale = c.in(1), &sum = c.in(2);
  SQC_REQUIRE(scale.dtype == DType::f32 && scale.layout == Layout::plain && scale.is_contiguous());
  SQC_REQUIRE(scale.count() == m || scale.count() == m * groups);
  SQC_REQUIRE(sum.dtype == DType::i32 && sum.layout == Layout::plain && sum.is_contiguous() && sum.count() == m * groups);
  c.need_scratch(q4gemm_scratch_bytes(m, k, group) * c.threads);
  return Status::ok();
}

namespace {

Q4gemmParams q4_params(const RunContext& c, int table, int bias) noexcept {
  const Tensor& codes = c.in(0);
  Q4gemmParams p = {};
  p.m = codes.rows();
  p.n = c.integer(0);
  p.k = c.integer(1);
  p.group = c.integer(2);
  p.a = codes.as<std::int8_t>();
  p.a_stride = codes.columns();
  p.a_sum = c.in(2).as<std::int32_t>();
  p.a_scale = c.in(1).as<float>();
  p.a_scale_per_group = c.in(1).count() != p.m;
  for (int i = 0; i < 16; ++i) p.table[i] = c.in(table).as<std::int8_t>()[i];
  p.b_scale = c.in(table + 1).data;
  p.b_scale_is_half = c.in(table + 1).dtype == DType::f16;
  p.bias = c.has(bias) ? c.in(bias).as<float>() : nullptr;
  p.c = c.out().as<float>();
  p.c_stride = p.n;
  p.low = static_cast<float>(c.number(0));
  p.high = static_cast<float>(c.number(1));
  return p;
}

}  // namespace

Status run_linear_q4(RunContext& c) noexcept {
  Q4gemmParams params = q4_params(c, 4, 7);
  params.b = c.in(3).as<std::uint8_t>();
  params.b_zero = c.has(6) ? c.in(6).as<std::int8_t>() : nullptr;
  params.bits = static_cast<int>(c.ints() > 3 ? c.integer(3) : kDefaultBits);
  return q4gemm(c.pool, c.kernels.q4gemm, params, c.scratch);
}

Status run_linear_q4_sparse(RunContext& c) noexcept {
  const Q4sparseParams params = {q4_params(c, 6, 8), c.in(3).as<std::uint64_t>(), c.in(4).as<std::uint8_t>(),
                                 c.in(5).as<std::uint64_t>()};
  return q4sparse(c.pool, c.kernels.q4sparse, params, c.scratch);
}

}  // namespace sqc
