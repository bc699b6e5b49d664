// Softmax and norms over the last dimension of contiguous rows.

#include "engine/kernels.h"
#include "engine/operators.h"

namespace sqc {

Status prepare_softmax(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.out().dtype == DType::f32 && c.in(0).same_shape(c.out()));
  SQC_REQUIRE(c.in(0).is_contiguous() && c.in(0).rank >= 1);
  return Status::ok();
}

Status run_softmax(RunContext& c) noexcept {
  SoftmaxParams params = {};
  params.m = c.in(0).rows();
  params.k = params.x_stride = params.y_stride = c.in(0).columns();
  params.x = c.in(0).as<float>();
  params.scale = 1.0f;
  params.y = c.out().as<float>();
  return softmax(c.pool, c.kernels.softmax, params);
}

namespace {

Status check_norm(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  SQC_REQUIRE(in.dtype == DType::f32 && c.out().dtype == DType::f32 && in.same_shape(c.out()));
  SQC_REQUIRE(in.is_contiguous() && in.rank >= 1);
  for (int i = 1; i < c.inputs(); ++i) {
    if (!c.has(i)) continue;
    const Tensor& parameter = c.in(i);
    SQC_REQUIRE(parameter.dtype == DType::f32 && parameter.rank == 1 && parameter.is_contiguous());
    SQC_REQUIRE(parameter.shape[0] == in.columns());
  }
  return Status::ok();
}

Status run_norm(RunContext& c, NormKind kind) noexcept {
  const std::int64_t m = c.in(0).rows(), k = c.in(0).columns();
  NormParams params = {};
  params.kind = kind;
  params.m = m;
  params.k = k;
  params.x = c.in(0).as<float>();
  params.x_stride = k;
  params.weight = c.has(1) ? c.in(1).as<float>() : nullptr;
  params.bias = c.has(2) ? c.in(2).as<float>() : nullptr;
  params.epsilon = static_cast<float>(c.number(0));
  params.y = c.out().as<float>();
  params.y_stride = k;
  return norm(c.pool, c.kernels.norm, params, nullptr);
}

}  // namespace

// Inputs: x, weight, bias; the last two may be left out. floats: epsilon.
Status prepare_layer_norm(PrepareContext& c) noexcept { return check_norm(c); }
Status run_layer_norm(RunContext& c) noexcept { return run_norm(c, NormKind::layer); }

// Inputs: x, weight. floats: epsilon.
Status prepare_rms_norm(PrepareContext& c) noexcept { return check_norm(c); }
Status run_rms_norm(RunContext& c) noexcept { return run_norm(c, NormKind::rms); }

}  // namespace sqc
