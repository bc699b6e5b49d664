#include "kernels/qconvblock/qconvblock.h"

#include "kernels/qconv/run_parts.h"

namespace sqc {
namespace {

constexpr Kernel<QconvblockFunction> kKernels[] = {
#define SQC_QCONVBLOCK_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qconvblock/kernels.inc"
#undef SQC_QCONVBLOCK_KERNEL
};

}  // namespace

Span<const Kernel<QconvblockFunction>> qconvblock_kernels() noexcept { return kKernels; }

const Kernel<QconvblockFunction>& qconvblock_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status qconvblock(ThreadPool& pool, const Kernel<QconvblockFunction>& kernel, const QconvblockParams& s,
                  std::uint8_t* scratch) noexcept {
  return run_parts("qconvblock", pool, kernel.run, s, scratch);
}

}  // namespace sqc
