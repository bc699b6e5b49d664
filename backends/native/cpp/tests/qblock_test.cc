// Every qblock kernel against qgemm's scalar one on the dense matrix, bit for bit.

#include <limits>

#include "kernels/qblock/qblock.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr int kMaxThreads = 5;
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Problem {
  Problem(std::int64_t m_, std::int64_t n_, std::int64_t k_, std::int64_t outputs_, std::int64_t chunk_, double sparsity,
          Random& random)
      : m(m_), n(n_), k(k_), outputs(outputs_), chunk(chunk_), a(m * ((k + 3) / 4 * 4)), b(n * k),
        packed(qgemm_packed_bytes(n, k)), b_sum((n + 15) / 16 * 16), block_sum(b_sum.size()), b_scale(b_sum.size()),
        bias(b_sum.size()), a_scale(m), a_zero(m), count(fill(sparsity, random)), index(count),
        values(count * outputs * 4), start(qblock_start_count(n, k, outputs, chunk)), blocks_before((n + 15) / 16 + 1),
        interleaved(qblock_interleaved_bytes(m, k)), sums(kMaxThreads * kQblockSumCount) {
    for (std::uint8_t& v : a) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (float& s : b_scale) s = random.real(0.001f, 0.02f);
    for (float& s : bias) s = random.real(-3.0f, 3.0f);
    for (float& s : a_scale) s = random.real(0.01f, 0.1f);
    for (std::int32_t& z : a_zero) z = static_cast<std::int32_t>(random.integer(0, 255));
    SQC_CHECK(qgemm_pack(n, k, b.data(), packed.data(), b_sum.data()).is_ok());
    SQC_CHECK(qblock_pack(n, k, outputs, chunk, b.data(), index.data(), values.data(), start.data(),
                          blocks_before.data(), block_sum.data()).is_ok());
    SQC_CHECK(same_bits(b_sum, block_sum));
    SQC_CHECK(static_cast<std::int64_t>(start[start.size() - 1]) == count);
    SQC_CHECK(static_cast<std::int64_t>(blocks_before[blocks_before.size() - 1]) == count);
  }

  std::int64_t fill(double sparsity, Random& random) {
    const std::int8_t extremes[] = {-128, -127, 0, 1, 127};
    for (std::int64_t row = 0; row < n; row += outputs) {
      for (std::int64_t unit = 0; unit < k; unit += 4) {
        const bool zero = random.chance(sparsity);
        for (std::int64_t i = 0; i < outputs * 4; ++i) {
          const std::int64_t output = row + i / 4, column = unit + i % 4;
          if (output < n && column < k) b[output * k + column] = zero ? std::int8_t{0} : extremes[random.integer(0, 4)];
        }
      }
    }
    return qblock_count(n, k, outputs, b.data());
  }

  QgemmParams dense(const Array<float>& c) const {
    return {m, n, k, a.data(), (k + 3) / 4 * 4, a_scale.data(), 1, a_zero.data(), 1, packed.data(),
            b_sum.data(), b_scale.data(), bias.data(), c.data(), n, -kInf, kInf};
  }
  QblockParams params(const Array<float>& c) const {
    QblockParams p = {dense(c), outputs, chunk, index.data(), values.data(), start.data(), blocks_before.data(),
                      interleaved.data()};
    p.dense.b = nullptr;
    return p;
  }

  std::int64_t m, n, k, outputs, chunk;
  Array<std::uint8_t> a;
  Array<std::int8_t> b, packed;
  Array<std::int32_t> b_sum, block_sum;
  Array<float> b_scale, bias, a_scale;
  Array<std::int32_t> a_zero;
  std::int64_t count;
  Array<std::uint8_t> index;
  Array<std::int8_t> values;
  Array<std::uint64_t> start, blocks_before;
  Array<std::uint8_t> interleaved;
  Array<std::int32_t> sums;
};

void check(const Problem& p, int threads) {
  Array<float> expected(p.m * p.n);
  if (p.m > 0) qgemm_scalar(p.dense(expected), 0, (p.n + 15) / 16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
  for (const auto& kernel : qblock_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Array<float> seen(p.m * p.n);
    for (float& v : seen) v = -7.0f;
    for (std::int32_t& s : p.sums) s = -1;
    for (std::uint8_t& v : p.interleaved) v = 0xaa;
    SQC_CHECK(qblock(*pool, kernel, p.params(seen), p.sums.data()).is_ok());
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d outputs %d chunk %d", kernel.name,
                      static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), static_cast<int>(p.outputs),
                      static_cast<int>(p.chunk));
    }
  }
}

}  // namespace

SQC_TEST(qblock_tails) {
  Random random(40);
  for (const std::int64_t outputs : {1, 4, 16}) {
    for (const std::int64_t m : {1, 15, 16, 17, 63, 64, 65, 100}) {
      for (const std::int64_t n : {1, 16, 17, 50}) {
        for (const std::int64_t k : {0, 1, 4, 5, 63, 64, 65, 130}) check(Problem(m, n, k, outputs, 8, 0.5, random), 1);
      }
    }
  }
}

SQC_TEST(qblock_from_dense_to_empty) {
  Random random(41);
  for (const std::int64_t outputs : {1, 4, 16}) {
    for (int tenths = 0; tenths <= 10; ++tenths) check(Problem(20, 40, 300, outputs, 256, tenths * 0.1, random), 1);
  }
}

SQC_TEST(qblock_threads_do_not_change_a_bit) {
  Random random(42);
  for (const std::int64_t outputs : {1, 4, 16}) {
    for (const std::int64_t m : {0, 5, 70}) {
      for (const std::int64_t n : {0, 16, 100, 300}) {
        for (const int threads : {1, 2, kMaxThreads}) check(Problem(m, n, 130, outputs, 16, 0.7, random), threads);
      }
    }
  }
}

SQC_TEST(qblock_refuses) {
  Random random(43);
  const Problem p(1, 16, 8, 1, 8, 0.5, random);
  Array<float> c(16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    QblockParams bad = p.params(c);
    change(bad);
    return qblock(*pool, qblock_kernel(Isa::scalar), bad, p.sums.data()).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QblockParams& q) { q.block_outputs = 2; }));
  SQC_CHECK(refused([](QblockParams& q) { q.chunk = 0; }));
  SQC_CHECK(refused([](QblockParams& q) { q.chunk = 257; }));
  SQC_CHECK(refused([](QblockParams& q) { q.dense.a_stride = 7; }));
}
