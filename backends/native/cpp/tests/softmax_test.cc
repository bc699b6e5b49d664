// Every softmax kernel against the scalar one, bit for bit, and the scalar one against plain loops in double.

#include <cmath>
#include <limits>

#include "kernels/softmax/softmax.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Problem {
  Problem(std::int64_t m_, std::int64_t k_, bool with_mask_, bool one_mask_, Random& random)
      : m(m_), k(k_), with_mask(with_mask_), one_mask(one_mask_), x(m * k), mask(one_mask ? k : m * k) {
    for (float& v : x) v = random.real(-6.0f, 6.0f);
    for (float& v : mask) v = random.chance(0.8) ? random.real(-1.0f, 1.0f) : -kInf;
    for (std::int64_t i = 0; i < mask.size(); i += k) mask[i] = 0.0f;  // each row sees something
  }
  SoftmaxParams params(const Array<float>& y) const {
    return {m, k, x.data(), k, scale, with_mask ? mask.data() : nullptr, one_mask ? 0 : k, y.data(), k};
  }
  std::int64_t m, k;
  bool with_mask, one_mask;
  float scale = 0.7f;
  Array<float> x, mask;
};

void check(const Problem& p) {
  const Array<float> expected(p.m * p.k);
  softmax_scalar(p.params(expected), 0, p.m);
  for (std::int64_t m = 0; m < p.m; ++m) {
    double total = 0.0;
    const auto weight = [&](std::int64_t k) {
      const double added = p.with_mask ? p.mask[(p.one_mask ? 0 : m * p.k) + k] : 0.0;
      return std::exp(static_cast<double>(p.x[m * p.k + k]) * p.scale + added);
    };
    for (std::int64_t k = 0; k < p.k; ++k) total += weight(k);
    // |s| < 6: s - max is off by 2^-21, exp of it by that share.
    for (std::int64_t k = 0; k < p.k; ++k) {
      SQC_CHECK(std::abs(expected[m * p.k + k] - weight(k) / total) <= 2e-6 * weight(k) / total);
    }
  }
  for (const auto& kernel : softmax_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Array<float> seen(p.m * p.k);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, p.m);
    SQC_CHECK(same_bits(seen, expected));
    for (const int threads : {1, 3}) {
      std::unique_ptr<ThreadPool> pool;
      SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
      // In place.
      std::memcpy(seen.data(), p.x.data(), static_cast<std::size_t>(p.m * p.k) * sizeof(float));
      SoftmaxParams params = p.params(seen);
      params.x = seen.data();
      SQC_CHECK(softmax(*pool, kernel, params).is_ok());
      SQC_CHECK(same_bits(seen, expected));
    }
  }
}

}  // namespace

SQC_TEST(softmax_tails) {
  Random random(81);
  for (const std::int64_t m : {0, 1, 3}) {
    for (const std::int64_t k : {1, 15, 16, 17, 64, 70, 130}) {
      for (const bool with_mask : {false, true}) check(Problem(m, k, with_mask, k % 2 == 0, random));
    }
  }
}

SQC_TEST(softmax_threads) {
  Random random(82);
  check(Problem(50, 700, true, false, random));
}

SQC_TEST(softmax_extremes) {
  Random random(83);
  for (const auto& kernel : softmax_kernels()) {
    if (!isa_available(kernel.isa)) continue;
    for (const float bad : {kInf, -kInf, std::nanf("")}) {
      Problem p(2, 20, false, false, random);
      p.scale = 1.0f;
      const Array<float> y(40);
      p.x[3] = bad;
      if (bad == -kInf) {
        for (std::int64_t k = 0; k < 20; ++k) p.x[k] = bad;  // nothing to see
      }
      kernel.run(p.params(y), 0, 2);
      for (std::int64_t i = 0; i < 40; ++i) SQC_CHECK(std::isnan(y[i]) == (i < 20));
    }
    Problem p(1, 20, false, false, random);
    p.scale = 1.0f;
    const Array<float> y(20);
    for (float& v : p.x) v = -3e38f;
    p.x[7] = 3e38f;
    kernel.run(p.params(y), 0, 1);
    for (std::int64_t i = 0; i < 20; ++i) SQC_CHECK(y[i] == (i == 7 ? 1.0f : 0.0f));
  }
}

SQC_TEST(softmax_refuses) {
  Random random(84);
  const Problem p(2, 8, true, false, random);
  const Array<float> y(16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    SoftmaxParams bad = p.params(y);
    change(bad);
    return softmax(*pool, softmax_kernel(Isa::scalar), bad).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](SoftmaxParams& q) { q.k = -1; }));
  SQC_CHECK(refused([](SoftmaxParams& q) { q.x_stride = 7; }));
  SQC_CHECK(refused([](SoftmaxParams& q) { q.mask_stride = 7; }));
  SQC_CHECK(refused([](SoftmaxParams& q) { q.y_stride = 7; }));
}
