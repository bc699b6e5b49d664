// Operands that say how rows are quantized: shared by the operators that end in codes.

#ifndef SQC_ENGINE_OPS_QUANTIZED_ROWS_H_
#define SQC_ENGINE_OPS_QUANTIZED_ROWS_H_

#include "engine/operators.h"
#include "kernels/quantize/quantize.h"

namespace sqc {

constexpr std::int64_t round_up(std::int64_t x, std::int64_t unit) noexcept { return (x + unit - 1) / unit * unit; }

// Where the scale comes from; the numbers are what files hold.
enum class RowScale : std::int64_t {
  none = -1,          // there are no codes
  given = 0,          // two inputs, for the whole tensor
  symmetric = 1,      // each row's own, or each group's
  affine = 2,         // each row's own, with a zero point
  affine_tensor = 3,  // the whole tensor's own, with a zero point
};

// Where an operator has them: four ints (RowScale, whether codes are signed, columns that share a scale, columns
// that share a sum; 0: a row), the inputs of a given scale f32 and zero point i32, and four outputs: codes
// [M, stride >= K padded], scale [M], [M, groups] or [1], zero point [M] or [1], sum [M, groups]. Input 0 are the
// rows, or has as many of the same length.
struct RowOperands {
  int first_int, first_input, first_output;
};

inline RowScale row_scale(const Operands& c, int first_int) noexcept {
  return static_cast<RowScale>(c.integer(first_int));
}

struct RowOptions {
  RowScale scale;
  bool is_signed;
  std::int64_t scale_group, sum_group, m, k, k_padded, groups;
};

inline RowOptions row_options(const Operands& c, const RowOperands& at) noexcept {
  RowOptions o;
  o.scale = row_scale(c, at.first_int);
  o.is_signed = c.integer(at.first_int + 1) != 0;
  o.scale_group = c.integer(at.first_int + 2);
  o.sum_group = c.integer(at.first_int + 3);
  o.m = c.in(0).rows();
  o.k = c.in(0).columns();
  o.k_padded = round_up(o.k, o.sum_group > 0 ? o.sum_group : 4);
  o.groups = o.sum_group > 0 ? o.k_padded / o.sum_group : 1;
  return o;
}

inline Status check_rows(PrepareContext& c, const RowOperands& at) noexcept {
  const std::int64_t mode = c.integer(at.first_int), is_signed = c.integer(at.first_int + 1);
  const std::int64_t scale_group = c.integer(at.first_int + 2), sum_group = c.integer(at.first_int + 3);
  SQC_REQUIRE(mode >= 0 && mode <= 3 && (is_signed == 0 || is_signed == 1));
  SQC_REQUIRE(scale_group >= 0 && sum_group >= 0 && sum_group <= 65536 && sum_group % 16 == 0);
  const RowOptions o = row_options(c, at);
  SQC_REQUIRE(o.scale_group == 0 || (o.scale_group == o.sum_group && o.scale == RowScale::symmetric));
  SQC_REQUIRE(!o.is_signed || o.scale == RowScale::given || o.scale == RowScale::symmetric);
  if (o.scale == RowScale::given) {
    const int i = at.first_input;
    SQC_REQUIRE(c.has(i) && c.has(i + 1) && c.in(i).dtype == DType::f32 && c.in(i + 1).dtype == DType::i32);
    SQC_REQUIRE(c.in(i).count() == 1 && c.in(i + 1).count() == 1);
  }
  const Tensor &codes = c.out(at.first_output), &scale = c.out(at.first_output + 1);
  const Tensor &zero = c.out(at.first_output + 2), &sum = c.out(at.first_output + 3);
  SQC_REQUIRE(codes.dtype == (o.is_signed ? DType::i8 : DType::u8) && codes.rank == 2);
  SQC_REQUIRE(codes.shape[0] == o.m && codes.shape[1] >= o.k_padded);
  const bool one = o.scale == RowScale::given || o.scale == RowScale::affine_tensor;
  SQC_REQUIRE(scale.dtype == DType::f32 && scale.count() == (one ? 1 : o.scale_group > 0 ? o.m * o.groups : o.m));
  SQC_REQUIRE(zero.dtype == DType::i32 && zero.count() == (o.scale == RowScale::affine ? o.m : 1));
  SQC_REQUIRE(sum.dtype == DType::i32 && sum.count() == o.m * o.groups);
  return Status::ok();
}

// What the kernel takes, but for x; a scale of the whole tensor is still to be found. Scales that do not
// depend on the rows are written to their outputs here.
inline QuantizeParams row_params(const RunContext& c, const RowOperands& at) noexcept {
  const RowOptions o = row_options(c, at);
  QuantizeParams p = {};
  p.is_signed = o.is_signed;
  p.m = o.m;
  p.k = o.k;
  p.codes = c.out(at.first_output).data;
  p.code_stride = c.out(at.first_output).shape[1];
  p.k_padded = o.k_padded;
  p.scale_group = o.scale_group;
  p.sum_group = o.sum_group;
  p.scale = c.out(at.first_output + 1).as<float>();
  p.zero_point = c.out(at.first_output + 2).as<std::int32_t>();
  p.sum = c.out(at.first_output + 3).as<std::int32_t>();
  p.mode = QuantizeMode::static_scale;
  switch (o.scale) {
    case RowScale::symmetric:
      p.mode = QuantizeMode::symmetric;
      *p.zero_point = o.is_signed ? 0 : 128;
      p.zero_point = nullptr;
      break;
    case RowScale::affine: p.mode = QuantizeMode::affine; break;
    case RowScale::given:
      *p.scale = *c.in(at.first_input).as<float>();
      *p.zero_point = *c.in(at.first_input + 1).as<std::int32_t>();
      break;
    default: break;
  }
  return p;
}

}  // namespace sqc

#endif  // SQC_ENGINE_OPS_QUANTIZED_ROWS_H_
