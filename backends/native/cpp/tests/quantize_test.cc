// Every quantize kernel against the scalar one, bit for bit, and the scalar one against plain loops.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/quantize/quantize.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

struct Case {
  QuantizeMode mode;
  bool is_signed;
  std::int64_t m, k, k_padded, scale_group, sum_group;
};

struct Outcome {
  explicit Outcome(const Case& c, std::int64_t groups)
      : codes(c.m * c.k_padded), scale(c.m * std::max<std::int64_t>(groups, 1) + 1), zero_point(c.m + 1), sum(c.m * groups) {
    std::memset(codes.data(), 0xaa, static_cast<std::size_t>(codes.size()));
    for (float& s : scale) s = 0.03f;
    for (std::int32_t& z : zero_point) z = c.is_signed ? -3 : 130;
    for (std::int32_t& s : sum) s = -1;
  }
  Array<std::uint8_t> codes;
  Array<float> scale;
  Array<std::int32_t> zero_point, sum;
};

std::int64_t groups_of(const Case& c) { return c.sum_group != 0 ? (c.k + c.sum_group - 1) / c.sum_group : 1; }

void run(QuantizeFunction function, const Case& c, const Array<float>& x, Outcome* out) {
  const QuantizeParams params = {c.mode,        c.is_signed,       c.m,           c.k,
                                 x.data(),      c.k,               out->codes.data(), c.k_padded,
                                 c.k_padded,    c.scale_group,     c.sum_group,   out->scale.data(),
                                 out->zero_point.data(), out->sum.data()};
  function(params, 0, c.m);
}

// The definition, for finite rows.
void check_against_definition(const Case& c, const Array<float>& x, const Outcome& out) {
  const std::int64_t groups = groups_of(c), step = c.sum_group != 0 ? c.sum_group : c.k_padded;
  const int lowest = c.is_signed ? -128 : 0, highest = c.is_signed ? 127 : 255;
  for (std::int64_t m = 0; m < c.m; ++m) {
    std::vector<std::int32_t> sums(static_cast<std::size_t>(groups));
    for (std::int64_t k = 0; k < c.k_padded; ++k) {
      const std::int64_t g = step == 0 ? 0 : std::min(k / step, groups - 1);
      const float scale = c.mode == QuantizeMode::static_scale ? out.scale[0]
                          : c.scale_group != 0 && groups > 0   ? out.scale[m * groups + g]
                                                               : out.scale[m];
      const int zero = c.mode == QuantizeMode::static_scale ? out.zero_point[0]
                       : c.mode == QuantizeMode::affine     ? out.zero_point[m]
                                                            : (c.is_signed ? 0 : 128);
      float code = static_cast<float>(zero);
      if (k < c.k) code += std::nearbyint(x[m * c.k + k] / scale);
      code = code < static_cast<float>(lowest) ? static_cast<float>(lowest) : code;
      code = code > static_cast<float>(highest) ? static_cast<float>(highest) : code;
      const std::uint8_t byte = out.codes[m * c.k_padded + k];
      const int seen = c.is_signed ? static_cast<std::int8_t>(byte) : byte;
      SQC_CHECK(seen == static_cast<int>(code));
      if (groups > 0) sums[static_cast<std::size_t>(g)] += seen;
    }
    for (std::int64_t g = 0; g < groups; ++g) SQC_CHECK(out.sum[m * groups + g] == sums[static_cast<std::size_t>(g)]);
  }
}

void check_case(const Case& c, const Array<float>& x, bool finite) {
  const std::int64_t groups = groups_of(c);
  Outcome expected(c, groups);
  run(quantize_scalar, c, x, &expected);
  if (finite) check_against_definition(c, x, expected);
  for (const auto& kernel : quantize_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    Outcome seen(c, groups);
    run(kernel.run, c, x, &seen);
    if (!(same_bits(seen.codes, expected.codes) && same_bits(seen.scale, expected.scale) &&
          same_bits(seen.zero_point, expected.zero_point) && same_bits(seen.sum, expected.sum))) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: mode %d signed %d k %d padded %d groups %d %d", kernel.name,
                      static_cast<int>(c.mode), c.is_signed, static_cast<int>(c.k), static_cast<int>(c.k_padded),
                      static_cast<int>(c.scale_group), static_cast<int>(c.sum_group));
    }
  }
}

void for_all_modes(std::int64_t m, std::int64_t k, const Array<float>& x, bool finite) {
  for (const std::int64_t padding : {0, 1, 20}) {
    check_case({QuantizeMode::affine, false, m, k, k + padding, 0, 0}, x, finite);
    for (const bool is_signed : {false, true}) {
      check_case({QuantizeMode::static_scale, is_signed, m, k, k + padding, 0, 0}, x, finite);
      check_case({QuantizeMode::symmetric, is_signed, m, k, k + padding, 0, 0}, x, finite);
      check_case({QuantizeMode::symmetric, is_signed, m, k, k + padding, 0, 32}, x, finite);
      check_case({QuantizeMode::symmetric, is_signed, m, k, k + padding, 32, 32}, x, finite);
      check_case({QuantizeMode::symmetric, is_signed, m, k, k + padding, 128, 128}, x, finite);
    }
  }
}

}  // namespace

SQC_TEST(quantize_tails) {
  Random random(2);
  for (const std::int64_t m : {0, 1, 3}) {
    for (const std::int64_t k : {0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 129, 300}) {
      Array<float> x(m * k);
      for (float& v : x) v = random.real(-4.0f, 4.0f);
      for_all_modes(m, k, x, true);
    }
  }
}

SQC_TEST(quantize_halves_round_to_even) {
  Array<float> x(48);
  for (std::int64_t i = 0; i < 48; ++i) x[i] = static_cast<float>(i - 24) + 0.5f;
  x[0] = 127.0f;  // the scale is exactly 1
  for_all_modes(1, 48, x, true);
}

SQC_TEST(quantize_extremes) {
  const float huge = std::numeric_limits<float>::max(), tiny = std::numeric_limits<float>::denorm_min();
  const float rows[][4] = {{0, 0, 0, 0},        {-0.0f, 0, -0.0f, 0}, {huge, -huge, 1, 0},  {huge, huge, huge, huge},
                           {tiny, -tiny, 0, 0}, {1, 1, 1, 1},         {-1, -2, -3, -4},     {1e-20f, -1e-22f, 0, 0},
                           {5, 1e30f, -7, 3},   {-huge, -1, 0, 1e5f}, {255, 0, 127.5f, 128}};
  for (const auto& row : rows) {
    for (const std::int64_t k : {4, 20, 40}) {
      Array<float> x(k);
      for (std::int64_t i = 0; i < k; ++i) x[i] = row[i % 4];
      for_all_modes(1, k, x, true);
    }
  }
}

SQC_TEST(quantize_not_finite_gives_a_nan_scale) {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const float bad : {inf, -inf, nan, -nan}) {
    for (const std::int64_t position : {0, 15, 16, 39}) {
      Array<float> x(40);
      for (std::int64_t i = 0; i < 40; ++i) x[i] = static_cast<float>(i) - 20;
      x[position] = bad;
      for_all_modes(1, 40, x, false);
      const Case c = {QuantizeMode::symmetric, true, 1, 40, 40, 32, 32};
      Outcome out(c, 2);
      run(quantize_scalar, c, x, &out);
      SQC_CHECK(std::isnan(out.scale[position / 32]) && !std::isnan(out.scale[1 - position / 32]));
      const Case affine = {QuantizeMode::affine, false, 1, 40, 40, 0, 0};
      Outcome whole(affine, 1);
      run(quantize_scalar, affine, x, &whole);
      SQC_CHECK(std::isnan(whole.scale[0]));
    }
  }
}

SQC_TEST(quantize_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  float x[4] = {}, scale[1] = {0.1f};
  std::uint8_t codes[4];
  std::int32_t zero[1] = {0};
  const QuantizeParams good = {QuantizeMode::static_scale, true, 1, 4, x, 4, codes, 4, 4, 0, 0, scale, zero, nullptr};
  const auto& kernel = quantize_kernel(Isa::scalar);
  SQC_CHECK(quantize(*pool, kernel, good).is_ok());
  const auto refused = [&](auto change) {
    QuantizeParams bad = good;
    change(bad);
    return quantize(*pool, kernel, bad).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QuantizeParams& p) { p.m = -1; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.x_stride = 3; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.k_padded = 3; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.code_stride = 3; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.sum_group = 8; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.sum_group = p.scale_group = 32; }));
  SQC_CHECK(refused([](QuantizeParams& p) { p.mode = QuantizeMode::affine; }));
  for (const float bad_scale : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::nanf("")}) {
    scale[0] = bad_scale;
    SQC_CHECK(refused([](QuantizeParams&) {}));
  }
  scale[0] = 0.1f;
  zero[0] = 128;
  SQC_CHECK(refused([](QuantizeParams&) {}));
}
