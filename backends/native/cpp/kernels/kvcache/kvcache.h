// The cache of keys and values that attention reads, and the kernel that appends to it.
//
// Keys lie in panels of 16 positions, so that sixteen lanes are sixteen positions and a score needs no
// horizontal sum; values lie in rows, so that sixteen lanes are sixteen dimensions of the output:
//
//   k [batch][heads][capacity / 16][head_dim][16]     k[.., j / 16, d, j % 16] is dimension d of position j
//   v [batch][heads][capacity][kv_row(head_dim)]      rows padded with zeros to a multiple of 16
//
// as float32, or as signed 8-bit codes with one scale a position and head, which family `quantize` defines
// (symmetric: scale = max |x| / 127): x is about scale * code. What lies at positions not yet written is
// never used, whatever it is.

#ifndef SQC_KERNELS_KVCACHE_KVCACHE_H_
#define SQC_KERNELS_KVCACHE_KVCACHE_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"

namespace sqc {

enum class KvType : std::uint8_t { f32, s8 };

struct KvCache {
  KvType type;
  std::int64_t batch, heads, capacity, head_dim;  // capacity: positions, a multiple of 16
  void* k;                                        // float or std::int8_t
  void* v;
  float *k_scale, *v_scale;  // s8: [batch][heads][capacity]; f32: null
};

constexpr std::int64_t kv_row(std::int64_t head_dim) noexcept { return (head_dim + 15) / 16 * 16; }

// Bytes of k, of v, and of each of the scales.
struct KvBytes {
  std::int64_t k, v, scale;
};
KvBytes kv_bytes(const KvCache& cache) noexcept;

Status kv_check(const KvCache& cache) noexcept;

struct KvcacheParams {
  KvCache cache;
  std::int64_t tokens;  // to append, for each sequence of the batch
  // Where the first of them goes: position[b * position_stride]; stride 0 if one serves all sequences.
  const std::int64_t* position;
  std::int64_t position_stride;
  // Element (b, h, t, d) lies at b * batch_stride + h * head_stride + t * token_stride + d.
  const float* k;
  std::int64_t k_batch_stride, k_head_stride, k_token_stride;
  const float* v;
  std::int64_t v_batch_stride, v_head_stride, v_token_stride;
};

// Items [begin, end) of batch times heads.
using KvcacheFunction = void (*)(const KvcacheParams& params, std::int64_t begin, std::int64_t end);

#define SQC_KVCACHE_KERNEL(isa, name) void name(const KvcacheParams&, std::int64_t, std::int64_t);
#include "kernels/kvcache/kernels.inc"
#undef SQC_KVCACHE_KERNEL

Span<const Kernel<KvcacheFunction>> kvcache_kernels() noexcept;
const Kernel<KvcacheFunction>& kvcache_kernel(Isa isa) noexcept;

// Checks the parameters, that the tokens fit included, and appends.
Status kvcache(ThreadPool& pool, const Kernel<KvcacheFunction>& kernel, const KvcacheParams& params) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_KVCACHE_KVCACHE_H_
