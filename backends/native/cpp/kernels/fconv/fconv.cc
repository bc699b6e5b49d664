#include "kernels/fconv/fconv.h"

#include "kernels/qconv/qconv.h"

namespace sqc {
namespace {

constexpr Kernel<FconvFunction> kKernels[] = {
#define SQC_FCONV_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/fconv/kernels.inc"
#undef SQC_FCONV_KERNEL
};

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "fconv: %s", what); }

Status check(const FconvParams& p) noexcept {
  SQC_RETURN_IF_ERROR(check_window(p.window));
  if (p.groups < 1 || p.in_channels < 0 || p.out_channels < 0) return invalid("a number of channels is wrong");
  if (p.depthwise && (p.in_channels != 1 || p.out_channels != 1)) return invalid("a depthwise group has one channel");
  std::int64_t all = 0;
  if (__builtin_mul_overflow(p.groups, p.in_channels, &all) || p.x_stride < all) return invalid("x_stride is less than the channels");
  if (__builtin_mul_overflow(p.groups, p.out_channels, &all) || p.y_stride < all) return invalid("y_stride is less than the channels");
  return Status::ok();
}

}  // namespace

Span<const Kernel<FconvFunction>> fconv_kernels() noexcept { return kKernels; }

const Kernel<FconvFunction>& fconv_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t fconv_scratch_bytes(const FconvParams& p) noexcept {
  const std::int64_t zeros = (p.depthwise ? p.groups : p.in_channels) * 4;
  return (zeros + 63) / 64 * 64 + p.window.taps() * kFconvRows * static_cast<std::int64_t>(sizeof(void*));
}

Status fconv(ThreadPool& pool, const Kernel<FconvFunction>& kernel, const FconvParams& p, std::uint8_t* scratch) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  const std::int64_t rows = p.window.rows();
  const std::int64_t panels = p.depthwise ? (p.groups + 15) / 16 : p.groups * ((p.out_channels + 15) / 16);
  if (rows == 0 || panels == 0 || p.out_channels == 0) return Status::ok();
  const int threads = pool.threads();
  const std::int64_t bytes = fconv_scratch_bytes(p), k = p.window.taps() * p.in_channels;
  if (threads == 1 || rows * panels * k <= 4096) {
    kernel.run(p, 0, rows, 0, panels, scratch);
    return Status::ok();
  }
  // As in qconv: what is not split is read by every thread.
  const std::int64_t image = p.window.batch * p.window.in_h * p.window.in_w * p.x_stride;
  const bool by_outputs = !p.depthwise && panels >= 4 * threads && panels * 16 * k > image;
  return pool.run([&](int thread) {
    const Range range = split_evenly(by_outputs ? panels : rows, by_outputs ? 4 : 1, threads, thread);
    if (range.begin >= range.end) return;
    std::uint8_t* own = scratch + thread * ((bytes + 63) / 64 * 64);
    if (by_outputs) {
      kernel.run(p, 0, rows, range.begin, range.end, own);
    } else {
      kernel.run(p, range.begin, range.end, 0, panels, own);
    }
  });
}

}  // namespace sqc
