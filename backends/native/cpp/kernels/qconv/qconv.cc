#include "kernels/qconv/qconv.h"

#include "base/work_shares.h"
#include "kernels/qconv/parts.h"
#include "kernels/qgemm/qgemm.h"

namespace sqc {
namespace {

constexpr Kernel<QconvFunction> kKernels[] = {
#define SQC_QCONV_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qconv/kernels.inc"
#undef SQC_QCONV_KERNEL
};

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "qconv: %s", what); }

constexpr std::int64_t kLargest = std::int64_t{1} << 24;  // of a height, width, kernel, stride, …

bool side_fits(std::int64_t in, std::int64_t out, std::int64_t kernel, std::int64_t stride, std::int64_t pad,
               std::int64_t dilation, std::int64_t spread) noexcept {
  const auto fits = [](std::int64_t low, std::int64_t value) { return value >= low && value < kLargest; };
  return fits(0, in) && fits(0, out) && fits(1, kernel) && fits(1, stride) && fits(-kLargest + 1, pad) &&
         fits(1, dilation) && fits(1, spread);
}

}  // namespace

Status check_qconv(const QconvParams& p) noexcept {
  SQC_RETURN_IF_ERROR(check_window(p.window));
  if (p.groups < 1 || p.in_channels < 0 || p.out_channels < 0) return invalid("a number of channels is wrong");
  const std::int64_t run = (p.in_channels + 3) / 4 * 4;
  if (p.groups > 1 && run != p.in_channels) return invalid("groups of channels that are not in fours");
  std::int64_t k = 0, all = 0;
  if (__builtin_mul_overflow(p.window.taps(), run, &k) || k > kQgemmMaxK) return invalid("int32 sums do not hold so many products");
  if (__builtin_mul_overflow(p.groups, run, &all) || p.x_stride < all) return invalid("x_stride is less than the channels");
  if (__builtin_mul_overflow(p.groups, p.out_channels, &all) || p.y.stride < all) return invalid("the output's stride is less than its channels");
  const std::int64_t written = p.groups == 1 ? (all + 15) / 16 * 16 : all;
  if ((p.y.values == nullptr) == (p.y.codes == nullptr)) return invalid("one kind of output is needed");
  if (p.y.codes != nullptr && p.y.stride < written) return invalid("the output's stride is less than its channels in sixteens");
  if (p.y.other != nullptr && p.y.other_stride < written) return invalid("the other image's stride is less than the channels");
  return Status::ok();
}

Status check_window(const Window& w) noexcept {
  if (w.batch < 0 || !side_fits(w.in_h, w.out_h, w.kernel_h, w.stride_h, w.pad_h, w.dilation_h, w.spread_h) ||
      !side_fits(w.in_w, w.out_w, w.kernel_w, w.stride_w, w.pad_w, w.dilation_w, w.spread_w)) {
    return Status::error(StatusCode::kInvalidArgument, "a window's size is negative or too large");
  }
  return Status::ok();
}

Span<const Kernel<QconvFunction>> qconv_kernels() noexcept { return kKernels; }

const Kernel<QconvFunction>& qconv_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qconv_scratch_bytes(const QconvParams& p) noexcept {
  const std::int64_t zeros = (p.in_channels + 3) / 4 * 4 * p.window.kernel_w;
  return (zeros + 63) / 64 * 64 + p.window.taps() * kQconvRows * static_cast<std::int64_t>(sizeof(void*));
}

std::int64_t qconv_parts_scratch_bytes(const QconvParams& p) noexcept {
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps();
  return kQconvPartStripPanels * 16 * kQconvPartPixels * 4 + taps * run * kQconvPartPixels + (run + 63) / 64 * 64 +
         taps * kQconvRows * static_cast<std::int64_t>(sizeof(void*));
}

Status qconv(ThreadPool& pool, const Kernel<QconvFunction>& kernel, const QconvParams& p, std::uint8_t* scratch) noexcept {
  SQC_RETURN_IF_ERROR(check_qconv(p));
  const std::int64_t rows = p.window.rows(), group_panels = (p.out_channels + 15) / 16, panels = p.groups * group_panels;
  if (rows == 0 || panels == 0) return Status::ok();
  const int threads = pool.threads();
  const std::int64_t bytes = qconv_scratch_bytes(p), k = p.window.taps() * ((p.in_channels + 3) / 4 * 4);
  // A convolution of few multiplications is done before another thread is awake.
  if (threads == 1 || rows * panels * k <= 16384) {
    kernel.run(p, 0, rows, 0, panels, scratch);
    return Status::ok();
  }
  // What is not split is read by every thread: the weights if rows are, the image if outputs are. Outputs of
  // several groups are not, because the end of one overlaps the begin of the next.
  const std::int64_t image = p.window.batch * p.window.in_h * p.window.in_w * p.x_stride;
  const bool by_outputs = p.groups == 1 && panels >= 4 * threads && panels * 16 * k > image;
  if (by_outputs) {
    return run_shared(pool, panels, 4, 4, [&](int thread, Range part) {
      kernel.run(p, 0, rows, part.begin, part.end, scratch + thread * bytes);
    });
  }
  return run_shared(pool, rows, 1, kQconvRows, [&](int thread, Range part) {
    kernel.run(p, part.begin, part.end, 0, panels, scratch + thread * bytes);
  });
}

}  // namespace sqc
