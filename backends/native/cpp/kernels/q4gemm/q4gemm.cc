#include "kernels/q4gemm/q4gemm.h"

#include <cstring>

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<Q4gemmFunction> kKernels[] = {
#define SQC_Q4GEMM_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/q4gemm/kernels.inc"
#undef SQC_Q4GEMM_KERNEL
};

Status invalid(const char* what) noexcept {
  return Status::error(StatusCode::kInvalidArgument, "q4gemm: %s", what);
}

bool are_bits(int bits) noexcept { return (bits >= 2 && bits <= 4) || bits == 8; }

std::int64_t padded_k(std::int64_t k, std::int64_t group) noexcept { return (k + group - 1) / group * group; }

}  // namespace

Status q4gemm_check_sizes(std::int64_t n, std::int64_t k, std::int64_t group) noexcept {
  if (n < 0 || k < 0) return invalid("a size is negative");
  if (k > kQ4gemmMaxK) return invalid("k is over 65536, more than int32 sums are proven to hold");
  if (group != 32 && group != 64 && group != 128) return invalid("the group is not 32, 64 or 128");
  return Status::ok();
}

Status q4gemm_check(const Q4gemmParams& p) noexcept {
  SQC_RETURN_IF_ERROR(q4gemm_check_sizes(p.n, p.k, p.group));
  if (p.m < 0) return invalid("a size is negative");
  if (p.a_stride < padded_k(p.k, p.group)) return invalid("a_stride is less than k rounded up to whole groups");
  if (p.c_stride < p.n) return invalid("c_stride is less than n");
  if (!are_bits(p.bits)) return invalid("codes have not 2, 3, 4 or 8 bits");
  for (const std::int8_t entry : p.table) {
    if (entry == -128) return invalid("a table entry is -128; entries are -127 to 127");
  }
  return Status::ok();
}

Span<const Kernel<Q4gemmFunction>> q4gemm_kernels() noexcept { return kKernels; }

const Kernel<Q4gemmFunction>& q4gemm_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t q4gemm_scratch_bytes(std::int64_t m, std::int64_t k, std::int64_t group) noexcept {
  constexpr std::int64_t kWidestStrip = 32;  // outputs
  return m > 1 ? padded_k(k, group) * kWidestStrip : 0;
}

Status q4gemm(ThreadPool& pool, const Kernel<Q4gemmFunction>& kernel, const Q4gemmParams& p,
              std::uint8_t* scratch) noexcept {
  SQC_RETURN_IF_ERROR(q4gemm_check(p));
  if (p.m == 0 || p.n == 0) return Status::ok();
  const std::int64_t panels = (p.n + 15) / 16, unit = p.m > 4 ? 2 : 1;
  const std::int64_t scratch_bytes = q4gemm_scratch_bytes(p.m, p.k, p.group);
  const std::int64_t least = p.m > 4 ? unit : items_of_a_part(p.k * 2 * p.bits);
  return run_shared(pool, panels, unit, least, [&](int thread, Range part) {
    kernel.run(p, part.begin, part.end, scratch + thread * scratch_bytes);
  });
}

std::int64_t q4gemm_packed_bytes(std::int64_t n, std::int64_t k, std::int64_t group, int bits) noexcept {
  return (n + 15) / 16 * 16 * padded_k(k, group) * bits / 8;
}

Status q4gemm_pack(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* codes, std::uint8_t* packed,
                   int bits) noexcept {
  SQC_RETURN_IF_ERROR(q4gemm_check_sizes(n, k, group));
  if (!are_bits(bits)) return invalid("codes have not 2, 3, 4 or 8 bits");
  const std::int64_t panel_bytes = padded_k(k, group) * 2 * bits;
  std::memset(packed, 0, static_cast<std::size_t>(q4gemm_packed_bytes(n, k, group, bits)));
  for (std::int64_t row = 0; row < n; ++row) {
    std::uint8_t* out = packed + row / 16 * panel_bytes + row % 16 * 4;
    const auto put = [out](std::int64_t at, int code, std::int64_t shift) {
      out[at] = static_cast<std::uint8_t>(out[at] | code << shift);
    };
    for (std::int64_t i = 0; i < k; ++i) {
      const int code = codes[row * k + i];
      if (bits == 8 && code == 128) return invalid("a weight is -128; 8-bit weights are -127 to 127");
      if (code >> bits != 0) {
        return Status::error(StatusCode::kInvalidArgument, "q4gemm: a code is over %d", (1 << bits) - 1);
      }
      const std::int64_t within = i % 4, tile = i / 4;
      if (bits == 4) put(tile / 2 * 64 + within, code, tile % 2 * 4);
      if (bits == 8) put(tile * 64 + within, code, 0);
      if (bits == 2) put(tile / 4 * 64 + within, code, tile % 4 * 2);
      if (bits == 3) {
        const std::int64_t run = tile / 8 * 192 + within;
        put(run + tile % 8 / 4 * 64, code & 3, tile % 4 * 2);
        put(run + 128, code >> 2, tile % 8);
      }
    }
  }
  return Status::ok();
}

}  // namespace sqc
