// The algorithm of every kvcache kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_KVCACHE_GENERIC_H_
#define SQC_KERNELS_KVCACHE_GENERIC_H_

#include "kernels/kvcache/kvcache.h"
#include "kernels/lanes.h"
#include "kernels/quantize/generic.h"

namespace sqc {
namespace {

// Keys of tokens [0, tokens), in rows `stride` apart, to lanes `lane`, `lane` + 1, ... of one panel.
template <class S>
static void append_keys_f32(const float* k, std::int64_t stride, std::int64_t tokens, std::int64_t lane,
                            std::int64_t head_dim, float* panel) {
  std::int64_t d = 0;
  if (tokens == 16) {  // the whole panel
    for (; d + 16 <= head_dim; d += 16) {
      typename S::I32 rows[16];
      SQC_UNROLL for (int t = 0; t < 16; ++t) rows[t] = S::as_int(S::load_f(k + t * stride + d));
      S::transpose(rows);
      SQC_UNROLL for (int i = 0; i < 16; ++i) S::store_f(panel + (d + i) * 16, S::as_float(rows[i]));
    }
  }
  for (; d < head_dim; ++d) {
    for (std::int64_t t = 0; t < tokens; ++t) panel[d * 16 + lane + t] = k[t * stride + d];
  }
}

template <class S>
static void append_values_f32(const float* v, std::int64_t stride, std::int64_t tokens, std::int64_t head_dim, float* out) {
  const std::int64_t row = kv_row(head_dim);
  for (std::int64_t t = 0; t < tokens; ++t, v += stride, out += row) {
    for (std::int64_t d = 0; d < row; d += 16) S::store_f(out + d, load_lanes<S>(v + d, head_dim - d));
  }
}

// The codes of x [head_dim], with zeros up to padded_dim, in `out`; returns their scale.
template <class S>
static float append_codes(const float* x, std::int64_t head_dim, std::int64_t padded_dim, std::int8_t* out) {
  QuantizeParams params = {};
  params.is_signed = true;
  const float scale = symmetric_scale<S>(x, 0, head_dim);
  convert<S>(params, x, reinterpret_cast<std::uint8_t*>(out), 0, head_dim, padded_dim, scale, 0);
  return scale;
}

template <class S>
static void append_s8(const KvcacheParams& p, const float* k, const float* v, std::int64_t item, std::int64_t position) {
  const KvCache& c = p.cache;
  const std::int64_t row = kv_row(c.head_dim);
  auto* keys = static_cast<std::int8_t*>(c.k) + item * c.capacity * c.head_dim;
  auto* values = static_cast<std::int8_t*>(c.v) + item * c.capacity * row;
  for (std::int64_t t = 0; t < p.tokens; ++t) {
    const std::int64_t j = position + t;
    // The key's codes pass through where the value's codes will lie.
    std::int8_t* codes = values + j * row;
    c.k_scale[item * c.capacity + j] = append_codes<S>(k + t * p.k_token_stride, c.head_dim, c.head_dim, codes);
    std::int8_t* panel = keys + j / 16 * c.head_dim * 16 + j % 16;
    for (std::int64_t d = 0; d < c.head_dim; ++d) panel[d * 16] = codes[d];
    c.v_scale[item * c.capacity + j] = append_codes<S>(v + t * p.v_token_stride, c.head_dim, row, codes);
  }
}

template <class S>
static void kvcache_generic(const KvcacheParams& p, std::int64_t begin, std::int64_t end) {
  const KvCache& c = p.cache;
  for (std::int64_t item = begin; item < end; ++item) {
    const std::int64_t b = item / c.heads, h = item % c.heads, position = p.position[b * p.position_stride];
    const float* k = p.k + b * p.k_batch_stride + h * p.k_head_stride;
    const float* v = p.v + b * p.v_batch_stride + h * p.v_head_stride;
    if (c.type == KvType::s8) {
      append_s8<S>(p, k, v, item, position);
      continue;
    }
    const std::int64_t row = kv_row(c.head_dim);
    auto* keys = static_cast<float*>(c.k) + item * c.capacity * c.head_dim;
    auto* values = static_cast<float*>(c.v) + (item * c.capacity + position) * row;
    append_values_f32<S>(v, p.v_token_stride, p.tokens, c.head_dim, values);
    for (std::int64_t t = 0; t < p.tokens;) {
      const std::int64_t j = position + t, room = 16 - j % 16, left = p.tokens - t, count = left < room ? left : room;
      append_keys_f32<S>(k + t * p.k_token_stride, p.k_token_stride, count, j % 16, c.head_dim,
                         keys + j / 16 * c.head_dim * 16);
      t += count;
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_KVCACHE_GENERIC_H_
