// What the CPU under this process can do, read once.
//
// A flag is true only when the instructions may be executed here and now: the CPU has them (CPUID,
// HWCAP) *and* the operating system saves the registers they use (XCR0). CPUID alone is not enough:
// a kernel or hypervisor that does not save ZMM state leaves the AVX-512 bits of CPUID set.

#ifndef SQC_BASE_CPU_H_
#define SQC_BASE_CPU_H_

#include <cstdint>

// Every flag once; the struct below and the bindings are generated from this list. The names are
// those of Linux's /proc/cpuinfo on x86 and, on Arm, of the architecture's features.
#define SQC_CPU_FLAGS(X)                                                                       \
  /* x86 */                                                                                    \
  X(sse4_1) X(avx) X(avx2) X(fma) X(f16c) X(gfni) X(avx_vnni)                                  \
  X(avx512f) X(avx512bw) X(avx512vl) X(avx512dq) X(avx512_vnni) X(avx512_vbmi) X(avx512_vbmi2) \
  X(avx512_bf16) X(amx_int8)                                                                   \
  /* Arm */                                                                                    \
  X(dotprod) X(i8mm) X(sve)

namespace sqc {

struct CpuFlags {
#define SQC_DECLARE_FLAG(name) bool name = false;
  SQC_CPU_FLAGS(SQC_DECLARE_FLAG)
#undef SQC_DECLARE_FLAG
};

struct CpuInfo {
  CpuFlags flags;
  const char* architecture = "unknown";  // "x86_64", "aarch64" or "unknown"
  char vendor[16] = "";                  // x86: CPUID vendor string; Arm: implementer, when known
  char brand[49] = "";                   // x86: CPUID brand string; elsewhere empty
  int family = 0;                        // x86 family; 0 elsewhere
  int model = 0;                         // x86 model, Arm part number; 0 when unknown
  int logical_cores = 1;                 // hardware threads this process may run on
  int physical_cores = 1;                // cores behind them: SMT siblings count once
  // Data or unified cache that one core sees, in bytes; 0 when unknown.
  std::int64_t l1_bytes = 0;
  std::int64_t l2_bytes = 0;
  std::int64_t l3_bytes = 0;
};

// The first call detects, later calls return the same object. Thread-safe; never fails: what cannot
// be read stays false, empty or zero. `amx_int8` says that CPU and kernel have it; Linux grants the
// tile registers only to a process that asks (arch_prctl ARCH_REQ_XCOMP_PERM) before first use.
const CpuInfo& cpu_info() noexcept;

}  // namespace sqc

#endif  // SQC_BASE_CPU_H_
