// Which instruction set the kernels use.
//
// The levels of one architecture are ordered: each includes the ones before it. A level is available
// when the CPU has its instructions and the operating system saves their registers (base/cpu.h).

#ifndef SQC_BASE_ISA_H_
#define SQC_BASE_ISA_H_

#include <cstdint>

#include "base/span.h"
#include "base/status.h"

#if defined(__x86_64__) || defined(_M_X64)
#define SQC_ARCH_X86 1
#elif defined(__aarch64__) || defined(_M_ARM64)
#define SQC_ARCH_ARM64 1
#endif

namespace sqc {

enum class Isa : std::uint8_t {
  scalar,        // plain C++, on every CPU
  avx2,          // + FMA, F16C: Haswell, Zen and later
  avx512vnni,    // F, BW, VL, DQ, VNNI: Cascade Lake and later
  avx512vbmi,    // + VBMI, VBMI2: Ice Lake, Zen 4 and later
  neon_dotprod,  // NEON with sdot: Armv8.2 cores from Cortex-A55/A76 on
};

// The levels of this build's architecture, weakest first.
Span<const Isa> isa_levels() noexcept;

const char* isa_name(Isa isa) noexcept;

// Whether the instructions may be executed here and now.
bool isa_available(Isa isa) noexcept;

// Whether code for `required` runs where `level` is available.
bool isa_includes(Isa level, Isa required) noexcept;

// The best level available.
Isa best_isa() noexcept;

// The level called `name`; an unknown name and a level that this CPU lacks are errors, because
// whoever asks for a level wants to know that it ran.
Status find_isa(const char* name, Isa* isa) noexcept;

// What `SQCOMPILE_ISA` asks for, else the best level available. Read once, at the first call.
Status default_isa(Isa* isa) noexcept;

// One line of a family's kernels.inc: a name, what it needs, and the function.
template <typename Function>
struct Kernel {
  const char* name;
  Isa isa;
  Function run;
};

// The first kernel of the list that runs at `level`. Lists go from best to worst and end with a scalar
// kernel, so that there always is one.
template <typename Function, std::size_t N>
const Kernel<Function>& first_kernel(const Kernel<Function> (&list)[N], Isa level) noexcept {
  for (std::size_t i = 0; i + 1 < N; ++i) {
    if (isa_includes(level, list[i].isa)) return list[i];
  }
  return list[N - 1];
}

}  // namespace sqc

#endif  // SQC_BASE_ISA_H_
