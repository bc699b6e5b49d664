#include "kernels/attention/attention.h"

#include <atomic>

namespace sqc {
namespace {

constexpr Kernel<AttentionFunction> kKernels[] = {
#define SQC_ATTENTION_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/attention/kernels.inc"
#undef SQC_ATTENTION_KERNEL
};

Status invalid(const char* what) noexcept {
  return Status::error(StatusCode::kInvalidArgument, "attention: %s", what);
}

Status check(const AttentionParams& p) noexcept {
  SQC_RETURN_IF_ERROR(kv_check(p.cache));
  if (p.heads < 0 || p.queries < 0) return invalid("a size is negative");
  if (p.cache.heads == 0 ? p.heads != 0 : p.heads % p.cache.heads != 0) {
    return invalid("the number of heads is not a multiple of that of key heads");
  }
  for (std::int64_t b = 0; b < (p.length_stride == 0 ? 1 : p.cache.batch); ++b) {
    const std::int64_t length = p.length[b * p.length_stride];
    if (length < 0 || length > p.cache.capacity) return invalid("a length is not between 0 and the capacity");
  }
  for (std::int64_t b = 0; p.causal && b < (p.position_stride == 0 ? 1 : p.cache.batch); ++b) {
    if (p.position[b * p.position_stride] < 0) return invalid("a position is negative");
  }
  if ((p.mask_kind == AttentionMask::none) != (p.mask == nullptr)) return invalid("a mask without its kind, or a kind without mask");
  return Status::ok();
}

}  // namespace

Span<const Kernel<AttentionFunction>> attention_kernels() noexcept { return kKernels; }

const Kernel<AttentionFunction>& attention_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t attention_scratch_count(std::int64_t head_dim) noexcept {
  // Queries and output of a tile, scores of a block, maxima and sums of the rows, a block of keys and one of
  // values as floats.
  return kAttentionTileRows * (2 * kv_row(head_dim) + kAttentionKeyBlock + 2 * 16) + 2 * kAttentionKeyBlock * kv_row(head_dim);
}

void attention_of_item(const Kernel<AttentionFunction>& kernel, const AttentionParams& p, std::int64_t item,
                       float* scratch) noexcept {
  const std::int64_t rows = p.heads / p.cache.heads * p.queries;
  for (std::int64_t first = 0; first < rows; first += kAttentionTileRows) {
    kernel.run(p, {item, first, rows - first < kAttentionTileRows ? rows - first : kAttentionTileRows}, scratch);
  }
}

Status attention(ThreadPool& pool, const Kernel<AttentionFunction>& kernel, const AttentionParams& p,
                 float* scratch) noexcept {
  SQC_RETURN_IF_ERROR(check(p));
  const std::int64_t items = p.cache.batch * p.cache.heads;
  if (items == 0 || p.heads == 0 || p.queries == 0) return Status::ok();
  const std::int64_t rows = p.heads / p.cache.heads * p.queries, threads = pool.threads();
  std::int64_t tile_rows = kAttentionTileRows;
  if (p.queries == 1) {
    // All rows see the same keys, so that a row's result does not depend on its tile: as many tiles as give
    // each thread one.
    const std::int64_t wanted = (threads + items - 1) / items, most = (rows + wanted - 1) / wanted;
    tile_rows = most < tile_rows ? most : tile_rows;
  }
  const std::int64_t tiles = (rows + tile_rows - 1) / tile_rows;
  // Tiles cost what they see of the keys, which masks make unequal: threads take the next one when done, the
  // costly last ones of each item first.
  std::atomic<std::int64_t> next{0};
  const std::int64_t scratch_count = attention_scratch_count(p.cache.head_dim);
  return pool.run([&](int thread) {
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < items * tiles;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      const std::int64_t first = (tiles - 1 - i % tiles) * tile_rows;
      const std::int64_t count = rows - first < tile_rows ? rows - first : tile_rows;
      kernel.run(p, {i / tiles, first, count}, scratch + thread * scratch_count);
    }
  });
}

}  // namespace sqc
