// Every norm kernel against the scalar one, bit for bit, the scalar one against plain loops in double, and the
// codes against those of family quantize.

#include <cmath>
#include <limits>

#include "kernels/norm/norm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

struct Options {
  NormKind kind;
  std::int64_t m, k;
  bool residual = false, keep_sum = false, weight = true, bias = false, keep_y = true, quantize = false;
  QuantizeMode mode = QuantizeMode::symmetric;
  bool is_signed = true;
  std::int64_t group = 0;
};

struct Problem {
  Problem(const Options& options, Random& random)
      : o(options), x(o.m * o.k), residual(o.m * o.k), weight(o.k), bias(o.k) {
    for (float& v : x) v = random.real(-4.0f, 4.0f);
    for (float& v : residual) v = random.real(-4.0f, 4.0f);
    for (float& v : weight) v = random.real(-2.0f, 2.0f);
    for (float& v : bias) v = random.real(-1.0f, 1.0f);
  }
  std::int64_t groups() const { return o.group == 0 ? 1 : (o.k + o.group - 1) / o.group; }
  std::int64_t k_padded() const { return (o.k + 31) / 32 * 32; }

  Options o;
  Array<float> x, residual, weight, bias;
};

// What a kernel writes.
struct Outcome {
  explicit Outcome(const Problem& p)
      : sum(p.o.m * p.o.k), y(p.o.m * p.o.k), codes(p.o.m * p.k_padded()), scale(p.o.m * (p.groups() + 1)),
        zero_point(p.o.m), code_sum(p.o.m * p.groups()) {
    for (float& v : sum) v = -7.0f;
    for (float& v : y) v = -7.0f;
  }
  Array<float> sum, y;
  Array<std::uint8_t> codes;
  Array<float> scale;
  Array<std::int32_t> zero_point, code_sum;
};

QuantizeParams quantize_params(const Problem& p, const float* x, const Outcome& out) {
  return {p.o.mode, p.o.is_signed, p.o.m, p.o.k, x, p.o.k, out.codes.data(), p.k_padded(), p.k_padded(),
          p.o.mode == QuantizeMode::symmetric ? p.o.group : 0, p.o.group, out.scale.data(), out.zero_point.data(),
          out.code_sum.data()};
}

NormParams params_of(const Problem& p, const Outcome& out, const QuantizeParams* quantize) {
  return {p.o.kind, p.o.m, p.o.k, p.x.data(), p.o.k, p.o.residual ? p.residual.data() : nullptr, p.o.k,
          p.o.keep_sum ? out.sum.data() : nullptr, p.o.k, p.o.weight ? p.weight.data() : nullptr,
          p.o.bias ? p.bias.data() : nullptr, 1e-5f, p.o.keep_y ? out.y.data() : nullptr, p.o.k,
          p.o.quantize ? quantize : nullptr};
}

void run(NormFunction function, const Problem& p, const Outcome& out) {
  const QuantizeParams quantize = quantize_params(p, nullptr, out);
  const NormParams params = params_of(p, out, &quantize);
  const Array<float> scratch(norm_scratch_count(params));
  function(params, 0, p.o.m, scratch.data());
}

void check_against_definition(const Problem& p, const Outcome& out) {
  for (std::int64_t m = 0; m < p.o.m; ++m) {
    std::vector<double> h(static_cast<std::size_t>(p.o.k));
    double mean = 0.0, squares = 0.0;
    for (std::int64_t k = 0; k < p.o.k; ++k) {
      const std::int64_t i = m * p.o.k + k;
      const float value = p.o.residual ? p.x[i] + p.residual[i] : p.x[i];
      if (p.o.keep_sum) SQC_CHECK(out.sum[i] == value);
      h[static_cast<std::size_t>(k)] = value;
      mean += value / static_cast<double>(p.o.k);
    }
    if (p.o.kind == NormKind::rms) mean = 0.0;
    for (const double v : h) squares += (v - mean) * (v - mean) / static_cast<double>(p.o.k);
    for (std::int64_t k = 0; k < p.o.k && p.o.keep_y; ++k) {
      const double normal = (h[static_cast<std::size_t>(k)] - mean) / std::sqrt(squares + 1e-5);
      const double y = normal * (p.o.weight ? p.weight[k] : 1.0f) + (p.o.bias ? p.bias[k] : 0.0f);
      // |h| <= 8: a mean of up to 64 partial sums is off by some 2^-20, and one value alone in its row is
      // its own mean, so that the error is divided by sqrt(epsilon).
      const double tolerance = p.o.k == 1 ? 1e-3 : 2e-5;
      SQC_CHECK(std::abs(out.y[m * p.o.k + k] - y) <= tolerance);
    }
  }
}

void check(const Problem& p) {
  Outcome expected(p);
  run(norm_scalar, p, expected);
  check_against_definition(p, expected);
  if (p.o.quantize && p.o.keep_y) {
    const Outcome alone(p);
    quantize_kernel(Isa::scalar).run(quantize_params(p, expected.y.data(), alone), 0, p.o.m);
    SQC_CHECK(same_bits(alone.codes, expected.codes) && same_bits(alone.scale, expected.scale) &&
              same_bits(alone.code_sum, expected.code_sum) && same_bits(alone.zero_point, expected.zero_point));
  }
  for (const auto& kernel : norm_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Outcome seen(p);
    run(kernel.run, p, seen);
    if (!(same_bits(seen.sum, expected.sum) && same_bits(seen.y, expected.y) && same_bits(seen.codes, expected.codes) &&
          same_bits(seen.scale, expected.scale) && same_bits(seen.zero_point, expected.zero_point) &&
          same_bits(seen.code_sum, expected.code_sum))) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: kind %d m %d k %d residual %d weight %d bias %d quantize %d",
                      kernel.name, static_cast<int>(p.o.kind), static_cast<int>(p.o.m), static_cast<int>(p.o.k),
                      p.o.residual, p.o.weight, p.o.bias, p.o.quantize);
    }
  }
}

}  // namespace

SQC_TEST(norm_tails) {
  Random random(31);
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const std::int64_t m : {0, 1, 3}) {
      for (const std::int64_t k : {1, 15, 16, 17, 31, 33, 63, 64, 65, 80, 127, 129, 300}) {
        check(Problem({kind, m, k}, random));
      }
    }
  }
}

SQC_TEST(norm_options) {
  Random random(32);
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (int bits = 0; bits < 64; ++bits) {
      const auto on = [bits](int bit) { return ((bits >> bit) & 1) != 0; };
      Options options = {kind, 2, 150, on(0), on(0) && on(1), on(2), on(3), on(4), on(5) || !on(4)};
      check(Problem(options, random));
    }
  }
}

SQC_TEST(norm_quantizes_as_quantize_does) {
  Random random(33);
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const bool keep_y : {true, false}) {
      for (const std::int64_t group : {0, 32, 128}) {
        for (const bool is_signed : {true, false}) {
          check(Problem({kind, 3, 200, true, true, true, true, keep_y, true, QuantizeMode::symmetric, is_signed, group},
                        random));
        }
        check(Problem({kind, 3, 200, true, true, true, true, keep_y, true, QuantizeMode::affine, false, group}, random));
      }
    }
  }
}

SQC_TEST(norm_extremes) {
  Random random(34);
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    for (const float value : {0.0f, -0.0f, 1e-30f, -3.0f}) {
      Problem p({kind, 2, 70}, random);
      for (float& v : p.x) v = value;
      check(p);
    }
    // Squares beyond float32: the row becomes zeros or NaNs, the same everywhere, and no other row changes.
    Problem p({kind, 2, 70, false, false, false}, random);
    p.x[3] = 3e38f;
    Outcome out(p);
    for (const auto& kernel : norm_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      run(kernel.run, p, out);
      for (std::int64_t k = 0; k < 70; ++k) {
        SQC_CHECK(k == 3 || std::isnan(out.y[k]) || out.y[k] == 0.0f);
        SQC_CHECK(std::abs(out.y[70 + k]) < 3.0f);
      }
    }
  }
}

SQC_TEST(norm_in_place_and_over_threads) {
  Random random(35);
  for (const NormKind kind : {NormKind::rms, NormKind::layer}) {
    const Problem p({kind, 37, 515, true, true, true, true, true, true}, random);
    const Outcome expected(p);
    run(norm_scalar, p, expected);
    for (const int threads : {1, 2, 3, 7}) {
      std::unique_ptr<ThreadPool> pool;
      SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
      for (const auto& kernel : norm_kernels()) {
        if (!isa_available(kernel.isa)) continue;
        const Outcome seen(p);
        const QuantizeParams quantize = quantize_params(p, nullptr, seen);
        NormParams params = params_of(p, seen, &quantize);
        // The residual stream is updated where it lies.
        Array<float> stream(p.residual.size());
        std::memcpy(stream.data(), p.residual.data(), static_cast<std::size_t>(stream.size()) * sizeof(float));
        params.residual = params.sum = stream.data();
        SQC_CHECK(norm(*pool, kernel, params, nullptr).is_ok());
        SQC_CHECK(same_bits(stream, expected.sum) && same_bits(seen.y, expected.y) && same_bits(seen.codes, expected.codes));
        params.y = nullptr;
        std::memcpy(stream.data(), p.residual.data(), static_cast<std::size_t>(stream.size()) * sizeof(float));
        const Array<float> scratch(norm_scratch_count(params) * threads);
        const Outcome codes_only(p);
        const QuantizeParams quantize_only = quantize_params(p, nullptr, codes_only);
        params.quantize = &quantize_only;
        SQC_CHECK(norm(*pool, kernel, params, scratch.data()).is_ok());
        SQC_CHECK(same_bits(codes_only.codes, expected.codes) && same_bits(codes_only.scale, expected.scale));
      }
    }
  }
}

SQC_TEST(norm_refuses) {
  Random random(36);
  const Problem p({NormKind::rms, 2, 64, true, true, true, true, true, true}, random);
  const Outcome out(p);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const QuantizeParams quantize = quantize_params(p, nullptr, out);
  const auto result = [&](auto change) {
    QuantizeParams codes = quantize;
    NormParams params = params_of(p, out, &codes);
    change(params, codes);
    return norm(*pool, norm_kernel(Isa::scalar), params, nullptr);
  };
  SQC_CHECK(result([](NormParams&, QuantizeParams&) {}).is_ok());
  const auto refused = [&](auto change) { return result(change).code() == StatusCode::kInvalidArgument; };
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.m = -1; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.x_stride = 63; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.residual_stride = 63; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.sum_stride = 63; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.y_stride = 63; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.residual = nullptr; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.epsilon = -1.0f; }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.epsilon = std::nanf(""); }));
  SQC_CHECK(refused([](NormParams& q, QuantizeParams&) { q.y = nullptr, q.quantize = nullptr; }));
  SQC_CHECK(refused([](NormParams&, QuantizeParams& c) { c.k = 63; }));
  SQC_CHECK(refused([](NormParams&, QuantizeParams& c) { c.sum_group = 8; }));
}
