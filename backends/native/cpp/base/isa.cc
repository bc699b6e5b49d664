#include "base/isa.h"

#include <cstdlib>
#include <cstring>

#include "base/cpu.h"

namespace sqc {
namespace {

#if defined(SQC_ARCH_X86)
constexpr Isa kLevels[] = {Isa::scalar, Isa::avx2, Isa::avx512vnni, Isa::avx512vbmi};
#elif defined(SQC_ARCH_ARM64)
constexpr Isa kLevels[] = {Isa::scalar, Isa::neon_dotprod};
#else
constexpr Isa kLevels[] = {Isa::scalar};
#endif

constexpr Isa kAll[] = {Isa::scalar, Isa::avx2, Isa::avx512vnni, Isa::avx512vbmi, Isa::neon_dotprod};

bool is_of_this_architecture(Isa isa) noexcept {
  for (const Isa level : kLevels) {
    if (level == isa) return true;
  }
  return false;
}

Status read_default(Isa* isa) noexcept {
  const char* name = std::getenv("SQCOMPILE_ISA");
  if (name == nullptr || *name == '\0') {
    *isa = best_isa();
    return Status::ok();
  }
  return find_isa(name, isa);
}

struct Default {
  Isa isa = Isa::scalar;
  Status status = read_default(&isa);
};

}  // namespace

Span<const Isa> isa_levels() noexcept { return kLevels; }

const char* isa_name(Isa isa) noexcept {
  switch (isa) {
    case Isa::scalar: return "scalar";
    case Isa::avx2: return "avx2";
    case Isa::avx512vnni: return "avx512vnni";
    case Isa::avx512vbmi: return "avx512vbmi";
    case Isa::neon_dotprod: return "neon_dotprod";
  }
  return "unknown";
}

bool isa_available(Isa isa) noexcept {
  if (!is_of_this_architecture(isa)) return false;
  const CpuFlags& f = cpu_info().flags;
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512vnni = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512_vnni;
  switch (isa) {
    case Isa::scalar: return true;
    case Isa::avx2: return avx2;
    case Isa::avx512vnni: return avx512vnni;
    case Isa::avx512vbmi: return avx512vnni && f.avx512_vbmi && f.avx512_vbmi2;
    case Isa::neon_dotprod: return f.dotprod;
  }
  return false;
}

bool isa_includes(Isa level, Isa required) noexcept {
  if (level == Isa::neon_dotprod || required == Isa::neon_dotprod) {
    return level == required || required == Isa::scalar;
  }
  return required <= level;
}

Isa best_isa() noexcept {
  Isa best = Isa::scalar;
  for (const Isa level : kLevels) {
    if (isa_available(level)) best = level;
  }
  return best;
}

Status find_isa(const char* name, Isa* isa) noexcept {
  for (const Isa candidate : kAll) {
    if (std::strcmp(isa_name(candidate), name) != 0) continue;
    if (!isa_available(candidate)) {
      return Status::error(StatusCode::kUnsupported,
                           "this CPU or its operating system lacks the instruction set '%s'; the best here is '%s'",
                           name, isa_name(best_isa()));
    }
    *isa = candidate;
    return Status::ok();
  }
  return Status::error(StatusCode::kInvalidArgument,
                       "no instruction set is called '%.40s'; there are scalar, avx2, avx512vnni, avx512vbmi, "
                       "neon_dotprod",
                       name);
}

Status default_isa(Isa* isa) noexcept {
  static const Default value;
  *isa = value.isa;
  return value.status;
}

}  // namespace sqc
