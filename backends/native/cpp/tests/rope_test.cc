// Every rope kernel against plain loops, bit for bit.

#include <cmath>
#include <limits>

#include "kernels/rope/rope.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

struct Problem {
  Problem(std::int64_t batch_, std::int64_t tokens_, std::int64_t heads_, std::int64_t head_dim_, std::int64_t rotary_dim_,
          Random& random)
      : batch(batch_), tokens(tokens_), heads(heads_), head_dim(head_dim_), rotary_dim(rotary_dim_),
        x(batch * tokens * heads * head_dim), cos((5 + batch + tokens) * rotary_dim / 2), sin(cos.size()), position(batch) {
    for (float& v : x) v = random.real(-2.0f, 2.0f);
    for (std::int64_t i = 0; i < cos.size(); ++i) {
      const float angle = random.real(0.0f, 6.3f);
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    for (std::int64_t b = 0; b < batch; ++b) position[b] = 5 + b;
  }
  // x as [batch][tokens][heads][head_dim], y as [batch][heads][tokens][head_dim].
  RopeParams params(const Array<float>& y) const {
    const std::int64_t row = heads * head_dim;
    return {batch, tokens, heads, head_dim, rotary_dim, x.data(), tokens * row, head_dim, row,
            y.data(), tokens * row, tokens * head_dim, head_dim, cos.data(), sin.data(), rotary_dim / 2,
            5 + batch + tokens, position.data(), 1};
  }
  std::int64_t batch, tokens, heads, head_dim, rotary_dim;
  Array<float> x, cos, sin;
  Array<std::int64_t> position;
};

void check(const Problem& p) {
  Array<float> expected(p.x.size()), in_place(p.x.size());
  const std::int64_t half = p.rotary_dim / 2;
  for (std::int64_t i = 0; i < p.x.size(); ++i) {
    const std::int64_t d = i % p.head_dim, h = i / p.head_dim % p.heads, t = i / (p.head_dim * p.heads) % p.tokens;
    const std::int64_t b = i / (p.head_dim * p.heads * p.tokens), row = (p.position[b] + t) * half;
    float value = p.x[i];
    if (d < half) {
      const float left = p.x[i] * p.cos[row + d], right = p.x[i + half] * p.sin[row + d];
      value = left - right;
    } else if (d < 2 * half) {
      const float left = p.x[i] * p.cos[row + d - half], right = p.x[i - half] * p.sin[row + d - half];
      value = left + right;
    }
    expected[((b * p.heads + h) * p.tokens + t) * p.head_dim + d] = in_place[i] = value;
  }
  for (const auto& kernel : rope_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Array<float> seen(p.x.size());
    for (const int threads : {1, 3}) {
      std::unique_ptr<ThreadPool> pool;
      SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
      for (float& v : seen) v = -7.0f;
      SQC_CHECK(rope(*pool, kernel, p.params(seen)).is_ok());
      SQC_CHECK(same_bits(seen, expected));
    }
    std::memcpy(seen.data(), p.x.data(), static_cast<std::size_t>(seen.size()) * sizeof(float));
    RopeParams params = p.params(seen);
    params.x = seen.data();
    params.y_head_stride = params.x_head_stride;
    params.y_token_stride = params.x_token_stride;
    kernel.run(params, 0, p.batch * p.tokens);
    SQC_CHECK(same_bits(seen, in_place));
  }
}

}  // namespace

SQC_TEST(rope_tails) {
  Random random(91);
  for (const std::int64_t rotary_dim : {0, 2, 30, 32, 34, 64}) {
    for (const std::int64_t rest : {0, 1, 20}) {
      if (rotary_dim + rest > 0) check(Problem(2, 3, 2, rotary_dim + rest, rotary_dim, random));
    }
  }
  check(Problem(1, 0, 2, 8, 8, random));
}

SQC_TEST(rope_threads) {
  Random random(92);
  check(Problem(2, 70, 5, 64, 64, random));
}

SQC_TEST(rope_refuses) {
  Random random(93);
  const Problem p(2, 3, 2, 8, 8, random);
  const Array<float> y(p.x.size());
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    RopeParams bad = p.params(y);
    change(bad);
    return rope(*pool, rope_kernel(Isa::scalar), bad).code() == StatusCode::kInvalidArgument;
  };
  const std::int64_t positions[] = {0, std::numeric_limits<std::int64_t>::max()}, negative[] = {0, -1};
  SQC_CHECK(refused([](RopeParams& q) { q.heads = -1; }));
  SQC_CHECK(refused([](RopeParams& q) { q.rotary_dim = 7; }));
  SQC_CHECK(refused([](RopeParams& q) { q.rotary_dim = 10; }));
  SQC_CHECK(refused([](RopeParams& q) { q.table_stride = 3; }));
  SQC_CHECK(refused([](RopeParams& q) { q.table_rows = 8; }));
  SQC_CHECK(refused([&](RopeParams& q) { q.position = positions; }));
  SQC_CHECK(refused([&](RopeParams& q) { q.position = negative; }));
}
