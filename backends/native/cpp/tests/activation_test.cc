// Every activation kernel against the scalar one, bit for bit; the scalar one against double precision, with
// the errors that kernels/float_math.h states; the codes against those of family quantize.

#include <cmath>
#include <limits>

#include "kernels/activation/activation.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

constexpr Activation kAll[] = {Activation::identity, Activation::relu,      Activation::sigmoid, Activation::silu,
                               Activation::gelu,     Activation::gelu_tanh, Activation::tanh,    Activation::exp};
constexpr float kInf = std::numeric_limits<float>::infinity();

double exact(Activation function, double x) {
  const double cdf = std::erfc(-x / std::sqrt(2.0)) / 2, cube = std::sqrt(8 / M_PI) * (x + 0.044715 * x * x * x);
  switch (function) {
    case Activation::identity: return x;
    case Activation::relu: return x > 0 ? x : 0;
    case Activation::sigmoid: return 1 / (1 + std::exp(-x));
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu: return x * cdf;
    case Activation::gelu_tanh: return x / (1 + std::exp(-cube));
    case Activation::tanh: return std::tanh(x);
    case Activation::exp: return std::exp(x);
  }
  return 0;
}

// The distance of floats next to y.
double ulp(double y) {
  int exponent;
  std::frexp(y, &exponent);
  return std::ldexp(1.0, exponent - 24 < -149 ? -149 : exponent - 24);
}

// In ulp of the exact result. gelu_tanh is no more exact than its argument is: an ulp of u, which is up to 2^3
// where sigmoid(2 u) is not yet constant, changes sigmoid(2 u) by many on the negative side.
double largest_error(Activation function) {
  switch (function) {
    case Activation::identity:
    case Activation::relu: return 0.0;
    case Activation::exp: return 1.0;
    case Activation::tanh: return 2.0;
    case Activation::sigmoid: return 3.0;
    case Activation::silu: return 4.0;
    case Activation::gelu: return 0.0;  // see allowed_error
    case Activation::gelu_tanh: return 150.0;
  }
  return 0.0;
}

// Most that a result may be away from `expected`.
double allowed_error(Activation function, float x, double expected) {
  // The share of a normal distribution is a half more than what is computed: that is exact to a float near one.
  if (function == Activation::gelu) return 2.5e-7 * std::abs(static_cast<double>(x)) + ulp(expected);
  return largest_error(function) * ulp(expected);
}

// Below, results are zero instead of subnormal or some 1e-38.
float lowest_argument(Activation function) {
  switch (function) {
    case Activation::sigmoid:
    case Activation::silu: return -87.0f;
    case Activation::gelu_tanh: return -9.0f;
    default: return -kInf;
  }
}

ActivationParams params_of(Activation function, const Array<float>& x, const Array<float>& y) {
  return {function, 1, x.size(), x.data(), x.size(), nullptr, 0, y.data(), y.size(), nullptr};
}

void check_errors(Activation function, const Array<float>& x) {
  const Array<float> y(x.size());
  activation_scalar(params_of(function, x, y), 0, 1, nullptr);
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const double expected = exact(function, x[i]);
    if (x[i] < lowest_argument(function)) {
      SQC_CHECK(std::abs(y[i]) <= 1e-15f);
    } else if (std::abs(expected) > std::numeric_limits<float>::max()) {
      SQC_CHECK(y[i] == (expected > 0 ? kInf : -kInf));
    } else if (!(std::abs(y[i] - expected) <= allowed_error(function, x[i], expected))) {
      sqc_tests::fail(__FILE__, __LINE__, "function %d of %a is %a, off by %.2f ulp", static_cast<int>(function),
                      static_cast<double>(x[i]), static_cast<double>(y[i]), (y[i] - expected) / ulp(expected));
    }
  }
}

void check_kernels(const ActivationParams& params, const Array<float>& expected) {
  for (const auto& kernel : activation_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    const Array<float> seen(expected.size());
    for (float& v : seen) v = -7.0f;
    ActivationParams p = params;
    p.y = seen.data();
    kernel.run(p, 0, p.m, nullptr);
    if (!same_bits(seen, expected)) {
      sqc_tests::fail(__FILE__, __LINE__, "%s differs: function %d m %d k %d", kernel.name, static_cast<int>(p.function),
                      static_cast<int>(p.m), static_cast<int>(p.k));
    }
  }
}

}  // namespace

SQC_TEST(activation_errors) {
  // Every 65521st float of either sign, and the range where things happen.
  Array<float> x(2 * (0x7f800000 / 65521) + 20001);
  std::int64_t next = 0;
  for (std::uint32_t bits = 0; bits < 0x7f800000u && next + 1 < x.size(); bits += 65521) {
    for (const std::uint32_t sign : {0u, 0x80000000u}) {
      const std::uint32_t word = bits | sign;
      std::memcpy(&x[next++], &word, sizeof word);
    }
  }
  for (float v = -100.0f; next < x.size(); v += 0.01f) x[next++] = v;
  for (const Activation function : kAll) {
    check_errors(function, x);
    const Array<float> y(x.size());
    const ActivationParams params = params_of(function, x, y);
    activation_scalar(params, 0, 1, nullptr);
    check_kernels(params, y);
  }
}

SQC_TEST(activation_limits) {
  const Array<float> x(4), y(4);
  x[0] = kInf;
  x[1] = -kInf;
  x[2] = std::nanf("");
  x[3] = 0.0f;
  const float at_inf[] = {kInf, kInf, 1.0f, kInf, kInf, kInf, 1.0f, kInf};
  for (const Activation function : kAll) {
    for (const auto& kernel : activation_kernels()) {
      if (!isa_available(kernel.isa)) continue;
      kernel.run(params_of(function, x, y), 0, 1, nullptr);
      SQC_CHECK(y[0] == at_inf[static_cast<int>(function)] && std::isnan(y[2]));
      SQC_CHECK(y[3] == static_cast<float>(exact(function, 0.0)));
      // x * 0 at -inf is NaN, as PyTorch has it.
      const bool is_product = function == Activation::silu || function == Activation::gelu || function == Activation::gelu_tanh;
      SQC_CHECK(is_product ? std::isnan(y[1]) : y[1] == static_cast<float>(exact(function, -kInf)));
    }
  }
}

SQC_TEST(activation_tails) {
  Random random(71);
  for (const Activation function : kAll) {
    for (const std::int64_t k : {0, 1, 15, 16, 17, 50}) {
      // A gate: x and factor are halves of one row, and y takes the place of x.
      const Array<float> both(3 * 2 * k), y(3 * k);
      for (float& v : both) v = random.real(-5.0f, 5.0f);
      for (const bool with_factor : {false, true}) {
        ActivationParams params = {function, 3, k, both.data(), 2 * k, with_factor ? both.data() + k : nullptr, 2 * k,
                                   y.data(), k, nullptr};
        activation_scalar(params, 0, 3, nullptr);
        for (std::int64_t i = 0; i < y.size(); ++i) {
          const float* at = both.data() + i / k * 2 * k + i % k;
          const double expected = exact(function, at[0]) * (with_factor ? at[k] : 1.0f);
          SQC_CHECK(std::abs(y[i] - expected) <= 1e-6 * (1 + std::abs(expected)));
        }
        check_kernels(params, y);
      }
    }
  }
}

SQC_TEST(activation_quantizes_as_quantize_does_over_threads) {
  Random random(72);
  const std::int64_t m = 41, k = 600, k_padded = 608, groups = 5;
  const Array<float> x(m * 2 * k), y(m * k);
  for (float& v : x) v = random.real(-5.0f, 5.0f);
  struct Codes {
    Array<std::uint8_t> codes{m * k_padded};
    Array<float> scale{m * groups};
    Array<std::int32_t> zero_point{m}, sum{m * groups};
    QuantizeParams params(QuantizeMode mode, const float* from) const {
      const bool affine = mode == QuantizeMode::affine;
      return {mode, !affine, m, k, from, k, codes.data(), k_padded, k_padded, affine ? 0 : 128, affine ? 0 : 128,
              scale.data(), zero_point.data(), sum.data()};
    }
  };
  for (const QuantizeMode mode : {QuantizeMode::symmetric, QuantizeMode::affine}) {
    ActivationParams params = {Activation::silu, m, k, x.data(), 2 * k, x.data() + k, 2 * k, y.data(), k, nullptr};
    activation_scalar(params, 0, m, nullptr);
    const Codes expected;
    quantize_kernel(Isa::scalar).run(expected.params(mode, y.data()), 0, m);
    for (const int threads : {1, 2, 7}) {
      std::unique_ptr<ThreadPool> pool;
      SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
      for (const auto& kernel : activation_kernels()) {
        if (!isa_available(kernel.isa)) continue;
        for (const bool keep_y : {false, true}) {
          const Codes seen;
          const Array<float> kept(m * k);
          const QuantizeParams quantize = seen.params(mode, nullptr);
          params.quantize = &quantize;
          params.y = keep_y ? kept.data() : nullptr;
          const Array<float> scratch(activation_scratch_count(params) * threads);
          SQC_CHECK(activation(*pool, kernel, params, scratch.data()).is_ok());
          SQC_CHECK(same_bits(seen.codes, expected.codes) && same_bits(seen.scale, expected.scale) &&
                    same_bits(seen.sum, expected.sum) && same_bits(seen.zero_point, expected.zero_point));
          SQC_CHECK(!keep_y || same_bits(kept, y));
        }
      }
    }
  }
}

SQC_TEST(activation_refuses) {
  const Array<float> x(8), y(8);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const ActivationParams good = {Activation::silu, 2, 4, x.data(), 4, x.data(), 4, y.data(), 4, nullptr};
  const auto& kernel = activation_kernel(Isa::scalar);
  SQC_CHECK(activation(*pool, kernel, good, nullptr).is_ok());
  const auto refused = [&](auto change) {
    ActivationParams bad = good;
    change(bad);
    return activation(*pool, kernel, bad, nullptr).code() == StatusCode::kInvalidArgument;
  };
  QuantizeParams quantize = {};
  quantize.m = 2, quantize.k = 3, quantize.k_padded = quantize.code_stride = 3, quantize.mode = QuantizeMode::symmetric;
  SQC_CHECK(refused([](ActivationParams& p) { p.m = -1; }));
  SQC_CHECK(refused([](ActivationParams& p) { p.x_stride = 3; }));
  SQC_CHECK(refused([](ActivationParams& p) { p.factor_stride = 3; }));
  SQC_CHECK(refused([](ActivationParams& p) { p.y_stride = 3; }));
  SQC_CHECK(refused([](ActivationParams& p) { p.y = nullptr; }));
  SQC_CHECK(refused([&](ActivationParams& p) { p.quantize = &quantize; }));
}
