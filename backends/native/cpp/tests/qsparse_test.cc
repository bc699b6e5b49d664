// Every qsparse kernel against qgemm's scalar one on the dense matrix, bit for bit.

#include <limits>

#include "kernels/qsparse/qsparse.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Problem {
  Problem(std::int64_t m_, std::int64_t n_, std::int64_t k_, double sparsity, Random& random, bool two_of_four = false)
      : m(m_), n(n_), k(k_), a(m * ((k + 3) / 4 * 4)), b(n * k), packed(qgemm_packed_bytes(n, k)),
        b_sum((n + 15) / 16 * 16), sparse_sum(b_sum.size()), b_scale(b_sum.size()), bias(b_sum.size()), a_scale(m),
        a_zero(m), masks(qsparse_mask_count(n, k)), value_start((n + 15) / 16 + 1), nonzero(fill(sparsity, two_of_four, random)),
        values(nonzero + kQsparseValueSlack) {
    for (std::uint8_t& v : a) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (float& s : b_scale) s = random.real(0.001f, 0.02f);
    for (float& s : bias) s = random.real(-3.0f, 3.0f);
    for (float& s : a_scale) s = random.real(0.01f, 0.1f);
    for (std::int32_t& z : a_zero) z = static_cast<std::int32_t>(random.integer(0, 255));
    std::memset(values.data(), 0x7f, static_cast<std::size_t>(values.size()));  // what follows must not count
    SQC_CHECK(qgemm_pack(n, k, b.data(), packed.data(), b_sum.data()).is_ok());
    SQC_CHECK(qsparse_pack(n, k, b.data(), masks.data(), values.data(), value_start.data(), sparse_sum.data()).is_ok());
    SQC_CHECK(same_bits(b_sum, sparse_sum));
    SQC_CHECK(static_cast<std::int64_t>(value_start[value_start.size() - 1]) == nonzero);
  }

  std::int64_t fill(double sparsity, bool two_of_four, Random& random) {
    std::int64_t count = 0;
    const std::int8_t extremes[] = {-128, -127, -1, 1, 127};
    for (std::int64_t i = 0; i < b.size(); ++i) {
      const bool zero = two_of_four ? i % 4 < 2 : random.chance(sparsity);
      b[i] = zero ? std::int8_t{0} : extremes[random.integer(0, 4)];
      count += !zero;
    }
    return count;
  }

  QgemmParams dense(const Array<float>& c) const {
    return {m, n, k, a.data(), (k + 3) / 4 * 4, a_scale.data(), 1, a_zero.data(), 1, packed.data(),
            b_sum.data(), b_scale.data(), bias.data(), c.data(), n, -kInf, kInf};
  }
  QsparseParams params(const Array<float>& c) const {
    QsparseParams p = {dense(c), masks.data(), values.data(), value_start.data()};
    p.dense.b = nullptr;
    return p;
  }

  std::int64_t m, n, k;
  Array<std::uint8_t> a;
  Array<std::int8_t> b, packed;
  Array<std::int32_t> b_sum, sparse_sum;
  Array<float> b_scale, bias, a_scale;
  Array<std::int32_t> a_zero;
  Array<std::uint64_t> masks, value_start;
  std::int64_t nonzero;
  Array<std::uint8_t> values;
};

void check(const Problem& p) {
  Array<float> expected(p.m * p.n);
  qgemm_scalar(p.dense(expected), 0, (p.n + 15) / 16);
  for (const auto& kernel : qsparse_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Array<std::uint8_t> scratch(qsparse_scratch_bytes(p.m, p.k));
    Array<float> seen(p.m * p.n);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, (p.n + 15) / 16, scratch.data());
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d", kernel.name, static_cast<int>(p.m),
                      static_cast<int>(p.n), static_cast<int>(p.k));
    }
  }
}

}  // namespace

SQC_TEST(qsparse_tails) {
  Random random(20);
  for (const std::int64_t m : {1, 2, 3, 4, 5, 7}) {
    for (const std::int64_t n : {1, 15, 16, 17, 65, 80}) {
      for (const std::int64_t k : {0, 1, 3, 4, 5, 17, 67}) check(Problem(m, n, k, 0.5, random));
    }
  }
}

SQC_TEST(qsparse_from_dense_to_empty) {
  Random random(21);
  for (const std::int64_t m : {1, 6}) {
    for (int tenths = 0; tenths <= 10; ++tenths) check(Problem(m, 40, 130, tenths * 0.1, random));
    check(Problem(m, 40, 130, 0, random, true));
  }
}

SQC_TEST(qsparse_threads_do_not_change_a_bit) {
  Random random(22);
  for (const std::int64_t m : {0, 1, 5}) {
    for (const std::int64_t n : {0, 16, 100, 300}) {
      const Problem p(m, n, 130, 0.7, random);
      Array<float> expected(m * n);
      if (m > 0) qgemm_scalar(p.dense(expected), 0, (n + 15) / 16);
      for (const int threads : {1, 2, 5}) {
        std::unique_ptr<ThreadPool> pool;
        SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
        const Array<std::uint8_t> scratch(qsparse_scratch_bytes(m, 130) * threads);
        for (const auto& kernel : qsparse_kernels()) {
          if (!isa_available(kernel.isa)) continue;
          Array<float> seen(m * n);
          SQC_CHECK(qsparse(*pool, kernel, p.params(seen), scratch.data()).is_ok());
          SQC_CHECK(same_bits(seen, expected));
        }
      }
    }
  }
}

SQC_TEST(qsparse_refuses) {
  Random random(23);
  const Problem p(1, 16, 8, 0.5, random);
  Array<float> c(16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  QsparseParams bad = p.params(c);
  bad.dense.a_stride = 7;
  SQC_CHECK(qsparse(*pool, qsparse_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument);
  SQC_CHECK(qsparse_pack(1, kQgemmMaxK + 1, nullptr, nullptr, nullptr, nullptr, nullptr).code() ==
            StatusCode::kInvalidArgument);
}
