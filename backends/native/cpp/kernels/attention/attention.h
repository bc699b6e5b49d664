// Scaled dot-product attention over a cache of keys and values (kernels/kvcache), for decoding, prefill at any
// position, and encoders: fused, so that no matrix of scores is ever in memory.
//
//   query head h reads key head h / (heads / kv_heads); query t of sequence b sits at position[b] + t
//   s[j]   = (sum over d of (scale * q[d]) * k[j][d]) (* k_scale[j]) (+ mask[j])      for j < length[b]
//   s[j]   = -inf where the mask is false, or j > position[b] + t when causal
//   out[d] = (sum over j of exp(s[j] - max s) (* v_scale[j]) * v[j][d]) / (sum over j of exp(s[j] - max s))
//
// and zeros where every s[j] is -inf, as PyTorch's scaled_dot_product_attention gives. Sums run over d and j
// in ascending order as chains of fma, in float32. The maximum is that of the keys seen so far, block by block
// of kAttentionKeyBlock positions from 0 on; when it grows, what has been summed is multiplied by
// exp(old - new). A NaN among a row's scores makes that row NaN. The value of a masked key is still multiplied
// by zero where it shares a tile with a query that sees it, so it has to be finite, as PyTorch also has it.

#ifndef SQC_KERNELS_ATTENTION_ATTENTION_H_
#define SQC_KERNELS_ATTENTION_ATTENTION_H_

#include <cstdint>

#include "base/isa.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "kernels/kvcache/kvcache.h"

namespace sqc {

// On Zen 4, 64 was 8 % slower with 128 keys: a row's maximum and its sums change with every block.
constexpr std::int64_t kAttentionKeyBlock = 128;
// Rows of a tile: pairs of a query and one of the heads that share a key head, queries first.
constexpr std::int64_t kAttentionTileRows = 24;

enum class AttentionMask : std::uint8_t {
  none,
  boolean,   // one byte a key; zero: not this key
  additive,  // a float a key, added to the score; -inf: not this key
};

struct AttentionParams {
  KvCache cache;
  std::int64_t heads, queries;  // heads: a multiple of cache.heads
  // Element (b, h, t, d) lies at b * batch_stride + h * head_stride + t * token_stride + d.
  const float* q;
  std::int64_t q_batch_stride, q_head_stride, q_token_stride;
  float* out;
  std::int64_t out_batch_stride, out_head_stride, out_token_stride;
  // Of sequence b: how many keys there are, and where its first query sits (used when causal). Entry
  // b * stride; stride 0 if one serves all sequences.
  const std::int64_t *length, *position;
  std::int64_t length_stride, position_stride;
  bool causal;
  float scale;  // usually 1 / sqrt(head_dim)
  AttentionMask mask_kind;
  const void* mask;  // [..][length]; strides in elements, 0 where one entry serves all
  std::int64_t mask_batch_stride, mask_head_stride, mask_query_stride;
};

// One tile: rows [first, first + rows) of key head `item` of batch * cache.heads. Row r is query
// r / group of head r % group, of the `group` heads that share the key head. `scratch` is 64-byte aligned and
// this thread's own.
struct AttentionTile {
  std::int64_t item, first, rows;  // rows: 1 to kAttentionTileRows
};
using AttentionFunction = void (*)(const AttentionParams& params, const AttentionTile& tile, float* scratch);

#define SQC_ATTENTION_KERNEL(isa, name) void name(const AttentionParams&, const AttentionTile&, float*);
#include "kernels/attention/kernels.inc"
#undef SQC_ATTENTION_KERNEL

Span<const Kernel<AttentionFunction>> attention_kernels() noexcept;
const Kernel<AttentionFunction>& attention_kernel(Isa isa) noexcept;

// Floats of scratch that a thread needs.
std::int64_t attention_scratch_count(std::int64_t head_dim) noexcept;

// All tiles of one item, by the thread that calls it; the parameters are those that `attention` takes, unchecked.
void attention_of_item(const Kernel<AttentionFunction>& kernel, const AttentionParams& params, std::int64_t item,
                       float* scratch) noexcept;

// Checks the parameters and runs `kernel` on all tiles; `scratch` holds pool.threads() times
// attention_scratch_count floats. The result does not depend on the kernel or the number of threads, bit for
// bit, NaNs excepted: which bits a NaN has is the instruction set's choice.
Status attention(ThreadPool& pool, const Kernel<AttentionFunction>& kernel, const AttentionParams& params,
                 float* scratch) noexcept;

}  // namespace sqc

#endif  // SQC_KERNELS_ATTENTION_ATTENTION_H_
