#include "kernels/activation/activation.h"

namespace sqc {
namespace {

constexpr Kernel<ActivationFunction> kKernels[] = {
#define SQC_ACTIVATION_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/activation/kernels.inc"
#undef SQC_ACTIVATION_KERNEL
};

Status check(const ActivationParams& p) noexcept {
  const auto invalid = [](const char* what) {
    return Status::error(StatusCode::kInvalidArgument, "activation: %s", what);
  };
  if (p.m < 0 || p.k < 0) return invalid("a size is negative");
  if (p.x_stride < p.k) return invalid("x_stride is less than k");
  if (p.factor != nullptr && p.factor_stride < p.k) return invalid("factor_stride is less than k");
  if (p.y == nullptr && p.quantize == nullptr) return invalid("neither y nor codes are asked for");
  if (p.y != nullptr && p.y_stride < p.k) return invalid("y_stride is less than k");
  if (p.quantize == nullptr) return Status::ok();
  if (p.quantize->m != p.m || p.quantize->k != p.k) return invalid("the quantization is of another size");
  return quantize_check(*p.quantize);
}

}  // namespace

Span<const Kernel<ActivationFunction>> activation_kernels() noexcept { return kKernels; }

const Kernel<ActivationFunction>& activation_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t activation_scratch_count(const ActivationParams& p) noexcept { return p.y == nullptr ? p.k : 0; }

Status activation(ThreadPool& pool, const Kernel<ActivationFunction>& kernel, const ActivationParams& p,
                  float* scratch) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  // As in quantize.cc: waking threads costs more than a few rows do.
  constexpr std::int64_t kSmall = 16384;
  if (p.m * p.k <= kSmall) {
    kernel.run(p, 0, p.m, scratch);
    return Status::ok();
  }
  const std::int64_t scratch_count = activation_scratch_count(p);
  return pool.run([&](int thread) {
    const Range rows = split_evenly(p.m, 1, pool.threads(), thread);
    if (rows.begin < rows.end) kernel.run(p, rows.begin, rows.end, scratch + thread * scratch_count);
  });
}

}  // namespace sqc
