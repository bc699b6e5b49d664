#include "kernels/qconvsparse/qconvsparse.h"

#include "kernels/qconv/run_parts.h"

namespace sqc {
namespace {

constexpr Kernel<QconvsparseFunction> kKernels[] = {
#define SQC_QCONVSPARSE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qconvsparse/kernels.inc"
#undef SQC_QCONVSPARSE_KERNEL
};

}  // namespace

Span<const Kernel<QconvsparseFunction>> qconvsparse_kernels() noexcept { return kKernels; }

const Kernel<QconvsparseFunction>& qconvsparse_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status qconvsparse(ThreadPool& pool, const Kernel<QconvsparseFunction>& kernel, const QconvsparseParams& s,
                   std::uint8_t* scratch) noexcept {
  return run_parts("qconvsparse", pool, kernel.run, s, scratch);
}

}  // namespace sqc
