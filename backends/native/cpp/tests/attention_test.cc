// Every attention kernel against the scalar one, bit for bit, and the scalar one against plain loops in double.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/attention/attention.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr std::int64_t kCapacity = 272;

struct Options {
  std::int64_t batch, heads, kv_heads, queries, length, head_dim;
  bool causal = false, heads_first = true;
  AttentionMask mask = AttentionMask::none;
  KvType type = KvType::f32;
};

struct Problem {
  Problem(const Options& options, Random& random)
      : o(options), q(o.batch * o.heads * o.queries * o.head_dim), k(o.batch * o.kv_heads * o.length * o.head_dim),
        v(k.size()), length(o.batch), position(o.batch), flags(mask_count()), added(mask_count()) {
    for (float& x : q) x = random.real(-2.0f, 2.0f);
    for (float& x : k) x = random.real(-2.0f, 2.0f);
    for (float& x : v) x = random.real(-2.0f, 2.0f);
    for (std::int64_t b = 0; b < o.batch; ++b) {
      length[b] = std::max<std::int64_t>(o.length - 3 * b, 0);
      position[b] = std::max<std::int64_t>(length[b] - o.queries, 0);
    }
    for (std::uint8_t& x : flags) x = static_cast<std::uint8_t>(random.chance(0.7) ? random.integer(1, 255) : 0);
    for (float& x : added) x = random.chance(0.7) ? random.real(-1.0f, 1.0f) : -kInf;
    // A query that sees no key.
    for (std::int64_t j = 0; j < o.length && o.queries > 1; ++j) flags[o.length + j] = 0, added[o.length + j] = -kInf;
    view = {o.type, o.batch, o.kv_heads, kCapacity, o.head_dim, nullptr, nullptr, nullptr, nullptr};
    const KvBytes bytes = kv_bytes(view);
    cache_k = std::make_unique<Array<std::uint8_t>>(bytes.k);
    cache_v = std::make_unique<Array<std::uint8_t>>(bytes.v);
    k_scale = std::make_unique<Array<float>>(bytes.scale / 4);
    v_scale = std::make_unique<Array<float>>(bytes.scale / 4);
    // What was never written is NaN, as floats, and the smallest code.
    std::memset(cache_k->data(), o.type == KvType::f32 ? 0xff : 0x80, static_cast<std::size_t>(bytes.k));
    std::memset(cache_v->data(), o.type == KvType::f32 ? 0xff : 0x80, static_cast<std::size_t>(bytes.v));
    for (float& s : *k_scale) s = std::nanf("");
    for (float& s : *v_scale) s = std::nanf("");
    view.k = cache_k->data();
    view.v = cache_v->data();
    view.k_scale = k_scale->data();
    view.v_scale = v_scale->data();
    append();
  }
  std::int64_t mask_count() const { return o.batch * o.queries * o.length; }
  void append() {
    const std::int64_t zero = 0, batch = o.kv_heads * o.length * o.head_dim, head = o.length * o.head_dim;
    kvcache_kernel(Isa::scalar)
        .run({view, o.length, &zero, 0, k.data(), batch, head, o.head_dim, v.data(), batch, head, o.head_dim}, 0,
             o.batch * o.kv_heads);
  }
  std::int64_t head_stride() const { return o.head_dim * (o.heads_first ? o.queries : 1); }
  std::int64_t token_stride() const { return o.head_dim * (o.heads_first ? 1 : o.heads); }
  std::int64_t batch_stride() const { return o.heads * o.queries * o.head_dim; }
  AttentionParams params(const Array<float>& out) const {
    AttentionParams p = {};
    p.cache = view;
    p.heads = o.heads;
    p.queries = o.queries;
    p.q = q.data();
    p.out = out.data();
    p.q_batch_stride = p.out_batch_stride = batch_stride();
    p.q_head_stride = p.out_head_stride = head_stride();
    p.q_token_stride = p.out_token_stride = token_stride();
    p.length = length.data();
    p.position = position.data();
    p.length_stride = p.position_stride = 1;
    p.causal = o.causal;
    p.scale = 1.0f / std::sqrt(static_cast<float>(o.head_dim));
    p.mask_kind = o.mask;
    if (o.mask == AttentionMask::boolean) p.mask = flags.data();
    if (o.mask == AttentionMask::additive) p.mask = added.data();
    p.mask_batch_stride = o.queries * o.length;
    p.mask_query_stride = o.length;
    return p;
  }
  // Dimension d of key or value j: what is stored, which for codes is their value.
  double key(std::int64_t item, std::int64_t j, std::int64_t d) const {
    const std::int64_t at = ((item * kCapacity + j) / 16 * o.head_dim + d) * 16 + j % 16;
    if (o.type == KvType::f32) return static_cast<const float*>(view.k)[at];
    return static_cast<double>(static_cast<const std::int8_t*>(view.k)[at]) * view.k_scale[item * kCapacity + j];
  }
  double value(std::int64_t item, std::int64_t j, std::int64_t d) const {
    const std::int64_t at = (item * kCapacity + j) * kv_row(o.head_dim) + d;
    if (o.type == KvType::f32) return static_cast<const float*>(view.v)[at];
    return static_cast<double>(static_cast<const std::int8_t*>(view.v)[at]) * view.v_scale[item * kCapacity + j];
  }

  Options o;
  Array<float> q, k, v;
  Array<std::int64_t> length, position;
  Array<std::uint8_t> flags;
  Array<float> added;
  KvCache view;
  std::unique_ptr<Array<std::uint8_t>> cache_k, cache_v;
  std::unique_ptr<Array<float>> k_scale, v_scale;
};

void run(AttentionFunction function, const Problem& p, const Array<float>& out) {
  const Array<float> scratch(attention_scratch_count(p.o.head_dim));
  const AttentionParams params = p.params(out);
  const std::int64_t rows = p.o.heads / p.o.kv_heads * p.o.queries;
  for (std::int64_t item = 0; item < p.o.batch * p.o.kv_heads; ++item) {
    for (std::int64_t first = 0; first < rows; first += kAttentionTileRows) {
      function(params, {item, first, std::min(rows - first, kAttentionTileRows)}, scratch.data());
    }
  }
}

void check_against_definition(const Problem& p, const Array<float>& out) {
  const Options& o = p.o;
  for (std::int64_t b = 0; b < o.batch; ++b) {
    for (std::int64_t h = 0; h < o.heads; ++h) {
      const std::int64_t item = b * o.kv_heads + h / (o.heads / o.kv_heads);
      for (std::int64_t t = 0; t < o.queries; ++t) {
        const std::int64_t at = b * p.batch_stride() + h * p.head_stride() + t * p.token_stride();
        std::vector<double> weights(static_cast<std::size_t>(o.length) + 1), sums(static_cast<std::size_t>(o.head_dim));
        double total = 0.0;
        for (std::int64_t j = 0; j < p.length[b]; ++j) {
          const std::int64_t m = (b * o.queries + t) * o.length + j;
          if (o.causal && j > p.position[b] + t) continue;
          if (o.mask == AttentionMask::boolean && p.flags[m] == 0) continue;
          double score = 0.0;
          for (std::int64_t d = 0; d < o.head_dim; ++d) score += p.q[at + d] * p.key(item, j, d);
          score /= std::sqrt(static_cast<double>(o.head_dim));
          if (o.mask == AttentionMask::additive) score += p.added[m];
          const double weight = std::exp(score);  // |score| < 40: no maximum is needed in double
          total += weight;
          for (std::int64_t d = 0; d < o.head_dim; ++d) sums[static_cast<std::size_t>(d)] += weight * p.value(item, j, d);
        }
        for (std::int64_t d = 0; d < o.head_dim; ++d) {
          const double expected = total == 0.0 ? 0.0 : sums[static_cast<std::size_t>(d)] / total;
          // A score of some 30 is off by up to 2^-20, a weight by that share, and |v| <= 2.
          SQC_CHECK(std::abs(out[at + d] - expected) <= 2e-5);
        }
      }
    }
  }
}

void check(const Problem& p) {
  Array<float> expected(p.q.size());
  run(attention_scalar, p, expected);
  check_against_definition(p, expected);
  for (const auto& kernel : attention_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Array<float> seen(p.q.size());
    for (float& x : seen) x = -7.0f;
    run(kernel.run, p, seen);
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: heads %d %d queries %d length %d dim %d causal %d mask %d type %d",
                      kernel.name, static_cast<int>(p.o.heads), static_cast<int>(p.o.kv_heads),
                      static_cast<int>(p.o.queries), static_cast<int>(p.o.length), static_cast<int>(p.o.head_dim),
                      p.o.causal, static_cast<int>(p.o.mask), static_cast<int>(p.o.type));
    }
  }
}

}  // namespace

SQC_TEST(attention_tails) {
  Random random(51);
  for (const KvType type : {KvType::f32, KvType::s8}) {
    for (const std::int64_t head_dim : {1, 15, 16, 33, 64, 80}) {
      for (const std::int64_t length : {0, 1, 16, 17, 64, 127, 128, 129, 272}) {
        const std::int64_t queries = length % 2 == 0 ? 1 : 3;
        check(Problem({1, 2, 1, queries, length, head_dim, true, true, AttentionMask::none, type}, random));
      }
    }
  }
}

SQC_TEST(attention_rows_of_a_tile) {
  Random random(52);
  for (const KvType type : {KvType::f32, KvType::s8}) {
    for (std::int64_t queries = 1; queries <= 27; ++queries) {
      check(Problem({1, 1, 1, queries, 150, 20, true, true, AttentionMask::none, type}, random));
    }
  }
}

SQC_TEST(attention_options) {
  Random random(53);
  for (const KvType type : {KvType::f32, KvType::s8}) {
    for (const AttentionMask mask : {AttentionMask::none, AttentionMask::boolean, AttentionMask::additive}) {
      for (const bool causal : {false, true}) {
        for (const bool heads_first : {false, true}) {
          for (const std::int64_t kv_heads : {1, 2, 6}) {
            check(Problem({2, 6, kv_heads, 7, 137, 24, causal, heads_first, mask, type}, random));
          }
        }
      }
    }
  }
}

SQC_TEST(attention_extreme_scores) {
  Random random(54);
  for (const float size : {1e-30f, 1e3f, 1e18f}) {
    Problem p({1, 1, 1, 5, 190, 16, true}, random);
    for (float& x : p.q) x *= size;
    Array<float> expected(p.q.size());
    run(attention_scalar, p, expected);
    for (const auto& kernel : attention_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      Array<float> seen(p.q.size());
      run(kernel.run, p, seen);
      SQC_CHECK(same_bits(seen, expected));
      for (const float x : seen) SQC_CHECK(std::abs(x) <= 2.00001f);  // a mean of values
    }
  }
}

SQC_TEST(attention_a_nan_stays_in_its_row) {
  Random random(55);
  const Problem p({1, 2, 1, 4, 40, 16}, random);
  p.q[2 * 16 + 3] = std::nanf("");  // head 0, query 2
  Array<float> out(p.q.size());
  for (const auto& kernel : attention_kernels()) {
    if (!isa_available(kernel.isa)) continue;
    run(kernel.run, p, out);
    for (std::int64_t i = 0; i < out.size(); ++i) SQC_CHECK(std::isnan(out[i]) == (i / 16 == 2));
  }
}

SQC_TEST(attention_threads_do_not_change_a_bit) {
  Random random(56);
  for (const std::int64_t queries : {0, 1, 50}) {
    const Problem p({2, 8, 2, queries, 230, 40, true, false}, random);
    Array<float> expected(p.q.size());
    run(attention_scalar, p, expected);
    for (const int threads : {1, 2, 3, 7}) {
      std::unique_ptr<ThreadPool> pool;
      SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
      const Array<float> scratch(attention_scratch_count(40) * threads);
      for (const auto& kernel : attention_kernels()) {
        if (!isa_available(kernel.isa)) continue;
        Array<float> seen(p.q.size());
        SQC_CHECK(attention(*pool, kernel, p.params(seen), scratch.data()).is_ok());
        SQC_CHECK(same_bits(seen, expected));
      }
    }
  }
}

SQC_TEST(attention_refuses) {
  Random random(57);
  const Problem p({1, 4, 2, 3, 20, 16, true}, random);
  Array<float> out(p.q.size());
  const Array<float> scratch(attention_scratch_count(16));
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    AttentionParams bad = p.params(out);
    change(bad);
    return attention(*pool, attention_kernel(Isa::scalar), bad, scratch.data()).code() == StatusCode::kInvalidArgument;
  };
  const std::int64_t negative = -1, too_long = kCapacity + 1;
  SQC_CHECK(refused([](AttentionParams& a) { a.heads = 5; }));
  SQC_CHECK(refused([](AttentionParams& a) { a.queries = -1; }));
  SQC_CHECK(refused([](AttentionParams& a) { a.cache.capacity = 72; }));
  SQC_CHECK(refused([&](AttentionParams& a) { a.length = &negative; }));
  SQC_CHECK(refused([&](AttentionParams& a) { a.length = &too_long; }));
  SQC_CHECK(refused([&](AttentionParams& a) { a.position = &negative; }));
  SQC_CHECK(refused([](AttentionParams& a) { a.mask_kind = AttentionMask::additive; }));
  SQC_CHECK(refused([&](AttentionParams& a) { a.mask = &negative; }));
}
