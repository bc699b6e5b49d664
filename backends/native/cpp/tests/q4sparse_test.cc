// Every q4sparse kernel against the scalar one, bit for bit, and the scalar one against plain loops.

#include <cmath>
#include <limits>

#include "kernels/q4sparse/q4sparse.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Problem {
  Problem(std::int64_t m_, std::int64_t n_, std::int64_t k_, std::int64_t group_, double sparsity, Random& random,
          bool per_group = false)
      : m(m_), n(n_), k(k_), group(group_), groups((k + group - 1) / group), k_padded(groups * group),
        panels((n + 15) / 16), a(m * k_padded), a_sum(m * groups), a_scale(m * (per_group ? groups : 1)), codes(n * k),
        keep(n * k), scale(panels * groups * 16), bias(panels * 16), masks(q4sparse_mask_count(n, k, group)),
        value_start(panels + 1), bytes(fill(sparsity, random)), values(bytes + kQ4sparseValueSlack),
        scale_per_group(per_group) {
    for (std::int64_t row = 0; row < m; ++row) {
      for (std::int64_t i = 0; i < k; ++i) {
        const auto value = static_cast<std::int8_t>(random.integer(-128, 127));
        a[row * k_padded + i] = value;
        a_sum[row * groups + i / group] += value;
      }
    }
    for (float& s : a_scale) s = random.real(0.01f, 0.1f);
    for (float& s : scale) s = random.real(0.001f, 0.02f);
    for (float& v : bias) v = random.real(-3.0f, 3.0f);
    for (std::int8_t& t : table) t = static_cast<std::int8_t>(random.integer(-127, 127));
    std::memset(values.data(), 0x55, static_cast<std::size_t>(values.size()));  // what follows must not count
    SQC_CHECK(q4sparse_pack(n, k, group, codes.data(), keep.data(), masks.data(), values.data(), value_start.data()).is_ok());
    SQC_CHECK(static_cast<std::int64_t>(value_start[panels]) == bytes);
  }

  std::int64_t fill(double sparsity, Random& random) {
    for (std::uint8_t& c : codes) c = static_cast<std::uint8_t>(random.integer(0, 15));
    for (std::uint8_t& bit : keep) bit = !random.chance(sparsity);
    return q4sparse_value_bytes(n, k, group, keep.data());
  }

  Q4sparseParams params(const Array<float>& c) const {
    Q4sparseParams p = {{m, n, k, group, a.data(), k_padded, a_sum.data(), a_scale.data(), scale_per_group, nullptr, {},
                         scale.data(), false, nullptr, bias.data(), c.data(), n, -kInf, kInf},
                        masks.data(), values.data(), value_start.data()};
    std::memcpy(p.dense.table, table, sizeof table);
    return p;
  }

  std::int64_t m, n, k, group, groups, k_padded, panels;
  Array<std::int8_t> a;
  Array<std::int32_t> a_sum;
  Array<float> a_scale;
  Array<std::uint8_t> codes, keep;
  Array<float> scale, bias;
  Array<std::uint64_t> masks, value_start;
  std::int64_t bytes;
  Array<std::uint8_t> values;
  std::int8_t table[16];
  bool scale_per_group;
};

void check_against_definition(const Problem& p, const Array<float>& c) {
  for (std::int64_t m = 0; m < p.m; ++m) {
    for (std::int64_t n = 0; n < p.n; ++n) {
      float total = 0.0f;
      for (std::int64_t g = 0; g < p.groups; ++g) {
        std::int32_t sum = 0;
        for (std::int64_t k = g * p.group; k < (g + 1) * p.group && k < p.k; ++k) {
          if (p.keep[n * p.k + k] != 0) sum += p.a[m * p.k_padded + k] * p.table[p.codes[n * p.k + k]];
        }
        float scale = p.scale[(n / 16 * p.groups + g) * 16 + n % 16];
        if (p.scale_per_group) scale *= p.a_scale[m * p.groups + g];
        total = std::fmaf(static_cast<float>(sum), scale, total);
      }
      SQC_CHECK(c[m * p.n + n] == std::fmaf(total, p.scale_per_group ? 1.0f : p.a_scale[m], p.bias[n]));
    }
  }
}

void check(const Problem& p) {
  const std::int64_t scratch_bytes = q4gemm_scratch_bytes(p.m, p.k, p.group);
  Array<float> expected(p.m * p.n);
  {
    const Array<std::uint8_t> scratch(scratch_bytes);
    q4sparse_scalar(p.params(expected), 0, p.panels, scratch.data());
  }
  check_against_definition(p, expected);
  for (const auto& kernel : q4sparse_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Array<std::uint8_t> scratch(scratch_bytes);
    Array<float> seen(p.m * p.n);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, p.panels, scratch.data());
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d group %d", kernel.name, static_cast<int>(p.m),
                      static_cast<int>(p.n), static_cast<int>(p.k), static_cast<int>(p.group));
    }
  }
}

}  // namespace

SQC_TEST(q4sparse_tails) {
  Random random(30);
  for (const std::int64_t m : {1, 2, 4, 5, 7}) {
    for (const std::int64_t n : {1, 15, 16, 17, 33}) {
      for (const std::int64_t k : {0, 1, 31, 33, 129}) {
        for (const std::int64_t group : {32, 64, 128}) check(Problem(m, n, k, group, 0.5, random));
      }
    }
  }
}

SQC_TEST(q4sparse_from_dense_to_empty) {
  Random random(31);
  for (const std::int64_t m : {1, 6}) {
    for (int tenths = 0; tenths <= 10; ++tenths) check(Problem(m, 40, 300, 64, tenths * 0.1, random, tenths % 2 == 0));
  }
}

SQC_TEST(q4sparse_threads_do_not_change_a_bit) {
  Random random(32);
  for (const std::int64_t m : {0, 1, 5}) {
    for (const std::int64_t n : {0, 16, 100, 300}) {
      const Problem p(m, n, 130, 32, 0.6, random);
      const std::int64_t scratch_bytes = q4gemm_scratch_bytes(m, 130, 32);
      Array<float> expected(m * n);
      const Array<std::uint8_t> scalar_scratch(scratch_bytes);
      if (m > 0) q4sparse_scalar(p.params(expected), 0, p.panels, scalar_scratch.data());
      for (const int threads : {1, 2, 5}) {
        std::unique_ptr<ThreadPool> pool;
        SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
        const Array<std::uint8_t> scratch(scratch_bytes * threads);
        for (const auto& kernel : q4sparse_kernels()) {
          if (!isa_available(kernel.isa)) continue;
          Array<float> seen(m * n);
          SQC_CHECK(q4sparse(*pool, kernel, p.params(seen), scratch.data()).is_ok());
          SQC_CHECK(same_bits(seen, expected));
        }
      }
    }
  }
}

SQC_TEST(q4sparse_refuses) {
  Random random(33);
  const Problem p(1, 16, 64, 32, 0.5, random);
  Array<float> c(16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const std::int8_t zero[64] = {};
  Q4sparseParams bad = p.params(c);
  bad.dense.b_zero = zero;
  SQC_CHECK(q4sparse(*pool, q4sparse_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument);
  bad = p.params(c);
  bad.dense.a_stride = 63;
  SQC_CHECK(q4sparse(*pool, q4sparse_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument);
  const std::uint8_t code[1] = {16}, keep[1] = {1};
  std::uint64_t masks[8], start[2];
  std::uint8_t values[65];
  SQC_CHECK(q4sparse_pack(1, 1, 32, code, keep, masks, values, start).code() == StatusCode::kInvalidArgument);
}
