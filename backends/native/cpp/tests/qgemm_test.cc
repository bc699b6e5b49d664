// Every qgemm kernel against the scalar one, bit for bit, and the scalar one against plain loops.

#include <cmath>
#include <limits>

#include "kernels/qgemm/qgemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

enum class Fill { random, extremes, zero_rows };

struct Problem {
  Problem(std::int64_t m_, std::int64_t n_, std::int64_t k_, Fill fill, bool with_bias, bool one_scale, Random& random)
      : m(m_), n(n_), k(k_), a(m * ((k + 3) / 4 * 4)), b(n * k), packed(qgemm_packed_bytes(n, k)),
        b_sum((n + 15) / 16 * 16), b_scale(b_sum.size()), bias(b_sum.size()), a_scale(one_scale ? 1 : m),
        a_zero(one_scale ? 1 : m), has_bias(with_bias) {
    const std::uint8_t a_extremes[] = {0, 127, 128, 255};
    const std::int8_t b_extremes[] = {-128, -127, 0, 127};
    for (std::int64_t i = 0; i < a.size(); ++i) {
      a[i] = fill == Fill::extremes ? a_extremes[random.integer(0, 3)] : static_cast<std::uint8_t>(random.integer(0, 255));
    }
    for (std::int64_t i = 0; i < b.size(); ++i) {
      b[i] = fill == Fill::extremes ? b_extremes[random.integer(0, 3)] : static_cast<std::int8_t>(random.integer(-128, 127));
      if (fill == Fill::zero_rows && i / k % 2 == 0) b[i] = 0;
    }
    for (float& s : b_scale) s = random.real(0.001f, 0.02f);
    for (float& s : bias) s = random.real(-3.0f, 3.0f);
    for (float& s : a_scale) s = random.real(0.01f, 0.1f);
    for (std::int32_t& z : a_zero) z = static_cast<std::int32_t>(random.integer(0, 255));
    SQC_CHECK(qgemm_pack(n, k, b.data(), packed.data(), b_sum.data()).is_ok());
  }

  QgemmParams params(const Array<float>& c) const {
    const std::int64_t stride = a_scale.size() == m ? 1 : 0;
    return {m, n, k, a.data(), (k + 3) / 4 * 4, a_scale.data(), stride, a_zero.data(), stride, packed.data(),
            b_sum.data(), b_scale.data(), has_bias ? bias.data() : nullptr, c.data(), n, low, high};
  }

  std::int64_t m, n, k;
  Array<std::uint8_t> a;
  Array<std::int8_t> b, packed;
  Array<std::int32_t> b_sum;
  Array<float> b_scale, bias, a_scale;
  Array<std::int32_t> a_zero;
  bool has_bias;
  float low = -kInf, high = kInf;
};

void check_against_definition(const Problem& p, const Array<float>& c) {
  const std::int64_t a_stride = (p.k + 3) / 4 * 4, one = p.a_scale.size() == p.m ? 1 : 0;
  for (std::int64_t m = 0; m < p.m; ++m) {
    for (std::int64_t n = 0; n < p.n; ++n) {
      std::int64_t sum = 0;
      for (std::int64_t k = 0; k < p.k; ++k) sum += (p.a[m * a_stride + k] - p.a_zero[m * one]) * p.b[n * p.k + k];
      float value = std::fmaf(static_cast<float>(sum), p.a_scale[m * one] * p.b_scale[n], p.has_bias ? p.bias[n] : 0.0f);
      value = value < p.low ? p.low : value > p.high ? p.high : value;
      SQC_CHECK(c[m * p.n + n] == value);
    }
  }
}

void check(const Problem& p) {
  Array<float> expected(p.m * p.n);
  qgemm_scalar(p.params(expected), 0, (p.n + 15) / 16);
  check_against_definition(p, expected);
  for (const auto& kernel : qgemm_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Array<float> seen(p.m * p.n);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, (p.n + 15) / 16);
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d", kernel.name, static_cast<int>(p.m),
                      static_cast<int>(p.n), static_cast<int>(p.k));
    }
  }
}

}  // namespace

SQC_TEST(qgemm_tails) {
  Random random(3);
  for (const std::int64_t m : {1, 2, 3, 4, 5, 6, 7, 13}) {
    for (const std::int64_t n : {1, 15, 16, 17, 63, 64, 65, 130}) {
      for (const std::int64_t k : {0, 1, 3, 4, 5, 15, 16, 17, 67}) {
        check(Problem(m, n, k, Fill::random, n % 2 == 0, m % 3 == 0, random));
      }
    }
  }
}

SQC_TEST(qgemm_extremes) {
  Random random(4);
  for (const Fill fill : {Fill::extremes, Fill::zero_rows}) {
    for (const std::int64_t m : {1, 3, 6}) {
      for (const std::int64_t k : {4, 64, 1000}) check(Problem(m, 40, k, fill, true, false, random));
    }
  }
  // The largest sums there are.
  for (const int b_value : {-128, 127}) {
    for (const std::int64_t m : {1, 5}) {
      Problem p(m, 16, kQgemmMaxK, Fill::random, false, false, random);
      for (std::uint8_t& v : p.a) v = 255;
      for (std::int8_t& v : p.b) v = static_cast<std::int8_t>(b_value);
      for (std::int64_t i = 0; i < m; ++i) p.a_zero[i] = i % 2 == 0 ? 0 : 255;
      SQC_CHECK(qgemm_pack(p.n, p.k, p.b.data(), p.packed.data(), p.b_sum.data()).is_ok());
      check(p);
    }
  }
}

SQC_TEST(qgemm_empty) {
  Random random(5);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(2, &pool).is_ok());
  for (const auto& sizes : {std::pair<int, int>{0, 5}, {5, 0}, {0, 0}}) {
    const Problem p(sizes.first, sizes.second, 8, Fill::random, true, false, random);
    const Array<float> c(0);
    for (const auto& kernel : qgemm_kernels()) {
      if (isa_available(kernel.isa)) SQC_CHECK(qgemm(*pool, kernel, p.params(c)).is_ok());
    }
  }
}

SQC_TEST(qgemm_clamp_and_nan) {
  Random random(6);
  for (const std::int64_t m : {1, 6}) {
    Problem p(m, 33, 16, Fill::random, true, false, random);
    p.low = 0.0f;
    p.high = 6.0f;
    check(p);
    p.low = -0.0f;
    check(p);
    p.a_scale[0] = std::nanf("");
    Array<float> c(m * 33);
    for (const auto& kernel : qgemm_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      kernel.run(p.params(c), 0, 3);
      for (std::int64_t i = 0; i < c.size(); ++i) SQC_CHECK(std::isnan(c[i]) == (i < 33));
    }
  }
}

SQC_TEST(qgemm_threads_do_not_change_a_bit) {
  Random random(7);
  for (const std::int64_t m : {1, 4, 5, 12}) {
    for (const std::int64_t n : {16, 100, 300}) {
      const Problem p(m, n, 130, Fill::random, true, false, random);
      Array<float> expected(m * n);
      qgemm_scalar(p.params(expected), 0, (n + 15) / 16);
      for (const int threads : {1, 2, 3, 7}) {
        std::unique_ptr<ThreadPool> pool;
        SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
        for (const auto& kernel : qgemm_kernels()) {
          if (!isa_available(kernel.isa)) continue;
          Array<float> seen(m * n);
          SQC_CHECK(qgemm(*pool, kernel, p.params(seen)).is_ok());
          SQC_CHECK(same_bits(seen, expected));
        }
      }
    }
  }
}

SQC_TEST(qgemm_refuses) {
  Random random(8);
  const Problem p(2, 16, 8, Fill::random, true, false, random);
  Array<float> c(32);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    QgemmParams bad = p.params(c);
    change(bad);
    return qgemm(*pool, qgemm_kernel(Isa::scalar), bad).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QgemmParams& q) { q.m = -1; }));
  SQC_CHECK(refused([](QgemmParams& q) { q.n = -1; }));
  SQC_CHECK(refused([](QgemmParams& q) { q.k = kQgemmMaxK + 1; }));
  SQC_CHECK(refused([](QgemmParams& q) { q.a_stride = 7; }));
  SQC_CHECK(refused([](QgemmParams& q) { q.c_stride = 15; }));
}
