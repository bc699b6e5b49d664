#include "kernels/qbinary/qbinary.h"

namespace sqc {
namespace {

constexpr Kernel<QbinaryFunction> kKernels[] = {
#define SQC_QBINARY_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qbinary/kernels.inc"
#undef SQC_QBINARY_KERNEL
};

}  // namespace

Span<const Kernel<QbinaryFunction>> qbinary_kernels() noexcept { return kKernels; }

const Kernel<QbinaryFunction>& qbinary_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status qbinary(ThreadPool& pool, const Kernel<QbinaryFunction>& kernel, const QbinaryParams& p) noexcept {
  if (p.rows < 0 || p.columns < 0 || p.rows_for_b < 1) {
    return Status::error(StatusCode::kInvalidArgument, "qbinary: a size is wrong");
  }
  if (p.rows == 0 || p.columns == 0) return Status::ok();
  if (pool.threads() == 1 || p.rows * p.columns <= 32768) {
    kernel.run(p, 0, p.rows);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range range = split_evenly(p.rows, 1, pool.threads(), thread);
    if (range.begin < range.end) kernel.run(p, range.begin, range.end);
  });
}

}  // namespace sqc
