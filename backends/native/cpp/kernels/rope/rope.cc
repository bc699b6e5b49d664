#include "kernels/rope/rope.h"

namespace sqc {
namespace {

constexpr Kernel<RopeFunction> kKernels[] = {
#define SQC_ROPE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/rope/kernels.inc"
#undef SQC_ROPE_KERNEL
};

Status check(const RopeParams& p) noexcept {
  const auto invalid = [](const char* what) { return Status::error(StatusCode::kInvalidArgument, "rope: %s", what); };
  if (p.batch < 0 || p.tokens < 0 || p.heads < 0 || p.head_dim < 0) return invalid("a size is negative");
  if (p.rotary_dim < 0 || p.rotary_dim > p.head_dim || p.rotary_dim % 2 != 0) {
    return invalid("rotary_dim is not even or not between 0 and head_dim");
  }
  if (p.table_stride < p.rotary_dim / 2) return invalid("table_stride is less than half of rotary_dim");
  for (std::int64_t b = 0; b < (p.position_stride == 0 ? 1 : p.batch); ++b) {
    const std::int64_t position = p.position[b * p.position_stride];
    if (position < 0) return invalid("a position is negative");
    if (p.tokens > p.table_rows - position) {
      return Status::error(StatusCode::kInvalidArgument, "rope: %lld tokens from position %lld, but tables for %lld",
                           static_cast<long long>(p.tokens), static_cast<long long>(position),
                           static_cast<long long>(p.table_rows));
    }
  }
  return Status::ok();
}

}  // namespace

Span<const Kernel<RopeFunction>> rope_kernels() noexcept { return kKernels; }

const Kernel<RopeFunction>& rope_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

Status rope(ThreadPool& pool, const Kernel<RopeFunction>& kernel, const RopeParams& p) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  const std::int64_t items = p.batch * p.tokens;
  // As in quantize.cc: waking threads costs more than a few tokens do.
  constexpr std::int64_t kSmall = 16384;
  if (items * p.heads * p.head_dim <= kSmall) {
    kernel.run(p, 0, items);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range range = split_evenly(items, 1, pool.threads(), thread);
    if (range.begin < range.end) kernel.run(p, range.begin, range.end);
  });
}

}  // namespace sqc
