// Scaled dot-product attention: keys and values are arranged as the kernel reads them, then it runs.

#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <utility>

#include "engine/kernels.h"
#include "engine/operators.h"

namespace sqc {
namespace {

// With so many heads of keys for each thread, threads take whole heads: what a thread arranges it reads right away,
// from the nearest cache. With fewer, some thread would be left with one more than others for too long.
constexpr std::int64_t kHeadsOfAThread = 4;

// Where things lie in the scratch memory: arrangements of keys and values, then what threads compute in.
struct Places {
  KvCache cache;       // of all heads, or of the one that a thread is at
  bool by_head;        // the latter: a cache for each thread
  std::int64_t v;      // values of a cache, behind its keys
  std::int64_t stride;  // from one thread's cache to the next one's
  std::int64_t threads, bytes;
};

Places places_of(const Operands& c, int threads) noexcept {
  const Tensor& key = c.in(1);
  const auto round_up = [](std::int64_t x, std::int64_t unit) { return (x + unit - 1) / unit * unit; };
  Places p = {};
  p.by_head = key.shape[0] * key.shape[1] >= kHeadsOfAThread * threads;
  p.cache.type = KvType::f32;
  p.cache.batch = p.by_head ? 1 : key.shape[0];
  p.cache.heads = p.by_head ? 1 : key.shape[1];
  p.cache.capacity = round_up(key.shape[2] > 0 ? key.shape[2] : 1, kAttentionKeyBlock);
  p.cache.head_dim = key.shape[3];
  const KvBytes bytes = kv_bytes(p.cache);
  p.v = round_up(bytes.k, 64);
  p.stride = p.v + round_up(bytes.v, 64);
  p.threads = p.by_head ? threads * p.stride : p.stride;
  p.bytes = p.threads + threads * round_up(attention_scratch_count(key.shape[3]) * 4, 64);
  return p;
}

// Each head by one thread, from the arrangement of its keys to its output.
Status run_by_head(ThreadPool& pool, const Kernels& kernels, const Places& places, const KvcacheParams& append,
                   const AttentionParams& params, std::int64_t batch, std::int64_t kv_heads, std::uint8_t* scratch) noexcept {
  const std::int64_t items = batch * kv_heads, group = params.heads / kv_heads;
  const std::int64_t mask_size = params.mask_kind == AttentionMask::additive ? 4 : 1;
  const std::int64_t floats = attention_scratch_count(places.cache.head_dim);
  std::atomic<std::int64_t> next{0};
  return pool.run([&](int thread) {
    KvcacheParams head_append = append;
    AttentionParams head = params;
    head_append.cache.k = scratch + thread * places.stride;
    head_append.cache.v = scratch + thread * places.stride + places.v;
    head.cache = head_append.cache;
    head.heads = group;
    for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      const std::int64_t b = i / kv_heads, h = i % kv_heads, first = h * group;
      head_append.k = append.k + b * append.k_batch_stride + h * append.k_head_stride;
      head_append.v = append.v + b * append.v_batch_stride + h * append.v_head_stride;
      kernels.kvcache.run(head_append, 0, 1);
      head.q = params.q + b * params.q_batch_stride + first * params.q_head_stride;
      head.out = params.out + b * params.out_batch_stride + first * params.out_head_stride;
      if (params.mask != nullptr) {
        head.mask = static_cast<const std::uint8_t*>(params.mask) +
                    (b * params.mask_batch_stride + first * params.mask_head_stride) * mask_size;
      }
      attention_of_item(kernels.attention, head, 0, reinterpret_cast<float*>(scratch + places.threads) + thread * floats);
    }
  });
}

// The output with its heads before its tokens, however it lies.
Tensor output_by_head(const Operands& c) noexcept {
  Tensor out = c.out();
  if (c.ints() > 1 && c.integer(1) != 0 && out.rank == 4) {
    std::swap(out.shape[1], out.shape[2]);
    std::swap(out.stride[1], out.stride[2]);
  }
  return out;
}

}  // namespace

// Inputs: query [B, H, L, D], key [B, G, S, D], value [B, G, S, D], where H is a multiple of G; elements of a
// head lie beside each other. And a mask that is broadcast to [B, H, L, S], with all S of a row beside each
// other: boolean (true where attended to) or numbers to add. ints: whether position i attends to positions up
// to i only; whether the output is [B, L, H, D]. floats: scale. Output [B, H, L, D]; zeros for a row that attends to
// nothing.
Status prepare_attention(PrepareContext& c) noexcept {
  const Tensor &query = c.in(0), &key = c.in(1), &value = c.in(2), out = output_by_head(c);
  for (const Tensor* tensor : {&query, &key, &value, &out}) {
    SQC_REQUIRE(tensor->dtype == DType::f32 && tensor->rank == 4);
    SQC_REQUIRE(tensor->stride[3] == 1 || tensor->shape[3] <= 1);
  }
  SQC_REQUIRE(key.same_shape(value) && out.same_shape(query));
  SQC_REQUIRE(key.shape[0] == query.shape[0] && key.shape[3] == query.shape[3]);
  SQC_REQUIRE(query.shape[1] == 0 || (key.shape[1] > 0 && query.shape[1] % key.shape[1] == 0));
  if (c.has(3)) {
    const Tensor& mask = c.in(3);
    Tensor scores = out;
    scores.shape[3] = key.shape[2];
    SQC_REQUIRE(mask.dtype == DType::boolean || mask.dtype == DType::f32);
    SQC_REQUIRE(mask.rank == 4 && mask.shape[3] == key.shape[2] && (mask.stride[3] == 1 || mask.shape[3] <= 1));
    for (int d = 0; d < 3; ++d) SQC_REQUIRE(mask.shape[d] == 1 || mask.shape[d] == scores.shape[d]);
  }
  // The arrangement is at most 128 times larger than what it arranges: its size cannot overflow.
  SQC_REQUIRE(key.shape[0] * key.shape[1] < (std::int64_t{1} << 31) && key.shape[2] < (std::int64_t{1} << 31));
  SQC_REQUIRE(key.shape[3] >= 1 && key.shape[3] <= 65536 && key.bytes() <= (std::int64_t{1} << 40));
  c.need_scratch(places_of(c, c.threads).bytes);
  return Status::ok();
}

Status run_attention(RunContext& c) noexcept {
  const Tensor &query = c.in(0), &key = c.in(1), &value = c.in(2), out = output_by_head(c);
  if (out.count() == 0) return Status::ok();
  const Places places = places_of(c, c.pool.threads());
  KvCache cache = places.cache;
  cache.k = c.scratch;
  cache.v = c.scratch + places.v;
  const std::int64_t length = key.shape[2], begin = 0;
  const KvcacheParams append = {cache,
                                length,
                                &begin,
                                0,
                                key.as<float>(),
                                key.stride[0],
                                key.stride[1],
                                key.stride[2],
                                value.as<float>(),
                                value.stride[0],
                                value.stride[1],
                                value.stride[2]};
  AttentionParams params = {};
  params.cache = cache;
  params.heads = query.shape[1];
  params.queries = query.shape[2];
  params.q = query.as<float>();
  params.q_batch_stride = query.stride[0];
  params.q_head_stride = query.stride[1];
  params.q_token_stride = query.stride[2];
  params.out = out.as<float>();
  params.out_batch_stride = out.stride[0];
  params.out_head_stride = out.stride[1];
  params.out_token_stride = out.stride[2];
  params.length = &length;
  params.position = &begin;
  params.causal = c.integer(0) != 0;
  params.scale = static_cast<float>(c.number(0));
  params.mask_kind = AttentionMask::none;
  if (c.has(3)) {
    const Tensor& mask = c.in(3);
    params.mask_kind = mask.dtype == DType::f32 ? AttentionMask::additive : AttentionMask::boolean;
    params.mask = mask.data;
    params.mask_batch_stride = mask.shape[0] == 1 ? 0 : mask.stride[0];
    params.mask_head_stride = mask.shape[1] == 1 ? 0 : mask.stride[1];
    params.mask_query_stride = mask.shape[2] == 1 ? 0 : mask.stride[2];
  }
  if (places.by_head) {
    return run_by_head(c.pool, c.kernels, places, append, params, key.shape[0], key.shape[1], c.scratch);
  }
  if (cache.batch > 0 && cache.heads > 0) SQC_RETURN_IF_ERROR(kvcache(c.pool, c.kernels.kvcache, append));
  return attention(c.pool, c.kernels.attention, params, reinterpret_cast<float*>(c.scratch + places.threads));
}

}  // namespace sqc
