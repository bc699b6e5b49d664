#include "kernels/qsparse/qsparse.h"

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QsparseFunction> kKernels[] = {
#define SQC_QSPARSE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qsparse/kernels.inc"
#undef SQC_QSPARSE_KERNEL
};

}  // namespace

Span<const Kernel<QsparseFunction>> qsparse_kernels() noexcept { return kKernels; }

const Kernel<QsparseFunction>& qsparse_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qsparse_scratch_bytes(std::int64_t m, std::int64_t k) noexcept {
  constexpr std::int64_t kWidestStrip = 4;  // panels
  return m > 1 ? (k + 3) / 4 * 64 * kWidestStrip : 0;
}

Status qsparse(ThreadPool& pool, const Kernel<QsparseFunction>& kernel, const QsparseParams& params,
               std::uint8_t* scratch) noexcept {
  const QgemmParams& p = params.dense;
  SQC_RETURN_IF_ERROR(qgemm_check(p));
  if (p.m == 0 || p.n == 0) return Status::ok();
  const std::int64_t panels = (p.n + 15) / 16, tiles = (p.k + 3) / 4;
  const std::int64_t scratch_bytes = qsparse_scratch_bytes(p.m, p.k);
  const auto run = [&](int thread, Range part) {
    kernel.run(params, part.begin, part.end, scratch + thread * scratch_bytes);
  };
  // A few rows take the time of reading; many take that of multiplying, which is the same for all.
  if (p.m > 4) return run_shared(pool, panels, 4, 4, run);
  return run_shared_by_cost(pool, {params.value_start, static_cast<std::size_t>(panels) + 1},
                            static_cast<std::uint64_t>(tiles) * 8, 1, items_of_a_part(tiles * 32), run);
}

std::int64_t qsparse_mask_count(std::int64_t n, std::int64_t k) noexcept { return (n + 15) / 16 * ((k + 3) / 4); }

Status qsparse_pack(std::int64_t n, std::int64_t k, const std::int8_t* b, std::uint64_t* masks, std::uint8_t* values,
                    std::uint64_t* value_start, std::int32_t* sum) noexcept {
  SQC_RETURN_IF_ERROR(qgemm_check_sizes(n, k));
  const std::int64_t panels = (n + 15) / 16, tiles = (k + 3) / 4;
  std::uint64_t stored = 0;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    value_start[panel] = stored;
    for (std::int64_t i = 0; i < 16; ++i) sum[panel * 16 + i] = 0;
    for (std::int64_t t = 0; t < tiles; ++t) {
      std::uint64_t mask = 0;
      for (std::int64_t i = 0; i < 64; ++i) {
        const std::int64_t row = panel * 16 + i / 4, column = t * 4 + i % 4;
        const std::int8_t weight = row < n && column < k ? b[row * k + column] : std::int8_t{0};
        if (weight == 0) continue;
        mask |= std::uint64_t{1} << i;
        values[stored++] = static_cast<std::uint8_t>(weight);
        sum[row] += weight;
      }
      masks[panel * tiles + t] = mask;
    }
  }
  value_start[panels] = stored;
  return Status::ok();
}

}  // namespace sqc
