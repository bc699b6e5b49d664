// Appending to the cache of keys and values: where everything lies, and that nothing else is touched.

#include <cmath>
#include <limits>

#include "kernels/kvcache/kvcache.h"
#include "kernels/quantize/quantize.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

struct Cache {
  Cache(KvType type, std::int64_t batch, std::int64_t heads, std::int64_t capacity, std::int64_t head_dim)
      : view{type, batch, heads, capacity, head_dim, nullptr, nullptr, nullptr, nullptr}, k(kv_bytes(view).k),
        v(kv_bytes(view).v), k_scale(kv_bytes(view).scale / 4), v_scale(kv_bytes(view).scale / 4) {
    view.k = k.data();
    view.v = v.data();
    view.k_scale = k_scale.data();
    view.v_scale = v_scale.data();
    std::memset(view.k, 0x5a, static_cast<std::size_t>(k.size()));
    std::memset(view.v, 0x5a, static_cast<std::size_t>(v.size()));
    for (float& s : k_scale) s = -7.0f;
    for (float& s : v_scale) s = -7.0f;
  }
  KvCache view;
  Array<std::uint8_t> k, v;
  Array<float> k_scale, v_scale;
};

// Tokens as [batch][tokens][heads][head_dim] or [batch][heads][tokens][head_dim].
struct Tokens {
  Tokens(const Cache& cache, std::int64_t tokens, bool heads_first, Random& random)
      : count(tokens), k(cache.view.batch * cache.view.heads * tokens * cache.view.head_dim), v(k.size()) {
    for (float& x : k) x = random.real(-2.0f, 2.0f);
    for (float& x : v) x = random.real(-2.0f, 2.0f);
    batch_stride = cache.view.heads * tokens * cache.view.head_dim;
    head_stride = cache.view.head_dim * (heads_first ? tokens : 1);
    token_stride = cache.view.head_dim * (heads_first ? 1 : cache.view.heads);
  }
  std::int64_t at(std::int64_t b, std::int64_t h, std::int64_t t) const {
    return b * batch_stride + h * head_stride + t * token_stride;
  }
  KvcacheParams params(const Cache& cache, const Array<std::int64_t>& position) const {
    return {cache.view,   count,       position.data(), position.size() == 1 ? 0 : 1, k.data(),    batch_stride,
            head_stride,  token_stride, v.data(),       batch_stride,                 head_stride, token_stride};
  }
  std::int64_t count, batch_stride, head_stride, token_stride;
  Array<float> k, v;
};

void check_f32(const Cache& cache, const Tokens& tokens, const Array<std::int64_t>& position) {
  const KvCache& c = cache.view;
  const auto* k = reinterpret_cast<const float*>(cache.k.data());
  const auto* v = reinterpret_cast<const float*>(cache.v.data());
  float untouched;
  std::memset(&untouched, 0x5a, sizeof untouched);
  for (std::int64_t item = 0; item < c.batch * c.heads; ++item) {
    const std::int64_t b = item / c.heads, first = position[position.size() == 1 ? 0 : b];
    for (std::int64_t j = 0; j < c.capacity; ++j) {
      const bool written = j >= first && j < first + tokens.count;
      const std::int64_t from = written ? tokens.at(b, item % c.heads, j - first) : 0;
      for (std::int64_t d = 0; d < kv_row(c.head_dim); ++d) {
        const float value = !written ? untouched : d < c.head_dim ? tokens.v[from + d] : 0.0f;
        SQC_CHECK(v[(item * c.capacity + j) * kv_row(c.head_dim) + d] == value);
        if (d >= c.head_dim) continue;
        const float key = written ? tokens.k[from + d] : untouched;
        SQC_CHECK(k[((item * c.capacity + j) / 16 * c.head_dim + d) * 16 + j % 16] == key);
      }
    }
  }
}

// The codes of one row, by family quantize.
void codes_of(const float* x, std::int64_t count, std::int8_t* codes, float* scale) {
  const QuantizeParams params = {QuantizeMode::symmetric, true, 1, count, x, count,
                                 reinterpret_cast<std::uint8_t*>(codes), count, count, 0, 0, scale, nullptr, nullptr};
  quantize_kernel(Isa::scalar).run(params, 0, 1);
}

void check_s8(const Cache& cache, const Tokens& tokens, const Array<std::int64_t>& position) {
  const KvCache& c = cache.view;
  const auto* k = reinterpret_cast<const std::int8_t*>(cache.k.data());
  const auto* v = reinterpret_cast<const std::int8_t*>(cache.v.data());
  Array<std::int8_t> keys(c.head_dim), values(c.head_dim);
  for (std::int64_t item = 0; item < c.batch * c.heads; ++item) {
    const std::int64_t b = item / c.heads, first = position[position.size() == 1 ? 0 : b];
    for (std::int64_t j = 0; j < c.capacity; ++j) {
      const bool written = j >= first && j < first + tokens.count;
      float k_scale = -7.0f, v_scale = -7.0f;
      if (written) {
        const std::int64_t from = tokens.at(b, item % c.heads, j - first);
        codes_of(tokens.k.data() + from, c.head_dim, keys.data(), &k_scale);
        codes_of(tokens.v.data() + from, c.head_dim, values.data(), &v_scale);
      }
      SQC_CHECK(cache.k_scale[item * c.capacity + j] == k_scale && cache.v_scale[item * c.capacity + j] == v_scale);
      for (std::int64_t d = 0; d < kv_row(c.head_dim); ++d) {
        const int value = !written ? 0x5a : d < c.head_dim ? values[d] : 0;
        SQC_CHECK(v[(item * c.capacity + j) * kv_row(c.head_dim) + d] == value);
        if (d >= c.head_dim) continue;
        const int key = written ? keys[d] : 0x5a;
        SQC_CHECK(k[((item * c.capacity + j) / 16 * c.head_dim + d) * 16 + j % 16] == key);
      }
    }
  }
}

}  // namespace

SQC_TEST(kvcache_tails) {
  Random random(41);
  for (const KvType type : {KvType::f32, KvType::s8}) {
    for (const std::int64_t head_dim : {1, 15, 16, 20, 64}) {
      for (const std::int64_t count : {0, 1, 16, 17, 40}) {
        for (const std::int64_t first : {0, 5, 16}) {
          Array<std::int64_t> position(first == 5 ? 2 : 1);
          for (std::int64_t i = 0; i < position.size(); ++i) position[i] = first + 3 * i;
          for (const auto& kernel : kvcache_kernels()) {
            if (!isa_available(kernel.isa)) {
              sqc_tests::skip_kernel(kernel.name);
              continue;
            }
            sqc_tests::count_kernel(kernel.name);
            const Cache cache(type, 2, 3, 64, head_dim);
            const Tokens tokens(cache, count, first != 0, random);
            kernel.run(tokens.params(cache, position), 0, 6);
            if (type == KvType::f32) {
              check_f32(cache, tokens, position);
            } else {
              check_s8(cache, tokens, position);
            }
          }
        }
      }
    }
  }
}

SQC_TEST(kvcache_threads_and_refusals) {
  Random random(42);
  const Cache cache(KvType::f32, 2, 5, 112, 33);
  const Tokens tokens(cache, 100, false, random);
  Array<std::int64_t> position(1);
  position[0] = 12;
  for (const int threads : {1, 3}) {
    std::unique_ptr<ThreadPool> pool;
    SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
    const Cache seen(KvType::f32, 2, 5, 112, 33);
    SQC_CHECK(kvcache(*pool, kvcache_kernel(best_isa()), tokens.params(seen, position)).is_ok());
    check_f32(seen, tokens, position);
    const auto refused = [&](auto change) {
      KvcacheParams bad = tokens.params(seen, position);
      change(bad);
      return kvcache(*pool, kvcache_kernel(Isa::scalar), bad).code() == StatusCode::kInvalidArgument;
    };
    SQC_CHECK(refused([](KvcacheParams& p) { p.tokens = -1; }));
    SQC_CHECK(refused([](KvcacheParams& p) { p.tokens = 101; }));
    SQC_CHECK(refused([](KvcacheParams& p) { p.cache.capacity = 100; }));
    SQC_CHECK(refused([](KvcacheParams& p) { p.cache.head_dim = 0; }));
    SQC_CHECK(refused([](KvcacheParams& p) { p.cache.type = KvType::s8, p.cache.k_scale = nullptr; }));
    const std::int64_t negative = -1, huge = std::numeric_limits<std::int64_t>::max();
    SQC_CHECK(refused([&](KvcacheParams& p) { p.position = &negative; }));
    SQC_CHECK(refused([&](KvcacheParams& p) { p.position = &huge; }));
  }
}
