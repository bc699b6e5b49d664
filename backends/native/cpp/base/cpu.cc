#include "base/cpu.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#define SQC_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define SQC_ARM64 1
#endif

#if defined(__linux__)
#include <sched.h>
#if defined(SQC_ARM64)
#include <sys/auxv.h>
#endif
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sqc {
namespace {

#if defined(SQC_X86)

struct Cpuid {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros for a leaf above the highest one: asking the CPU returns the data of another leaf.
Cpuid cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) noexcept {
  Cpuid r;
#if defined(_MSC_VER)
  int v[4];
  __cpuid(v, static_cast<int>(leaf & 0x80000000u));
  if (static_cast<std::uint32_t>(v[0]) < leaf) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r.eax = v[0], r.ebx = v[1], r.ecx = v[2], r.edx = v[3];
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

constexpr bool bit(std::uint64_t word, int index) noexcept { return (word >> index) & 1; }

// XCR0: which register files the operating system saves. Only valid where OSXSAVE is set.
std::uint64_t xcr0() noexcept {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  // As bytes: the mnemonic and its intrinsic need -mxsave, and this file is built for any x86-64.
  std::uint32_t low, high;
  __asm__ volatile(".byte 0x0f, 0x01, 0xd0" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

void detect_flags(CpuFlags& f) noexcept {
  const Cpuid basic = cpuid(1);
  const std::uint64_t saved = bit(basic.ecx, 27) ? xcr0() : 0;
  const auto os_saves = [saved](std::uint64_t mask) { return (saved & mask) == mask; };
  const bool ymm = os_saves(0x6);       // XMM, YMM
  const bool zmm = os_saves(0xe6);      // XMM, YMM, opmask, ZMM0-15 upper halves, ZMM16-31
  const bool tiles = os_saves(0x60000);  // AMX tile configuration, tile data

  f.sse4_1 = bit(basic.ecx, 19);
  f.avx = ymm && bit(basic.ecx, 28);
  f.fma = f.avx && bit(basic.ecx, 12);
  f.f16c = f.avx && bit(basic.ecx, 29);

  const Cpuid extended = cpuid(7);
  f.gfni = bit(extended.ecx, 8);  // has an SSE encoding, so it needs no OS support of its own
  f.avx2 = f.avx && bit(extended.ebx, 5);
  f.avx512f = f.avx && zmm && bit(extended.ebx, 16);
  f.avx512dq = f.avx512f && bit(extended.ebx, 17);
  f.avx512bw = f.avx512f && bit(extended.ebx, 30);
  f.avx512vl = f.avx512f && bit(extended.ebx, 31);
  f.avx512_vbmi = f.avx512f && bit(extended.ecx, 1);
  f.avx512_vbmi2 = f.avx512f && bit(extended.ecx, 6);
  f.avx512_vnni = f.avx512f && bit(extended.ecx, 11);
  f.amx_int8 = tiles && bit(extended.edx, 24) && bit(extended.edx, 25);

  if (extended.eax >= 1) {  // the highest subleaf
    const Cpuid more = cpuid(7, 1);
    f.avx_vnni = f.avx2 && bit(more.eax, 4);
    f.avx512_bf16 = f.avx512f && bit(more.eax, 5);
  }
}

void detect_identity(CpuInfo& info) noexcept {
  info.architecture = "x86_64";
  const Cpuid zero = cpuid(0);
  const std::uint32_t vendor[3] = {zero.ebx, zero.edx, zero.ecx};
  std::memcpy(info.vendor, vendor, sizeof vendor);  // 12 bytes; the struct holds the end mark

  const std::uint32_t signature = cpuid(1).eax;
  const std::uint32_t base_family = (signature >> 8) & 0xf;
  info.family = static_cast<int>(base_family + (base_family == 0xf ? (signature >> 20) & 0xff : 0));
  const std::uint32_t model_high = info.family >= 6 ? (signature >> 16) & 0xf : 0;
  info.model = static_cast<int>((model_high << 4) | ((signature >> 4) & 0xf));

  char raw[49] = "";
  for (std::uint32_t part = 0; part < 3; ++part) {
    const Cpuid text = cpuid(0x80000002u + part);
    std::memcpy(raw + 16 * part, &text, 16);
  }
  const char* start = raw;
  while (*start == ' ') ++start;  // older Intel parts pad on the left
  std::size_t length = std::strlen(start);
  while (length > 0 && start[length - 1] == ' ') --length;
  std::memcpy(info.brand, start, length);
}

// Intel's leaf 4 and AMD's 0x8000001d have one layout; AMD leaves 4 empty.
void detect_caches(CpuInfo& info) noexcept {
  for (const std::uint32_t leaf : {0x4u, 0x8000001du}) {
    for (std::uint32_t index = 0; index < 16; ++index) {
      const Cpuid c = cpuid(leaf, index);
      const std::uint32_t type = c.eax & 0x1f;  // 0 none, 1 data, 2 instruction, 3 unified
      if (type == 0) break;
      if (type == 2) continue;
      const std::int64_t ways = (c.ebx >> 22) + 1, partitions = ((c.ebx >> 12) & 0x3ff) + 1;
      const std::int64_t line = (c.ebx & 0xfff) + 1, sets = static_cast<std::int64_t>(c.ecx) + 1;
      const std::int64_t size = ways * partitions * line * sets;
      switch ((c.eax >> 5) & 0x7) {
        case 1: info.l1_bytes = size; break;
        case 2: info.l2_bytes = size; break;
        case 3: info.l3_bytes = size; break;
        default: break;
      }
    }
    if (info.l1_bytes != 0) return;
  }
}

#elif defined(SQC_ARM64)

#if defined(__APPLE__)
std::int64_t sysctl_number(const char* name) noexcept {
  std::int64_t value = 0;  // little-endian, so a 32-bit answer lands in the low half
  std::size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : 0;
}
#endif

void detect_flags(CpuFlags& f) noexcept {
#if defined(__linux__)
  // Bit numbers of the kernel's ABI (arch/arm64/include/uapi/asm/hwcap.h), spelled out because an
  // older libc's headers lack the newer names.
  const unsigned long hwcap = getauxval(AT_HWCAP), hwcap2 = getauxval(AT_HWCAP2);
  f.dotprod = (hwcap >> 20) & 1;
  f.sve = (hwcap >> 22) & 1;
  f.i8mm = (hwcap2 >> 13) & 1;
#elif defined(__APPLE__)
  f.dotprod = sysctl_number("hw.optional.arm.FEAT_DotProd") != 0;
  f.i8mm = sysctl_number("hw.optional.arm.FEAT_I8MM") != 0;
#else
  (void)f;
#endif
}

void detect_identity(CpuInfo& info) noexcept {
  info.architecture = "aarch64";
#if defined(__linux__)
  constexpr unsigned long kCpuidBit = 1ul << 11;  // the kernel answers reads of MIDR_EL1 for us
  if ((getauxval(AT_HWCAP) & kCpuidBit) == 0) return;
  std::uint64_t midr;
  __asm__("mrs %0, MIDR_EL1" : "=r"(midr));
  info.model = static_cast<int>((midr >> 4) & 0xfff);
  const struct {
    unsigned code;
    const char* name;
  } implementers[] = {{0x41, "Arm"},     {0x42, "Broadcom"}, {0x43, "Cavium"},   {0x46, "Fujitsu"},
                      {0x48, "HiSilicon"}, {0x4e, "NVIDIA"},   {0x51, "Qualcomm"}, {0x61, "Apple"},
                      {0x6d, "Microsoft"}, {0xc0, "Ampere"}};
  for (const auto& known : implementers) {
    if (known.code == ((midr >> 24) & 0xff)) std::snprintf(info.vendor, sizeof info.vendor, "%s", known.name);
  }
#elif defined(__APPLE__)
  std::snprintf(info.vendor, sizeof info.vendor, "Apple");
#endif
}

void detect_caches(CpuInfo& info) noexcept {
#if defined(__linux__)
  for (int index = 0; index < 8; ++index) {
    char path[96], type[16] = "";
    int level = 0;
    long kibibytes = 0;
    const auto read = [&](const char* name, const char* format, void* value) {
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/%s", index, name);
      std::FILE* file = std::fopen(path, "r");
      if (file == nullptr) return false;
      const bool found = std::fscanf(file, format, value) == 1;
      std::fclose(file);
      return found;
    };
    if (!read("level", "%d", &level) || !read("size", "%ldK", &kibibytes) || !read("type", "%15s", type)) continue;
    if (std::strcmp(type, "Instruction") == 0) continue;
    const std::int64_t size = static_cast<std::int64_t>(kibibytes) * 1024;
    if (level == 1) info.l1_bytes = size;
    if (level == 2) info.l2_bytes = size;
    if (level == 3) info.l3_bytes = size;
  }
#elif defined(__APPLE__)
  info.l1_bytes = sysctl_number("hw.perflevel0.l1dcachesize");
  info.l2_bytes = sysctl_number("hw.perflevel0.l2cachesize");
#else
  (void)info;
#endif
}

#else

void detect_flags(CpuFlags&) noexcept {}
void detect_identity(CpuInfo&) noexcept {}
void detect_caches(CpuInfo&) noexcept {}

#endif

void detect_cores(CpuInfo& info) noexcept {
  const unsigned reported = std::thread::hardware_concurrency();
  info.logical_cores = reported > 0 ? static_cast<int>(reported) : 1;
  info.physical_cores = info.logical_cores;
#if defined(__linux__)
  // The affinity mask, not the machine: taskset and a container's cpuset both act through it.
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int logical = 0, physical = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    ++logical;
    // The list starts with the core's lowest thread ("3-4", "0,8"): a core counts at that thread.
    char path[96];
    std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    int first = cpu;
    if (std::FILE* file = std::fopen(path, "r")) {
      if (std::fscanf(file, "%d", &first) != 1) first = cpu;
      std::fclose(file);
    }
    const bool counted_before = first < cpu && CPU_ISSET(first, &allowed);
    if (!counted_before) ++physical;
  }
  if (logical > 0) info.logical_cores = logical, info.physical_cores = physical;
#endif
}

CpuInfo detect() noexcept {
  CpuInfo info;
  detect_flags(info.flags);
  detect_identity(info);
  detect_caches(info);
  detect_cores(info);
  return info;
}

}  // namespace

const CpuInfo& cpu_info() noexcept {
  static const CpuInfo info = detect();
  return info;
}

}  // namespace sqc
