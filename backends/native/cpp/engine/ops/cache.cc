// Operators that keep what a text leaves behind: attention to all positions so far, and tensors that grow.

#include <initializer_list>

#include "engine/generation_state.h"
#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

Status no_text() noexcept {
  return Status::error(StatusCode::kInvalidArgument, "it continues texts, and there is none");
}

// Rows from `begin` on whose slots and tokens lie behind each other, and are as many: one call of a kernel.
std::size_t end_of_group(Span<const BatchRow> rows, std::size_t begin) noexcept {
  std::size_t end = begin + 1;
  while (end < rows.size() && rows[end].slot == rows[end - 1].slot + 1 && rows[end].tokens == rows[begin].tokens &&
         rows[end].first == rows[end - 1].first + rows[begin].tokens) {
    ++end;
  }
  return end;
}

constexpr std::size_t kGroup = 64;  // rows whose lengths fit on the stack

}  // namespace

// Inputs: query [1, H, M, D], key and value [1, G, T, D] of the new tokens, elements of a head beside each other; a
// mask [1, 1 or H, 1 or M, S] over the positions of a row, as `attention` takes it. ints: whether M counts rows (1:
// each row's last token) or tokens (0); the number of the cache. floats: scale. Output [1, H, M, D]: a token sees its
// row's positions up to its own.
Status prepare_cached_attention(PrepareContext& c) noexcept {
  const Tensor &query = c.in(0), &key = c.in(1), &value = c.in(2), &out = c.out();
  if (c.state == nullptr) return no_text();
  for (const Tensor* tensor : {&query, &key, &value, &out}) {
    SQC_REQUIRE(tensor->dtype == DType::f32 && tensor->rank == 4 && tensor->shape[0] == 1);
    SQC_REQUIRE(tensor->stride[3] == 1 || tensor->shape[3] <= 1);
  }
  SQC_REQUIRE(key.same_shape(value) && out.same_shape(query) && key.shape[3] == query.shape[3]);
  SQC_REQUIRE(key.shape[1] > 0 && query.shape[1] > 0 && query.shape[1] % key.shape[1] == 0);
  SQC_REQUIRE(c.integer(0) == 0 || c.integer(0) == 1);
  SQC_REQUIRE(c.state->has_cache(c.integer(1), key.shape[1], key.shape[3]));
  if (c.has(3)) {
    const Tensor& mask = c.in(3);
    SQC_REQUIRE(mask.dtype == DType::boolean || mask.dtype == DType::f32);
    SQC_REQUIRE(mask.rank == 4 && mask.shape[0] == 1 && (mask.stride[3] == 1 || mask.shape[3] <= 1));
    for (int d = 1; d < 3; ++d) SQC_REQUIRE(mask.shape[d] == 1 || mask.shape[d] == query.shape[d]);
  }
  c.need_scratch(c.threads * attention_scratch_count(key.shape[3]) * 4);
  return Status::ok();
}

Status run_cached_attention(RunContext& c) noexcept {
  const Tensor &query = c.in(0), &key = c.in(1), &value = c.in(2), &out = c.out();
  const GenerationState& state = *c.state;
  const Span<const BatchRow> rows = state.rows;
  const bool last = c.integer(0) == 1;
  // That the rows fit their tensors depends on the call, and is checked here.
  SQC_REQUIRE(!last || query.shape[2] == static_cast<std::int64_t>(rows.size()));
  for (std::size_t begin = 0; begin < rows.size();) {
    std::size_t end = end_of_group(rows, begin);
    if (end - begin > kGroup) end = begin + kGroup;
    const BatchRow& row = rows[begin];
    const auto count = static_cast<std::int64_t>(end - begin);
    const std::int64_t first = last ? static_cast<std::int64_t>(begin) : row.first, queries = last ? 1 : row.tokens;
    SQC_REQUIRE(row.first >= 0 && row.tokens >= 1 && row.first + count * row.tokens <= key.shape[2]);
    SQC_REQUIRE(first + count * queries <= query.shape[2] && row.slot >= 0 && row.slot + count <= state.slots());
    std::int64_t past[kGroup], length[kGroup], position[kGroup];
    for (std::size_t i = begin; i < end; ++i) {
      past[i - begin] = rows[i].past;
      length[i - begin] = rows[i].past + row.tokens;
      position[i - begin] = length[i - begin] - queries;
      SQC_REQUIRE(rows[i].past >= 0 && length[i - begin] <= state.capacity());
      SQC_REQUIRE(!c.has(3) || length[i - begin] <= c.in(3).shape[3]);
    }
    const std::int64_t key_at = row.first * key.stride[2], value_at = row.first * value.stride[2];
    const KvCache cache = state.cache(c.integer(1), row.slot, count);
    const KvcacheParams append = {cache,
                                  row.tokens,
                                  past,
                                  1,
                                  key.as<float>() + key_at,
                                  row.tokens * key.stride[2],
                                  key.stride[1],
                                  key.stride[2],
                                  value.as<float>() + value_at,
                                  row.tokens * value.stride[2],
                                  value.stride[1],
                                  value.stride[2]};
    SQC_RETURN_IF_ERROR(kvcache(c.pool, c.kernels.kvcache, append));
    AttentionParams params = {};
    params.cache = cache;
    params.heads = query.shape[1];
    params.queries = queries;
    params.q = query.as<float>() + first * query.stride[2];
    params.q_batch_stride = queries * query.stride[2];
    params.q_head_stride = query.stride[1];
    params.q_token_stride = query.stride[2];
    params.out = out.as<float>() + first * out.stride[2];
    params.out_batch_stride = queries * out.stride[2];
    params.out_head_stride = out.stride[1];
    params.out_token_stride = out.stride[2];
    params.length = length;
    params.length_stride = 1;
    params.position = position;
    params.position_stride = 1;
    params.causal = true;
    params.scale = static_cast<float>(c.number(0));
    params.mask_kind = AttentionMask::none;
    if (c.has(3)) {
      const Tensor& mask = c.in(3);
      params.mask_kind = mask.dtype == DType::f32 ? AttentionMask::additive : AttentionMask::boolean;
      params.mask_query_stride = mask.shape[2] == 1 ? 0 : mask.stride[2];
      params.mask_batch_stride = queries * params.mask_query_stride;
      params.mask_head_stride = mask.shape[1] == 1 ? 0 : mask.stride[1];
      params.mask = mask.data + first * params.mask_query_stride * dtype_bytes(mask.dtype);
    }
    SQC_RETURN_IF_ERROR(attention(c.pool, c.kernels.attention, params, reinterpret_cast<float*>(c.scratch)));
    begin = end;
  }
  return Status::ok();
}

// A tensor [.., new, ..] that is put behind those of earlier positions. ints: dimension, number of the tensor.
// Output: all positions [.., S, ..]; what lies behind the last one is from some earlier text, or zero.
Status prepare_append(PrepareContext& c) noexcept {
  const Tensor& in = c.in(0);
  Tensor& out = c.out();
  const std::int64_t dim = c.integer(0);
  if (c.state == nullptr) return no_text();
  SQC_REQUIRE(in.dtype == out.dtype && in.rank == out.rank && dim >= 0 && dim < in.rank && in.is_contiguous());
  std::int64_t position_bytes = dtype_bytes(in.dtype);
  for (int d = 0; d < in.rank; ++d) {
    if (d == dim) continue;
    SQC_REQUIRE(in.shape[d] == out.shape[d]);
    position_bytes *= in.shape[d];
  }
  SQC_REQUIRE(c.state->has_tensor(c.integer(1), position_bytes) && out.shape[dim] <= c.state->capacity());
  std::int64_t stride = 1;
  for (int d = out.rank; d-- > 0;) {
    out.stride[d] = stride;
    stride *= d == dim ? c.state->capacity() : out.shape[d];
  }
  c.state_number = c.integer(1);
  return Status::ok();
}

Status run_append(RunContext& c) noexcept {
  const Span<const BatchRow> rows = c.state->rows;
  const std::int64_t dim = c.integer(0);
  Tensor part = c.out();
  SQC_REQUIRE(rows.size() == 1 && rows[0].tokens == c.in(0).shape[dim]);
  SQC_REQUIRE(rows[0].past >= 0 && rows[0].past + rows[0].tokens <= part.shape[dim]);
  part.data += rows[0].past * part.stride[dim] * dtype_bytes(part.dtype);
  part.shape[dim] = rows[0].tokens;
  return copy_elements(c.pool, part, c.in(0));
}

}  // namespace sqc
