// Operators that do in one pass over rows what others do in several: a row stays in the L1 cache in between.
// Their results are those of the single operators, bit for bit. lower/fuse.py puts them into plans.

#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/quantized_rows.h"

namespace sqc {
namespace {

// An output that nobody wants has no elements.
bool wanted(const Tensor& output) noexcept { return output.count() > 0; }

bool is_float_like(const Tensor& tensor, const Tensor& x) noexcept {
  return tensor.dtype == DType::f32 && tensor.same_shape(x);
}

// Whether all rows lie at one distance, their elements beside each other; if so, sets the distance.
bool row_stride(const Tensor& tensor, std::int64_t* stride) noexcept {
  const int last = tensor.rank - 1;
  *stride = tensor.columns();
  if (tensor.is_contiguous()) return true;
  if (last < 0 || (tensor.stride[last] != 1 && tensor.shape[last] != 1)) return false;
  std::int64_t rows = 0;  // in the dimensions behind d
  for (int d = last; d-- > 0;) {
    if (tensor.shape[d] == 1) continue;
    if (rows == 0) *stride = tensor.stride[d];
    if (tensor.stride[d] != *stride * (rows == 0 ? 1 : rows)) return false;
    rows = (rows == 0 ? 1 : rows) * tensor.shape[d];
  }
  return *stride >= tensor.columns();
}

// Checks what every operator here has in common: rows of floats that are not empty, and codes if any are wanted.
Status check_codes(PrepareContext& c, const RowOperands& at) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.in(0).rank >= 1 && c.in(0).columns() >= 1);
  const std::int64_t mode = c.integer(at.first_int);
  SQC_REQUIRE(mode >= -1 && mode <= 2);  // a scale of the whole tensor is known only after the last row
  if (mode >= 0) return check_rows(c, at);
  for (int i = 0; i < 4; ++i) SQC_REQUIRE(!wanted(c.out(at.first_output + i)));
  return Status::ok();
}

constexpr RowOperands kNormCodes = {1, 4, 2};
constexpr RowOperands kActivationCodes = {1, 2, 1};

}  // namespace

// Inputs: x, then what may be left out: residual, weight, bias, given scale and zero point. ints: 0 for
// layer_norm or 1 for rms_norm, and those of quantize_rows, whose first may be -1: no codes. floats: epsilon.
// Outputs: x + residual, the norm of it, and those of quantize_rows; what is not wanted has no elements.
Status prepare_norm_rows(PrepareContext& c) noexcept {
  const Tensor& x = c.in(0);
  SQC_RETURN_IF_ERROR(check_codes(c, kNormCodes));
  SQC_REQUIRE(x.is_contiguous() && (c.integer(0) == 0 || c.integer(0) == 1) && c.number(0) >= 0);
  const bool has_residual = c.has(1), codes = row_scale(c, kNormCodes.first_int) != RowScale::none;
  SQC_REQUIRE(!has_residual || (is_float_like(c.in(1), x) && c.in(1).is_contiguous()));
  for (int i = 2; i < 4; ++i) {
    if (!c.has(i)) continue;
    const Tensor& parameter = c.in(i);
    SQC_REQUIRE(parameter.dtype == DType::f32 && parameter.rank == 1 && parameter.is_contiguous());
    SQC_REQUIRE(parameter.shape[0] == x.columns());
  }
  SQC_REQUIRE(!wanted(c.out(0)) || (has_residual && is_float_like(c.out(0), x)));
  SQC_REQUIRE(wanted(c.out(1)) ? is_float_like(c.out(1), x) : codes || x.count() == 0);
  if (!wanted(c.out(1))) c.need_scratch(round_up(x.columns(), 16) * 4 * c.threads);
  return Status::ok();
}

Status run_norm_rows(RunContext& c) noexcept {
  const Tensor& x = c.in(0);
  if (x.count() == 0) return Status::ok();
  const bool codes = row_scale(c, kNormCodes.first_int) != RowScale::none;
  const QuantizeParams quantize = codes ? row_params(c, kNormCodes) : QuantizeParams{};
  NormParams p = {};
  p.kind = c.integer(0) == 1 ? NormKind::rms : NormKind::layer;
  p.m = x.rows();
  p.k = p.x_stride = p.residual_stride = p.sum_stride = p.y_stride = x.columns();
  p.x = x.as<float>();
  p.residual = c.has(1) ? c.in(1).as<float>() : nullptr;
  p.sum = wanted(c.out(0)) ? c.out(0).as<float>() : nullptr;
  p.weight = c.has(2) ? c.in(2).as<float>() : nullptr;
  p.bias = c.has(3) ? c.in(3).as<float>() : nullptr;
  p.epsilon = static_cast<float>(c.number(0));
  p.y = wanted(c.out(1)) ? c.out(1).as<float>() : nullptr;
  p.quantize = codes ? &quantize : nullptr;
  return norm(c.pool, c.kernels.norm, p, reinterpret_cast<float*>(c.scratch));
}

// Inputs: x, then what may be left out: factor, given scale and zero point. ints: the function, and those of
// quantize_rows, whose first may be -1: no codes. Outputs: f(x) times factor, and those of quantize_rows; what
// is not wanted has no elements. Rows of x and factor may lie apart, as halves of longer ones.
Status prepare_activation_rows(PrepareContext& c) noexcept {
  const Tensor& x = c.in(0);
  std::int64_t stride = 0;
  SQC_RETURN_IF_ERROR(check_codes(c, kActivationCodes));
  SQC_REQUIRE(row_stride(x, &stride) && c.integer(0) >= 0 && c.integer(0) <= 7);
  SQC_REQUIRE(!c.has(1) || (is_float_like(c.in(1), x) && row_stride(c.in(1), &stride)));
  const bool codes = row_scale(c, kActivationCodes.first_int) != RowScale::none;
  SQC_REQUIRE(wanted(c.out(0)) ? is_float_like(c.out(0), x) : codes || x.count() == 0);
  if (!wanted(c.out(0))) c.need_scratch(round_up(x.columns(), 16) * 4 * c.threads);
  return Status::ok();
}

Status run_activation_rows(RunContext& c) noexcept {
  // By the numbers that files hold.
  constexpr Activation functions[] = {Activation::identity, Activation::relu,      Activation::sigmoid, Activation::silu,
                                      Activation::gelu,     Activation::gelu_tanh, Activation::tanh,    Activation::exp};
  const Tensor& x = c.in(0);
  if (x.count() == 0) return Status::ok();
  const bool codes = row_scale(c, kActivationCodes.first_int) != RowScale::none;
  const QuantizeParams quantize = codes ? row_params(c, kActivationCodes) : QuantizeParams{};
  ActivationParams p = {};
  p.function = functions[c.integer(0)];
  p.m = x.rows();
  p.k = p.y_stride = x.columns();
  p.x = x.as<float>();
  row_stride(x, &p.x_stride);
  if (c.has(1)) {
    p.factor = c.in(1).as<float>();
    row_stride(c.in(1), &p.factor_stride);
  }
  p.y = wanted(c.out(0)) ? c.out(0).as<float>() : nullptr;
  p.quantize = codes ? &quantize : nullptr;
  return activation(c.pool, c.kernels.activation, p, reinterpret_cast<float*>(c.scratch));
}

// Inputs: x [B, H, S, D], elements of a head beside each other; cos and sin [B or 1, 1, S, D], whose second
// halves repeat the first. Output [B, H, S, D].
Status prepare_rope(PrepareContext& c) noexcept {
  const Tensor &x = c.in(0), &cos = c.in(1), &sin = c.in(2), &out = c.out();
  SQC_REQUIRE(x.dtype == DType::f32 && x.rank == 4 && is_float_like(out, x));
  SQC_REQUIRE((x.stride[3] == 1 || x.shape[3] <= 1) && x.shape[3] % 2 == 0);
  SQC_REQUIRE(cos.dtype == DType::f32 && cos.rank == 4 && cos.is_contiguous());
  SQC_REQUIRE(is_float_like(sin, cos) && sin.is_contiguous());
  SQC_REQUIRE((cos.shape[0] == 1 || cos.shape[0] == x.shape[0]) && cos.shape[1] == 1);
  SQC_REQUIRE(cos.shape[2] == x.shape[2] && cos.shape[3] == x.shape[3]);
  SQC_REQUIRE(x.shape[0] <= (std::int64_t{1} << 31));
  c.need_scratch(x.shape[0] * 8);
  return Status::ok();
}

Status run_rope(RunContext& c) noexcept {
  const Tensor &x = c.in(0), &cos = c.in(1), &out = c.out();
  if (x.count() == 0) return Status::ok();
  // Each sequence's own rows of the tables, or the same for all.
  auto* position = reinterpret_cast<std::int64_t*>(c.scratch);
  for (std::int64_t b = 0; b < x.shape[0]; ++b) position[b] = cos.shape[0] == 1 ? 0 : b * x.shape[2];
  RopeParams p = {};
  p.batch = x.shape[0];
  p.heads = x.shape[1];
  p.tokens = x.shape[2];
  p.head_dim = p.rotary_dim = p.table_stride = x.shape[3];
  p.x = x.as<float>();
  p.x_batch_stride = x.stride[0];
  p.x_head_stride = x.stride[1];
  p.x_token_stride = x.stride[2];
  p.y = out.as<float>();
  p.y_batch_stride = out.stride[0];
  p.y_head_stride = out.stride[1];
  p.y_token_stride = out.stride[2];
  p.cos = cos.as<float>();
  p.sin = c.in(2).as<float>();
  p.table_rows = cos.rows();
  p.position = position;
  p.position_stride = 1;
  return rope(c.pool, c.kernels.rope, p);
}

}  // namespace sqc
