// How fast this machine reads memory and multiplies: what the other kernels are measured against.

#ifndef SQC_KERNELS_MACHINE_MACHINE_H_
#define SQC_KERNELS_MACHINE_MACHINE_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

// Multiply-adds of one step of `multiply`, twice as many operations: twelve dot products of 16 outputs by
// 4 k, on registers, in enough independent sums to hide their latency.
constexpr std::int64_t kMachineStepMacs = 12 * 64;

enum class MachineWork : std::uint8_t { read, multiply };

struct MachineParams {
  MachineWork work;
  const std::uint8_t* data;  // read: what to read; multiply: 64 bytes to start with
};

// read: units [begin, end) of 512 bytes; sum[16] is what the int32 there add up to, by lane.
// multiply: end - begin steps; sum[16] only keeps the work from being removed.
using MachineFunction = void (*)(const MachineParams& params, std::int64_t begin, std::int64_t end, std::int32_t* sum);

#define SQC_MACHINE_KERNEL(isa, name) void name(const MachineParams&, std::int64_t, std::int64_t, std::int32_t*);
#include "kernels/machine/kernels.inc"
#undef SQC_MACHINE_KERNEL

Span<const Kernel<MachineFunction>> machine_kernels() noexcept;
const Kernel<MachineFunction>& machine_kernel(Isa isa) noexcept;

// Units split over the threads; for `multiply` each thread runs all of them.
Status machine(ThreadPool& pool, const Kernel<MachineFunction>& kernel, const MachineParams& params,
               std::int64_t units) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_MACHINE_MACHINE_H_
