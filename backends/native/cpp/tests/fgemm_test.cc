// Every fgemm kernel against the scalar one, bit for bit, and the scalar one against plain loops.

#include <cmath>
#include <limits>

#include "kernels/fgemm/fgemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

float from_bf16(std::uint16_t half) {
  const std::uint32_t word = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

struct Problem {
  Problem(std::int64_t m_, std::int64_t n_, std::int64_t k_, FgemmType type_, bool with_bias_, Random& random)
      : m(m_), n(n_), k(k_), type(type_), with_bias(with_bias_), a(m * k), b(n * k), bias((n + 15) / 16 * 16),
        packed(fgemm_packed_bytes(n, k, type)) {
    for (float& v : a) v = random.real(-2.0f, 2.0f);
    for (float& v : b) v = random.real(-2.0f, 2.0f);
    for (float& v : bias) v = random.real(-3.0f, 3.0f);
    SQC_CHECK(fgemm_pack(n, k, b.data(), k, 1, type, packed.data()).is_ok());
  }
  FgemmParams params(const Array<float>& c) const {
    return {m, n, k, a.data(), k, type, packed.data(), with_bias ? bias.data() : nullptr, c.data(), n, low, high};
  }
  float weight(std::int64_t row, std::int64_t i) const {
    const std::int64_t at = (row / 16 * k + i) * 16 + row % 16;
    if (type == FgemmType::f32) return reinterpret_cast<const float*>(packed.data())[at];
    return from_bf16(reinterpret_cast<const std::uint16_t*>(packed.data())[at]);
  }
  std::int64_t m, n, k;
  FgemmType type;
  bool with_bias;
  Array<float> a, b, bias;
  Array<std::uint8_t> packed;
  float low = -kInf, high = kInf;
};

void check_against_definition(const Problem& p, const Array<float>& c) {
  for (std::int64_t m = 0; m < p.m; ++m) {
    for (std::int64_t n = 0; n < p.n; ++n) {
      float total = 0.0f;
      for (std::int64_t k = 0; k < p.k; ++k) total = std::fmaf(p.a[m * p.k + k], p.weight(n, k), total);
      if (p.with_bias) total += p.bias[n];
      total = total < p.low ? p.low : total > p.high ? p.high : total;
      SQC_CHECK(c[m * p.n + n] == total);
    }
  }
}

void check(const Problem& p) {
  const std::int64_t panels = (p.n + 15) / 16;
  const Array<float> scratch(fgemm_scratch_bytes(p.m, p.type) / 4);
  Array<float> expected(p.m * p.n);
  fgemm_scalar(p.params(expected), 0, panels, scratch.data());
  check_against_definition(p, expected);
  for (const auto& kernel : fgemm_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Array<float> seen(p.m * p.n);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, panels, scratch.data());
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d type %d", kernel.name, static_cast<int>(p.m),
                      static_cast<int>(p.n), static_cast<int>(p.k), static_cast<int>(p.type));
    }
  }
}

}  // namespace

SQC_TEST(fgemm_tails) {
  Random random(61);
  for (const FgemmType type : {FgemmType::f32, FgemmType::bf16}) {
    for (const std::int64_t m : {1, 2, 5, 6, 7, 13, 19}) {
      for (const std::int64_t n : {1, 16, 17, 63, 64, 65, 150}) {
        for (const std::int64_t k : {0, 1, 2, 37}) check(Problem(m, n, k, type, m % 2 == 0, random));
      }
    }
  }
}

SQC_TEST(fgemm_blocks_of_k) {
  Random random(62);
  for (const FgemmType type : {FgemmType::f32, FgemmType::bf16}) {
    for (const std::int64_t m : {1, 7, 13, 25}) {
      for (const std::int64_t k : {511, 512, 513, 1100}) check(Problem(m, 70, k, type, true, random));
    }
  }
}

SQC_TEST(fgemm_clamp_and_nan) {
  Random random(63);
  for (const std::int64_t m : {1, 8}) {
    Problem p(m, 20, 30, FgemmType::f32, true, random);
    p.low = 0.0f;
    p.high = 6.0f;
    check(p);
    p.a[5] = std::nanf("");
    Array<float> c(m * 20);
    for (const auto& kernel : fgemm_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      kernel.run(p.params(c), 0, 2, nullptr);
      for (std::int64_t i = 0; i < c.size(); ++i) SQC_CHECK(std::isnan(c[i]) == (i < 20));
    }
  }
}

SQC_TEST(fgemm_packs_either_order_and_rounds_to_even) {
  Random random(64);
  const Problem p(1, 20, 33, FgemmType::f32, false, random);
  Array<float> transposed(20 * 33);
  for (std::int64_t n = 0; n < 20; ++n) {
    for (std::int64_t k = 0; k < 33; ++k) transposed[k * 20 + n] = p.b[n * 33 + k];
  }
  const Array<std::uint8_t> packed(p.packed.size());
  SQC_CHECK(fgemm_pack(20, 33, transposed.data(), 1, 20, FgemmType::f32, packed.data()).is_ok());
  SQC_CHECK(same_bits(packed, p.packed));
  // 1 + 2^-8 lies halfway between 1 and 1 + 2^-7; 1 + 3 * 2^-8 between that and 1 + 2^-6.
  const float values[] = {1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 1.0040f, kInf, 3.4e38f, std::nanf("")};
  const float rounded[] = {1.0f, 1.0f, 1.015625f, -1.0f, 1.0078125f, kInf, kInf};
  const Array<std::uint16_t> halves(16 * 8);
  SQC_CHECK(fgemm_pack(1, 8, values, 8, 1, FgemmType::bf16, halves.data()).is_ok());
  for (int i = 0; i < 7; ++i) SQC_CHECK(from_bf16(halves[i * 16]) == rounded[i] && halves[i * 16 + 1] == 0);
  SQC_CHECK(std::isnan(from_bf16(halves[7 * 16])));
}

SQC_TEST(fgemm_threads_do_not_change_a_bit) {
  Random random(65);
  for (const FgemmType type : {FgemmType::f32, FgemmType::bf16}) {
    for (const std::int64_t m : {0, 1, 5, 40, 100}) {
      for (const std::int64_t n : {0, 20, 300}) {
        const Problem p(m, n, 70, type, true, random);
        Array<float> expected(m * n);
        const std::int64_t scratch_bytes = fgemm_scratch_bytes(m, type);
        if (m > 0) fgemm_scalar(p.params(expected), 0, (n + 15) / 16, Array<float>(scratch_bytes / 4).data());
        for (const int threads : {1, 2, 7}) {
          std::unique_ptr<ThreadPool> pool;
          SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
          const Array<std::uint8_t> scratch(scratch_bytes * threads);
          for (const auto& kernel : fgemm_kernels()) {
            if (!isa_available(kernel.isa)) continue;
            Array<float> seen(m * n);
            SQC_CHECK(fgemm(*pool, kernel, p.params(seen), scratch.data()).is_ok());
            SQC_CHECK(same_bits(seen, expected));
          }
        }
      }
    }
  }
}

SQC_TEST(fgemm_refuses) {
  Random random(66);
  const Problem p(2, 16, 8, FgemmType::f32, true, random);
  Array<float> c(32);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    FgemmParams bad = p.params(c);
    change(bad);
    return fgemm(*pool, fgemm_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](FgemmParams& q) { q.m = -1; }));
  SQC_CHECK(refused([](FgemmParams& q) { q.n = -1; }));
  SQC_CHECK(refused([](FgemmParams& q) { q.k = -1; }));
  SQC_CHECK(refused([](FgemmParams& q) { q.a_stride = 7; }));
  SQC_CHECK(refused([](FgemmParams& q) { q.c_stride = 15; }));
  SQC_CHECK(fgemm_pack(-1, 1, nullptr, 1, 1, FgemmType::f32, nullptr).code() == StatusCode::kInvalidArgument);
}
