#include "kernels/quantize/quantize.h"

#include <cmath>

namespace sqc {
namespace {

constexpr Kernel<QuantizeFunction> kKernels[] = {
#define SQC_QUANTIZE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/quantize/kernels.inc"
#undef SQC_QUANTIZE_KERNEL
};

}  // namespace

Status quantize_check(const QuantizeParams& p) noexcept {
  const auto invalid = [](const char* what) { return Status::error(StatusCode::kInvalidArgument, "quantize: %s", what); };
  if (p.m < 0 || p.k < 0) return invalid("a size is negative");
  if (p.k_padded < p.k || p.code_stride < p.k_padded) return invalid("k <= k_padded <= code_stride does not hold");
  if (p.sum_group < 0 || p.sum_group % 16 != 0) return invalid("sum_group is not a multiple of 16");
  if (p.scale_group != 0 && p.scale_group != p.sum_group) return invalid("scale_group is neither 0 nor sum_group");
  if (p.scale_group != 0 && p.mode != QuantizeMode::symmetric) return invalid("only symmetric scales have groups");
  if (p.mode == QuantizeMode::affine && p.is_signed) return invalid("affine codes are unsigned");
  if (p.mode == QuantizeMode::static_scale) {
    if (!(std::isfinite(p.scale[0]) && p.scale[0] > 0.0f)) return invalid("the scale is not finite and positive");
    const std::int32_t zero = p.zero_point[0];
    if (zero < (p.is_signed ? -128 : 0) || zero > (p.is_signed ? 127 : 255)) return invalid("the zero point is no code");
  }
  return Status::ok();
}

Span<const Kernel<QuantizeFunction>> quantize_kernels() noexcept { return kKernels; }

const Kernel<QuantizeFunction>& quantize_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status quantize(ThreadPool& pool, const Kernel<QuantizeFunction>& kernel, const QuantizeParams& params) noexcept {
  if (params.x_stride < params.k) {
    return Status::error(StatusCode::kInvalidArgument, "quantize: x_stride is less than k");
  }
  SQC_RETURN_IF_ERROR(quantize_check(params));
  // A row of 4096 floats takes about a microsecond: below a few of them, waking threads costs more.
  constexpr std::int64_t kSmall = 16384;
  if (params.m * params.k <= kSmall) {
    kernel.run(params, 0, params.m);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range rows = split_evenly(params.m, 1, pool.threads(), thread);
    if (rows.begin < rows.end) kernel.run(params, rows.begin, rows.end);
  });
}

}  // namespace sqc
