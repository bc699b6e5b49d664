#include "kernels/softmax/softmax.h"

namespace sqc {
namespace {

constexpr Kernel<SoftmaxFunction> kKernels[] = {
#define SQC_SOFTMAX_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/softmax/kernels.inc"
#undef SQC_SOFTMAX_KERNEL
};

Status check(const SoftmaxParams& p) noexcept {
  const auto invalid = [](const char* what) { return Status::error(StatusCode::kInvalidArgument, "softmax: %s", what); };
  if (p.m < 0 || p.k < 0) return invalid("a size is negative");
  if (p.x_stride < p.k) return invalid("x_stride is less than k");
  if (p.mask != nullptr && p.mask_stride != 0 && p.mask_stride < p.k) return invalid("mask_stride is less than k");
  if (p.y_stride < p.k) return invalid("y_stride is less than k");
  return Status::ok();
}

}  // namespace

Span<const Kernel<SoftmaxFunction>> softmax_kernels() noexcept { return kKernels; }

const Kernel<SoftmaxFunction>& softmax_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status softmax(ThreadPool& pool, const Kernel<SoftmaxFunction>& kernel, const SoftmaxParams& p) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  // As in quantize.cc: waking threads costs more than a few rows do.
  constexpr std::int64_t kSmall = 16384;
  if (p.m * p.k <= kSmall) {
    kernel.run(p, 0, p.m);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range rows = split_evenly(p.m, 1, pool.threads(), thread);
    if (rows.begin < rows.end) kernel.run(p, rows.begin, rows.end);
  });
}

}  // namespace sqc
