#include "kernels/machine/machine.h"

namespace sqc {
namespace {

constexpr Kernel<MachineFunction> kKernels[] = {
#define SQC_MACHINE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/machine/kernels.inc"
#undef SQC_MACHINE_KERNEL
};

}  // namespace

Span<const Kernel<MachineFunction>> machine_kernels() noexcept { return kKernels; }

const Kernel<MachineFunction>& machine_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status machine(ThreadPool& pool, const Kernel<MachineFunction>& kernel, const MachineParams& params,
               std::int64_t units) noexcept {
  if (units < 0) return Status::error(StatusCode::kInvalidArgument, "machine: the number of units is negative");
  return pool.run([&](int thread) {
    std::int32_t sum[16];
    const Range range =
        params.work == MachineWork::read ? split_evenly(units, 1, pool.threads(), thread) : Range{0, units};
    kernel.run(params, range.begin, range.end, sum);
  });
}

}  // namespace sqc
