#include "kernels/qgemm/qgemm.h"

#include <cstring>

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QgemmFunction> kKernels[] = {
#define SQC_QGEMM_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qgemm/kernels.inc"
#undef SQC_QGEMM_KERNEL
};

}  // namespace

Status qgemm_check_sizes(std::int64_t n, std::int64_t k) noexcept {
  if (n < 0 || k < 0) return Status::error(StatusCode::kInvalidArgument, "qgemm: a size is negative");
  if (k > kQgemmMaxK) {
    return Status::error(StatusCode::kInvalidArgument, "qgemm: k = %lld; int32 sums hold up to %lld",
                         static_cast<long long>(k), static_cast<long long>(kQgemmMaxK));
  }
  return Status::ok();
}

Status qgemm_check(const QgemmParams& p) noexcept {
  SQC_RETURN_IF_ERROR(qgemm_check_sizes(p.n, p.k));
  if (p.m < 0) return Status::error(StatusCode::kInvalidArgument, "qgemm: a size is negative");
  if (p.a_stride < (p.k + 3) / 4 * 4) {
    return Status::error(StatusCode::kInvalidArgument, "qgemm: a_stride is less than k rounded up to 4");
  }
  if (p.c_stride < p.n) return Status::error(StatusCode::kInvalidArgument, "qgemm: c_stride is less than n");
  return Status::ok();
}

Span<const Kernel<QgemmFunction>> qgemm_kernels() noexcept { return kKernels; }

const Kernel<QgemmFunction>& qgemm_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status qgemm(ThreadPool& pool, const Kernel<QgemmFunction>& kernel, const QgemmParams& p) noexcept {
  SQC_RETURN_IF_ERROR(qgemm_check(p));
  if (p.m == 0 || p.n == 0) return Status::ok();
  // Four panels are a strip of the widest kernel.
  const std::int64_t panels = (p.n + 15) / 16, unit = p.m > 4 ? 4 : 1;
  const std::int64_t least = p.m > 4 ? unit : items_of_a_part(p.k * 16);
  return run_shared(pool, panels, unit, least, [&](int, Range part) { kernel.run(p, part.begin, part.end); });
}

std::int64_t qgemm_packed_bytes(std::int64_t n, std::int64_t k) noexcept {
  return (n + 15) / 16 * ((k + 3) / 4) * 64;
}

Status qgemm_pack(std::int64_t n, std::int64_t k, const std::int8_t* b, std::int8_t* packed, std::int32_t* sum) noexcept {
  SQC_RETURN_IF_ERROR(qgemm_check_sizes(n, k));
  const std::int64_t tiles = (k + 3) / 4;
  for (std::int64_t row = 0; row < (n + 15) / 16 * 16; ++row) {
    std::int8_t* out = packed + row / 16 * tiles * 64 + row % 16 * 4;
    std::int32_t total = 0;
    for (std::int64_t t = 0; t < tiles; ++t, out += 64) {
      std::int8_t four[4] = {};
      if (row < n) {
        for (std::int64_t i = 0; i < 4 && 4 * t + i < k; ++i) total += four[i] = b[row * k + 4 * t + i];
      }
      std::memcpy(out, four, 4);
    }
    sum[row] = total;
  }
  return Status::ok();
}

}  // namespace sqc
