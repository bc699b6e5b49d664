#include "kernels/qdepthwise/qdepthwise.h"

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QdepthwiseFunction> kKernels[] = {
#define SQC_QDEPTHWISE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qdepthwise/kernels.inc"
#undef SQC_QDEPTHWISE_KERNEL
};

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "qdepthwise: %s", what); }

std::int64_t in_sixteens(std::int64_t n) noexcept { return (n + 15) / 16 * 16; }

Status check(const QdepthwiseParams& p) noexcept {
  SQC_RETURN_IF_ERROR(check_window(p.window));
  if (p.channels < 0) return invalid("a number of channels is wrong");
  if (p.window.taps() > kQdepthwiseMaxTaps) return invalid("int32 sums do not hold so many products");
  const std::int64_t packed = in_sixteens(p.channels);
  if (p.x_stride < packed) return invalid("x_stride is less than the channels in sixteens");
  if ((p.y.values == nullptr) == (p.y.codes == nullptr)) return invalid("one kind of output is needed");
  if (p.y.stride < (p.y.codes != nullptr ? packed : p.channels)) return invalid("the output's stride is less than its channels");
  if (p.y.other != nullptr && p.y.other_stride < packed) return invalid("the other image's stride is less than the channels");
  return Status::ok();
}

}  // namespace

Span<const Kernel<QdepthwiseFunction>> qdepthwise_kernels() noexcept { return kKernels; }

const Kernel<QdepthwiseFunction>& qdepthwise_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qdepthwise_scratch_bytes(const QdepthwiseParams& p) noexcept {
  return (in_sixteens(p.channels) + 63) / 64 * 64 +
         p.window.taps() * kQdepthwiseRows * static_cast<std::int64_t>(sizeof(void*));
}

Status qdepthwise(ThreadPool& pool, const Kernel<QdepthwiseFunction>& kernel, const QdepthwiseParams& p,
                  std::uint8_t* scratch) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  const std::int64_t rows = p.window.rows();
  if (rows == 0 || p.channels == 0) return Status::ok();
  const int threads = pool.threads();
  if (threads == 1 || rows * p.channels * p.window.taps() <= 65536) {
    kernel.run(p, 0, rows, scratch);
    return Status::ok();
  }
  const std::int64_t bytes = qdepthwise_scratch_bytes(p);
  return run_shared(pool, rows, 1, kQdepthwiseRows, [&](int thread, Range part) {
    kernel.run(p, part.begin, part.end, scratch + thread * bytes);
  });
}

}  // namespace sqc
