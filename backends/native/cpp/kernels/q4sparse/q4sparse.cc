#include "kernels/q4sparse/q4sparse.h"

#include <cstring>

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<Q4sparseFunction> kKernels[] = {
#define SQC_Q4SPARSE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/q4sparse/kernels.inc"
#undef SQC_Q4SPARSE_KERNEL
};

std::int64_t group_count(std::int64_t k, std::int64_t group) noexcept { return (k + group - 1) / group; }

// Whether the byte `i` of tile `t` of a panel is a kept weight, and which; -1: no.
std::int64_t kept_at(std::int64_t n, std::int64_t k, const std::uint8_t* keep, std::int64_t panel, std::int64_t t,
                     std::int64_t i) noexcept {
  const std::int64_t row = panel * 16 + i / 4, column = t * 4 + i % 4;
  if (row >= n || column >= k || keep[row * k + column] == 0) return -1;
  return row * k + column;
}

}  // namespace

Span<const Kernel<Q4sparseFunction>> q4sparse_kernels() noexcept { return kKernels; }

const Kernel<Q4sparseFunction>& q4sparse_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status q4sparse(ThreadPool& pool, const Kernel<Q4sparseFunction>& kernel, const Q4sparseParams& params,
                std::uint8_t* scratch) noexcept {
  const Q4gemmParams& p = params.dense;
  SQC_RETURN_IF_ERROR(q4gemm_check(p));
  if (p.bits != 4) return Status::error(StatusCode::kInvalidArgument, "q4sparse: codes have not 4 bits");
  if (p.b_zero != nullptr) {
    return Status::error(StatusCode::kInvalidArgument, "q4sparse: zero points are not supported");
  }
  if (p.m == 0 || p.n == 0) return Status::ok();
  const std::int64_t panels = (p.n + 15) / 16;
  const std::int64_t scratch_bytes = q4gemm_scratch_bytes(p.m, p.k, p.group);
  // Masks and scales: equal for all panels.
  const std::int64_t groups = group_count(p.k, p.group);
  const auto fixed_bytes = static_cast<std::uint64_t>(groups * (p.group * 2 + (p.b_scale_is_half ? 32 : 64)));
  const auto run = [&](int thread, Range part) {
    kernel.run(params, part.begin, part.end, scratch + thread * scratch_bytes);
  };
  if (p.m > 4) return run_shared(pool, panels, 2, 2, run);
  return run_shared_by_cost(pool, {params.value_start, static_cast<std::size_t>(panels) + 1}, fixed_bytes, 1,
                            items_of_a_part(p.k * 8), run);
}

std::int64_t q4sparse_mask_count(std::int64_t n, std::int64_t k, std::int64_t group) noexcept {
  return (n + 15) / 16 * group_count(k, group) * (group / 4);
}

std::int64_t q4sparse_value_bytes(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* keep) noexcept {
  const std::int64_t panels = (n + 15) / 16, groups = group_count(k, group), tiles = group / 4;
  std::int64_t bytes = 0;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    for (std::int64_t g = 0; g < groups; ++g) {
      std::int64_t lengths[2] = {};
      for (std::int64_t t = 0; t < tiles; ++t) {
        for (std::int64_t i = 0; i < 64; ++i) {
          lengths[t >= tiles / 2] += kept_at(n, k, keep, panel, g * tiles + t, i) >= 0;
        }
      }
      bytes += lengths[0] > lengths[1] ? lengths[0] : lengths[1];
    }
  }
  return bytes;
}

Status q4sparse_pack(std::int64_t n, std::int64_t k, std::int64_t group, const std::uint8_t* codes,
                     const std::uint8_t* keep, std::uint64_t* masks, std::uint8_t* values,
                     std::uint64_t* value_start) noexcept {
  SQC_RETURN_IF_ERROR(q4gemm_check_sizes(n, k, group));
  const std::int64_t panels = (n + 15) / 16, groups = group_count(k, group), tiles = group / 4;
  std::memset(values, 0, static_cast<std::size_t>(q4sparse_value_bytes(n, k, group, keep)));
  std::uint64_t stored = 0;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    value_start[panel] = stored;
    for (std::int64_t g = 0; g < groups; ++g) {
      std::uint64_t lengths[2] = {};
      for (std::int64_t t = 0; t < tiles; ++t) {
        const int stream = t >= tiles / 2;
        std::uint64_t mask = 0;
        for (std::int64_t i = 0; i < 64; ++i) {
          const std::int64_t at = kept_at(n, k, keep, panel, g * tiles + t, i);
          if (at < 0) continue;
          if (codes[at] > 15) return Status::error(StatusCode::kInvalidArgument, "q4sparse: a code is over 15");
          mask |= std::uint64_t{1} << i;
          std::uint8_t& byte = values[stored + lengths[stream]++];
          byte = static_cast<std::uint8_t>(byte | codes[at] << (4 * stream));
        }
        masks[(panel * groups + g) * tiles + t] = mask;
      }
      stored += lengths[0] > lengths[1] ? lengths[0] : lengths[1];
    }
  }
  value_start[panels] = stored;
  return Status::ok();
}

}  // namespace sqc
