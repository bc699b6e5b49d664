#include "kernels/qimage/qimage.h"

#include <initializer_list>

namespace sqc {
namespace {

constexpr Kernel<QimageFunction> kKernels[] = {
#define SQC_QIMAGE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qimage/kernels.inc"
#undef SQC_QIMAGE_KERNEL
};

}  // namespace

Span<const Kernel<QimageFunction>> qimage_kernels() noexcept { return kKernels; }

const Kernel<QimageFunction>& qimage_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status qimage(ThreadPool& pool, const Kernel<QimageFunction>& kernel, const QimageParams& p) noexcept {
  for (const std::int64_t size : {p.batch, p.channels, p.height, p.width, p.top, p.bottom, p.left, p.right}) {
    if (size < 0) return Status::error(StatusCode::kInvalidArgument, "qimage: a size is negative");
  }
  const bool fits = p.step <= kQimageMaxStep && p.taps <= kQimageTapBytes && p.channels * p.taps <= kQimageTapBytes;
  if (p.taps < 1 || p.step < 1 || (!fits && (p.taps > 1 || p.step > 1))) {
    return Status::error(StatusCode::kInvalidArgument, "qimage: a pixel cannot have so many columns");
  }
  if (p.pixel < p.channels * p.taps) return Status::error(StatusCode::kInvalidArgument, "qimage: a pixel has less room than channels");
  const std::int64_t rows = p.batch * (p.top + p.height + p.bottom), columns = p.columns();
  if (rows == 0 || columns * p.pixel == 0) return Status::ok();
  if (pool.threads() == 1 || rows * columns * p.pixel <= 16384) {
    kernel.run(p, 0, rows);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range range = split_evenly(rows, 1, pool.threads(), thread);
    if (range.begin < range.end) kernel.run(p, range.begin, range.end);
  });
}

}  // namespace sqc
