#include "kernels/kvcache/kvcache.h"

namespace sqc {
namespace {

constexpr Kernel<KvcacheFunction> kKernels[] = {
#define SQC_KVCACHE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/kvcache/kernels.inc"
#undef SQC_KVCACHE_KERNEL
};

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "kvcache: %s", what); }

}  // namespace

Span<const Kernel<KvcacheFunction>> kvcache_kernels() noexcept { return kKernels; }

const Kernel<KvcacheFunction>& kvcache_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

KvBytes kv_bytes(const KvCache& c) noexcept {
  const std::int64_t positions = c.batch * c.heads * c.capacity, size = c.type == KvType::f32 ? 4 : 1;
  return {positions * c.head_dim * size, positions * kv_row(c.head_dim) * size, c.type == KvType::f32 ? 0 : positions * 4};
}

Status kv_check(const KvCache& c) noexcept {
  if (c.batch < 0 || c.heads < 0 || c.capacity < 0) return invalid("a size is negative");
  if (c.head_dim < 1) return invalid("head_dim is less than 1");
  if (c.capacity % 16 != 0) return invalid("the capacity is not a multiple of 16");
  if (c.type == KvType::s8 && (c.k_scale == nullptr || c.v_scale == nullptr)) return invalid("8-bit codes need scales");
  return Status::ok();
}

Status kvcache(ThreadPool& pool, const Kernel<KvcacheFunction>& kernel, const KvcacheParams& p) noexcept {
  SQC_RETURN_IF_ERROR(kv_check(p.cache));
  if (p.tokens < 0) return invalid("a size is negative");
  for (std::int64_t b = 0; b < (p.position_stride == 0 ? 1 : p.cache.batch); ++b) {
    const std::int64_t position = p.position[b * p.position_stride];
    if (position < 0) return invalid("a position is negative");
    if (p.tokens > p.cache.capacity - position) {
      return Status::error(StatusCode::kInvalidArgument,
                           "kvcache: %lld tokens do not fit behind the %lld of a cache for %lld",
                           static_cast<long long>(p.tokens), static_cast<long long>(position),
                           static_cast<long long>(p.cache.capacity));
    }
  }
  const std::int64_t items = p.cache.batch * p.cache.heads;
  // Decoding appends a few kilobytes, which takes less time than waking a thread.
  constexpr std::int64_t kSmall = 16384;
  if (items * p.tokens * p.cache.head_dim <= kSmall) {
    kernel.run(p, 0, items);
    return Status::ok();
  }
  return pool.run([&](int thread) {
    const Range range = split_evenly(items, 1, pool.threads(), thread);
    if (range.begin < range.end) kernel.run(p, range.begin, range.end);
  });
}

}  // namespace sqc
