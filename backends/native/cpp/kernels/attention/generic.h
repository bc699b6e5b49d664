// The algorithm of every attention kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_ATTENTION_GENERIC_H_
#define SQC_KERNELS_ATTENTION_GENERIC_H_

#include "kernels/attention/attention.h"
#include "kernels/chain.h"
#include "kernels/float_math.h"
#include "kernels/lanes.h"

namespace sqc {
namespace {

// Where a row's mask begins; null without one.
static SQC_INLINE const void* mask_row(const AttentionParams& p, std::int64_t batch, std::int64_t head, std::int64_t query) {
  const std::int64_t at = batch * p.mask_batch_stride + head * p.mask_head_stride + query * p.mask_query_stride;
  if (p.mask_kind == AttentionMask::boolean) return static_cast<const std::uint8_t*>(p.mask) + at;
  if (p.mask_kind == AttentionMask::additive) return static_cast<const float*>(p.mask) + at;
  return nullptr;
}

// Scores of positions [j, j + 16) after scale and mask; those from `limit` on become -inf. `length` is where
// the mask ends.
template <class S>
static SQC_INLINE typename S::F32 mask_scores(const AttentionParams& p, typename S::F32 score, const float* k_scale,
                                              const void* mask, std::int64_t j, std::int64_t limit, std::int64_t length) {
  const auto none = S::set_f(-kInfinity);
  if (k_scale != nullptr) score = S::mul_f(score, S::load_f(k_scale + j));
  if (p.mask_kind == AttentionMask::additive) {
    score = S::add_f(score, load_lanes<S>(static_cast<const float*>(mask) + j, length - j));
  } else if (p.mask_kind == AttentionMask::boolean) {
    std::int8_t bytes[16] = {};
    const std::int64_t count = length - j < 16 ? length - j : 16;
    std::memcpy(bytes, static_cast<const std::uint8_t*>(mask) + j, static_cast<std::size_t>(count));
    const auto flag = S::to_float(S::load_i8(bytes));
    score = S::select_less(S::set_f(0.0f), magnitude<S>(flag), score, none);
  }
  if (limit - j < 16) {
    alignas(64) static constexpr float kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    score = S::select_less(S::load_f(kIndex), S::set_f(static_cast<float>(limit - j)), score, none);
  }
  return score;
}

// What a tile keeps while it passes over the keys.
struct AttentionState {
  float* query;    // [rows][head_dim], scaled
  float* out;      // [rows][row]
  float* scores;   // [rows][kAttentionKeyBlock]
  float* sums;     // [rows][16], lane by lane
  float* maximum;  // [rows]
};

// One block of keys: scores to weights, in place, with the sums and the output so far on the new maximum.
// `j` is the first position, `vectors` how many sixteens of scores there are.
template <class S>
static void softmax_block(const AttentionParams& p, const AttentionState& state, std::int64_t r, const float* k_scale,
                          const float* v_scale, const void* mask, std::int64_t j, std::int64_t vectors,
                          std::int64_t limit, std::int64_t length) {
  float* scores = state.scores + r * kAttentionKeyBlock;
  auto largest = S::set_f(-kInfinity);
  for (std::int64_t w = 0; w < vectors; ++w) {
    const auto score = mask_scores<S>(p, S::load_f(scores + w * 16), k_scale, mask, j + w * 16, limit, length);
    largest = S::max_f(score, largest);
    S::store_f(scores + w * 16, score);
  }
  const float before = state.maximum[r], block_maximum = S::largest_lane(largest);
  const float maximum = block_maximum > before ? block_maximum : before;
  // -inf so far: any finite number will do, exp(-inf - 0) is 0.
  const auto shift = S::set_f(maximum == -kInfinity ? 0.0f : maximum);
  auto sum = S::load_f(state.sums + r * 16);
  if (maximum > before) {
    const auto factor = exp_nonpositive<S>(S::sub_f(S::set_f(before), shift));
    const std::int64_t row = kv_row(p.cache.head_dim);
    float* out = state.out + r * row;
    for (std::int64_t d = 0; d < row; d += 16) S::store_f(out + d, S::mul_f(S::load_f(out + d), factor));
    sum = S::mul_f(sum, factor);
    state.maximum[r] = maximum;
  }
  for (std::int64_t w = 0; w < vectors; ++w) {
    auto weight = exp_nonpositive<S>(S::sub_f(S::load_f(scores + w * 16), shift));
    sum = S::add_f(sum, weight);
    if (v_scale != nullptr) weight = S::mul_f(weight, S::load_f(v_scale + j + w * 16));
    S::store_f(scores + w * 16, weight);
  }
  S::store_f(state.sums + r * 16, sum);
}

template <class S, int MaxRows, int Vectors, class T>
static void attention_tile(const AttentionParams& p, const AttentionTile& tile, float* scratch) {
  const KvCache& c = p.cache;
  const std::int64_t dim = c.head_dim, row = kv_row(dim), group = p.heads / c.heads;
  const std::int64_t batch = tile.item / c.heads, head = tile.item % c.heads * group;
  const std::int64_t length = p.length[batch * p.length_stride];
  const std::int64_t position = p.causal ? p.position[batch * p.position_stride] : 0;
  const auto* keys = static_cast<const T*>(c.k) + tile.item * c.capacity * dim;
  const auto* values = static_cast<const T*>(c.v) + tile.item * c.capacity * row;
  const float* k_scale = c.type == KvType::s8 ? c.k_scale + tile.item * c.capacity : nullptr;
  const float* v_scale = c.type == KvType::s8 ? c.v_scale + tile.item * c.capacity : nullptr;
  // How many keys a row may see.
  const auto limit_of = [&](std::int64_t r) {
    if (!p.causal) return length;
    const std::int64_t limit = position + (tile.first + r) / group + 1;
    return limit < length ? limit : length;
  };

  AttentionState state;
  state.query = scratch;
  state.out = state.query + kAttentionTileRows * row;
  state.scores = state.out + kAttentionTileRows * row;
  state.sums = state.scores + kAttentionTileRows * kAttentionKeyBlock;
  state.maximum = state.sums + kAttentionTileRows * 16;
  float* key_block = state.maximum + kAttentionTileRows * 16;
  float* value_block = key_block + kAttentionKeyBlock * row;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t t = (tile.first + r) / group, h = head + (tile.first + r) % group;
    const float* q = p.q + batch * p.q_batch_stride + h * p.q_head_stride + t * p.q_token_stride;
    for (std::int64_t d = 0; d < dim; d += 16) {
      store_lanes<S>(state.query + r * dim + d, dim - d, S::mul_f(load_lanes<S>(q + d, dim - d), S::set_f(p.scale)));
    }
    for (std::int64_t d = 0; d < row; d += 16) S::store_f(state.out + r * row + d, S::set_f(0.0f));
    S::store_f(state.sums + r * 16, S::set_f(0.0f));
    state.maximum[r] = -kInfinity;
  }

  const std::int64_t last = limit_of(tile.rows - 1);  // limits ascend
  for (std::int64_t j = 0; j < last; j += kAttentionKeyBlock) {
    const std::int64_t count = last - j < kAttentionKeyBlock ? last - j : kAttentionKeyBlock;
    const std::int64_t vectors = (count + 15) / 16;
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      for (std::int64_t w = 0; w < vectors; ++w) S::store_f(state.scores + r * kAttentionKeyBlock + w * 16, S::set_f(0.0f));
    }
    const T* k = keys + j * dim;
    const T* v = values + j * row;
    if constexpr (sizeof(T) == 1) {
      if (tile.rows > MaxRows) {  // several blocks of rows: make floats of the codes once
        for (std::int64_t i = 0; i < vectors * dim * 16; i += 16) S::store_f(key_block + i, load_as_float<S>(k + i));
        for (std::int64_t i = 0; i < count * row; i += 16) S::store_f(value_block + i, load_as_float<S>(v + i));
      }
    }
    const bool as_floats = sizeof(T) == 1 && tile.rows > MaxRows;
    const auto multiply = [&](const float* from, std::int64_t from_stride, const T* b, const float* floats,
                              std::int64_t b_vectors, std::int64_t vector_stride, std::int64_t step, std::int64_t steps,
                              float* to, std::int64_t to_stride) {
      if (as_floats) {
        const Columns<float> columns = {floats, b_vectors, vector_stride, step};
        chain_all<S, MaxRows, Vectors>(tile.rows, from, from_stride, columns, steps, to, to_stride);
      } else {
        const Columns<T> columns = {b, b_vectors, vector_stride, step};
        chain_all<S, MaxRows, Vectors>(tile.rows, from, from_stride, columns, steps, to, to_stride);
      }
    };
    multiply(state.query, dim, k, key_block, vectors, dim * 16, 16, dim, state.scores, kAttentionKeyBlock);
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      const std::int64_t t = (tile.first + r) / group, h = head + (tile.first + r) % group;
      softmax_block<S>(p, state, r, k_scale, v_scale, mask_row(p, batch, h, t), j, vectors, limit_of(r), length);
    }
    multiply(state.scores, kAttentionKeyBlock, v, value_block, row / 16, 16, row, count, state.out, row);
  }

  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t t = (tile.first + r) / group, h = head + (tile.first + r) % group;
    float* out = p.out + batch * p.out_batch_stride + h * p.out_head_stride + t * p.out_token_stride;
    const float sum = sum_lanes<S>(S::load_f(state.sums + r * 16));
    const auto divisor = S::set_f(sum == 0.0f ? 1.0f : sum);  // no key at all: the output is zeros already
    for (std::int64_t d = 0; d < dim; d += 16) {
      store_lanes<S>(out + d, dim - d, S::div_f(S::load_f(state.out + r * row + d), divisor));
    }
  }
}

// Up to MaxRows x Vectors sums of 16 lanes are in registers.
template <class S, int MaxRows, int Vectors>
static void attention_generic(const AttentionParams& p, const AttentionTile& tile, float* scratch) {
  if (p.cache.type == KvType::s8) {
    attention_tile<S, MaxRows, Vectors, std::int8_t>(p, tile, scratch);
  } else {
    attention_tile<S, MaxRows, Vectors, float>(p, tile, scratch);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_ATTENTION_GENERIC_H_
