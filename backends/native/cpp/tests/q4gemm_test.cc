// Every q4gemm kernel against the scalar one, bit for bit, and the scalar one against plain loops.

#include <cmath>
#include <limits>

#include "kernels/q4gemm/q4gemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Options {
  std::int64_t m, n, k, group;
  bool half = true, zeros = false, scale_per_group = false, with_bias = true, extremes = false;
  int bits = 4;
};

struct Problem {
  Problem(const Options& options, Random& random)
      : o(options), groups((o.k + o.group - 1) / o.group), k_padded(groups * o.group), panels((o.n + 15) / 16),
        a(o.m * k_padded), a_sum(o.m * groups), a_scale(o.m * (o.scale_per_group ? groups : 1)), codes(o.n * o.k),
        packed(q4gemm_packed_bytes(o.n, o.k, o.group, o.bits)), scale(panels * groups * 16), half_scale(scale.size()),
        zero(scale.size()), bias(panels * 16) {
    const std::int8_t extremes[] = {-128, -127, 0, 127};
    for (std::int64_t m = 0; m < o.m; ++m) {
      for (std::int64_t k = 0; k < k_padded; ++k) {
        std::int8_t& value = a[m * k_padded + k];
        value = k >= o.k         ? std::int8_t{0}
                : o.extremes     ? extremes[random.integer(0, 3)]
                                 : static_cast<std::int8_t>(random.integer(-128, 127));
        a_sum[m * groups + k / o.group] += value;
      }
    }
    for (float& s : a_scale) s = random.real(0.01f, 0.1f);
    for (std::uint8_t& c : codes) c = static_cast<std::uint8_t>(random.integer(0, (1 << o.bits) - 1));
    for (std::uint8_t& c : codes) c = o.bits == 8 && c == 128 ? std::uint8_t{129} : c;
    for (int i = 0; i < 16; ++i) {
      table[i] = static_cast<std::int8_t>(o.extremes ? (i % 2 == 0 ? -127 : 127) : random.integer(-127, 127));
    }
    for (std::int64_t i = 0; i < scale.size(); ++i) {
      half_scale[i] = sqc_tests::to_half(random.real(0.001f, 0.02f));
      scale[i] = std::ldexp(static_cast<float>(1024 + (half_scale[i] & 0x3ff)), (half_scale[i] >> 10) - 25);
      zero[i] = static_cast<std::int8_t>(random.integer(-128, 127));
    }
    for (float& v : bias) v = random.real(-3.0f, 3.0f);
    SQC_CHECK(q4gemm_pack(o.n, o.k, o.group, codes.data(), packed.data(), o.bits).is_ok());
  }

  Q4gemmParams params(const Array<float>& c) const {
    Q4gemmParams p = {o.m, o.n, o.k, o.group, a.data(), k_padded, a_sum.data(), a_scale.data(), o.scale_per_group,
                      packed.data(), {}, o.half ? static_cast<const void*>(half_scale.data()) : scale.data(), o.half,
                      o.zeros ? zero.data() : nullptr, o.with_bias ? bias.data() : nullptr, c.data(), o.n, low, high, o.bits};
    std::memcpy(p.table, table, sizeof table);
    return p;
  }

  std::int64_t at(std::int64_t n, std::int64_t g) const { return (n / 16 * groups + g) * 16 + n % 16; }

  Options o;
  std::int64_t groups, k_padded, panels;
  Array<std::int8_t> a;
  Array<std::int32_t> a_sum;
  Array<float> a_scale;
  Array<std::uint8_t> codes, packed;
  Array<float> scale;
  Array<std::uint16_t> half_scale;
  Array<std::int8_t> zero;
  Array<float> bias;
  std::int8_t table[16];
  float low = -kInf, high = kInf;
};

void check_against_definition(const Problem& p, const Array<float>& c) {
  for (std::int64_t m = 0; m < p.o.m; ++m) {
    for (std::int64_t n = 0; n < p.o.n; ++n) {
      float total = 0.0f;
      for (std::int64_t g = 0; g < p.groups; ++g) {
        std::int32_t sum = 0;
        for (std::int64_t k = g * p.o.group; k < (g + 1) * p.o.group && k < p.o.k; ++k) {
          const std::uint8_t code = p.codes[n * p.o.k + k];
          const int value = p.o.bits == 8 ? static_cast<std::int8_t>(code) : p.table[code];
          const int weight = value - (p.o.zeros ? p.zero[p.at(n, g)] : 0);
          sum += p.a[m * p.k_padded + k] * weight;
        }
        float scale = p.scale[p.at(n, g)];
        if (p.o.scale_per_group) scale *= p.a_scale[m * p.groups + g];
        total = std::fmaf(static_cast<float>(sum), scale, total);
      }
      float value = std::fmaf(total, p.o.scale_per_group ? 1.0f : p.a_scale[m], p.o.with_bias ? p.bias[n] : 0.0f);
      value = value < p.low ? p.low : value > p.high ? p.high : value;
      SQC_CHECK(c[m * p.o.n + n] == value);
    }
  }
}

void check(const Problem& p) {
  const std::int64_t scratch_bytes = q4gemm_scratch_bytes(p.o.m, p.o.k, p.o.group);
  Array<float> expected(p.o.m * p.o.n);
  {
    const Array<std::uint8_t> scratch(scratch_bytes);
    q4gemm_scalar(p.params(expected), 0, p.panels, scratch.data());
  }
  check_against_definition(p, expected);
  for (const auto& kernel : q4gemm_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Array<std::uint8_t> scratch(scratch_bytes);
    Array<float> seen(p.o.m * p.o.n);
    for (float& v : seen) v = -7.0f;
    kernel.run(p.params(seen), 0, p.panels, scratch.data());
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: m %d n %d k %d group %d half %d zeros %d per group %d", kernel.name,
                      static_cast<int>(p.o.m), static_cast<int>(p.o.n), static_cast<int>(p.o.k),
                      static_cast<int>(p.o.group), p.o.half, p.o.zeros, p.o.scale_per_group);
    }
  }
}

}  // namespace

SQC_TEST(q4gemm_tails) {
  Random random(9);
  for (const std::int64_t m : {1, 2, 3, 4, 5, 6, 7, 13}) {
    for (const std::int64_t n : {1, 15, 16, 17, 31, 33, 48}) {
      for (const std::int64_t k : {0, 1, 31, 32, 33, 129}) {
        for (const std::int64_t group : {32, 64, 128}) check(Problem({m, n, k, group}, random));
      }
    }
  }
}

SQC_TEST(q4gemm_other_bits_tails) {
  Random random(15);
  for (const int bits : {2, 3, 8}) {
    for (const std::int64_t m : {1, 2, 4, 5, 7}) {
      for (const std::int64_t n : {1, 16, 17, 33}) {
        for (const std::int64_t k : {0, 1, 31, 32, 33, 129}) {
          for (const std::int64_t group : {32, 128}) {
            Options options = {m, n, k, group};
            options.bits = bits;
            options.zeros = m % 2 == 0;
            options.extremes = n == 17;
            check(Problem(options, random));
          }
        }
      }
    }
  }
}

SQC_TEST(q4gemm_options) {
  Random random(10);
  for (const std::int64_t m : {1, 3, 6}) {
    for (int bits = 0; bits < 32; ++bits) {
      check(Problem({m, 40, 200, 64, (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0},
                    random));
    }
  }
}

SQC_TEST(q4gemm_largest_sums) {
  Random random(11);
  for (const std::int64_t m : {1, 5}) {
    for (const int value : {-128, 127}) {
      Problem p({m, 16, 4096, 128}, random);
      for (std::int8_t& v : p.a) v = static_cast<std::int8_t>(value);
      for (std::int32_t& s : p.a_sum) s = value * 128;
      for (std::int8_t& t : p.table) t = value < 0 ? std::int8_t{-127} : std::int8_t{127};
      check(p);
      Options options = p.o;
      options.bits = 8;
      Problem bytes(options, random);
      for (std::int8_t& v : bytes.a) v = static_cast<std::int8_t>(value);
      for (std::int32_t& s : bytes.a_sum) s = value * 128;
      for (std::uint8_t& c : bytes.codes) c = value < 0 ? std::uint8_t{129} : std::uint8_t{127};
      SQC_CHECK(q4gemm_pack(16, 4096, 128, bytes.codes.data(), bytes.packed.data(), 8).is_ok());
      check(bytes);
    }
  }
}

SQC_TEST(q4gemm_clamp_and_nan) {
  Random random(12);
  for (const std::int64_t m : {1, 6}) {
    Problem p({m, 20, 64, 32}, random);
    p.low = 0.0f;
    p.high = 6.0f;
    check(p);
    p.a_scale[0] = std::nanf("");
    Array<float> c(m * 20);
    const Array<std::uint8_t> scratch(q4gemm_scratch_bytes(m, 64, 32));
    for (const auto& kernel : q4gemm_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      kernel.run(p.params(c), 0, 2, scratch.data());
      for (std::int64_t i = 0; i < c.size(); ++i) SQC_CHECK(std::isnan(c[i]) == (i < 20));
    }
  }
}

SQC_TEST(q4gemm_threads_do_not_change_a_bit) {
  Random random(13);
  for (const std::int64_t m : {0, 1, 4, 5, 12}) {
    for (const std::int64_t n : {0, 16, 100, 300}) {
      const Problem p({m, n, 130, 32}, random);
      const std::int64_t scratch_bytes = q4gemm_scratch_bytes(m, 130, 32);
      Array<float> expected(m * n);
      const Array<std::uint8_t> scalar_scratch(scratch_bytes);
      if (m > 0) q4gemm_scalar(p.params(expected), 0, p.panels, scalar_scratch.data());
      for (const int threads : {1, 2, 3, 7}) {
        std::unique_ptr<ThreadPool> pool;
        SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
        const Array<std::uint8_t> scratch(scratch_bytes * threads);
        for (const auto& kernel : q4gemm_kernels()) {
          if (!isa_available(kernel.isa)) continue;
          Array<float> seen(m * n);
          SQC_CHECK(q4gemm(*pool, kernel, p.params(seen), scratch.data()).is_ok());
          SQC_CHECK(same_bits(seen, expected));
        }
      }
    }
  }
}

SQC_TEST(q4gemm_refuses) {
  Random random(14);
  const Problem p({1, 16, 64, 32}, random);
  Array<float> c(16);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    Q4gemmParams bad = p.params(c);
    change(bad);
    return q4gemm(*pool, q4gemm_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](Q4gemmParams& q) { q.m = -1; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.k = kQ4gemmMaxK + 1; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.group = 48; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.a_stride = 63; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.c_stride = 15; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.table[3] = -128; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.bits = 1; }));
  SQC_CHECK(refused([](Q4gemmParams& q) { q.bits = 5; }));
  const std::uint8_t bad_codes[1] = {16};
  Array<std::uint8_t> packed(q4gemm_packed_bytes(1, 1, 32));
  SQC_CHECK(q4gemm_pack(1, 1, 32, bad_codes, packed.data()).code() == StatusCode::kInvalidArgument);
  const std::uint8_t lowest[1] = {128}, four[1] = {4};
  Array<std::uint8_t> bytes(q4gemm_packed_bytes(1, 1, 32, 8));
  SQC_CHECK(q4gemm_pack(1, 1, 32, lowest, bytes.data(), 8).code() == StatusCode::kInvalidArgument);
  SQC_CHECK(q4gemm_pack(1, 1, 32, four, packed.data(), 2).code() == StatusCode::kInvalidArgument);
  SQC_CHECK(q4gemm_pack(1, 1, 32, four, packed.data(), 5).code() == StatusCode::kInvalidArgument);
}
