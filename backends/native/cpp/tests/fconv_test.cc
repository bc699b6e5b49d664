// Every fconv kernel against plain loops over its definition, bit for bit.

#include <cmath>
#include <limits>

#include "kernels/fconv/fconv.h"
#include "kernels/fgemm/fgemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

struct Shape {
  std::int64_t batch, height, width, groups, in, out, kernel_h, kernel_w, stride, pad, dilation, spread;
};

void check(const Shape& s, bool with_bias, bool depthwise, Random& random) {
  const auto size = [&](std::int64_t in, std::int64_t kernel) {
    const std::int64_t room = (in == 0 ? 0 : (in - 1) * s.spread + 1) + 2 * s.pad - s.dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / s.stride + 1;
  };
  FconvParams p = {};
  p.window = {s.batch,  s.height, s.width, size(s.height, s.kernel_h), size(s.width, s.kernel_w), s.kernel_h, s.kernel_w, s.stride,
              s.stride, s.pad,    s.pad,   s.dilation,                 s.dilation,                s.spread,   s.spread};
  p.groups = s.groups;
  p.in_channels = s.in;
  p.out_channels = s.out;
  p.depthwise = depthwise;
  const std::int64_t taps = p.window.taps(), channels = s.groups * s.out, panels = (s.out + 15) / 16 * 16;
  p.x_stride = s.groups * s.in;
  p.y_stride = channels;
  const Array<float> x(s.batch * s.height * s.width * p.x_stride), w(channels * taps * s.in), bias(depthwise ? channels : s.groups * panels);
  for (float& v : x) v = random.real(-1.0f, 1.0f);
  for (float& v : w) v = random.real(-1.0f, 1.0f);
  for (float& v : bias) v = random.real(-1.0f, 1.0f);
  const std::int64_t group_floats = fgemm_packed_bytes(s.out, taps * s.in, FgemmType::f32) / 4;
  const Array<float> packed(depthwise ? channels * taps : s.groups * group_floats);
  for (std::int64_t g = 0; g < s.groups; ++g) {
    if (depthwise) {
      for (std::int64_t t = 0; t < taps; ++t) packed[t * channels + g] = w[g * taps + t];
    } else {
      SQC_CHECK(fgemm_pack(s.out, taps * s.in, w.data() + g * s.out * taps * s.in, taps * s.in, 1, FgemmType::f32,
                           packed.data() + g * group_floats).is_ok());
    }
  }
  p.x = x.data();
  p.weights = packed.data();
  p.bias = with_bias ? bias.data() : nullptr;
  p.low = with_bias ? -1.5f : -std::numeric_limits<float>::infinity();
  p.high = with_bias ? 2.0f : std::numeric_limits<float>::infinity();
  const Array<float> expected(p.window.rows() * channels), seen(expected.size());
  for (std::int64_t m = 0; m < p.window.rows(); ++m) {
    const std::int64_t ox = m % p.window.out_w, oy = m / p.window.out_w % p.window.out_h, image = m / p.window.out_w / p.window.out_h;
    for (std::int64_t n = 0; n < channels; ++n) {
      float total = 0.0f;
      for (std::int64_t t = 0; t < taps; ++t) {
        const std::int64_t y = oy * s.stride - s.pad + t / s.kernel_w * s.dilation, z = ox * s.stride - s.pad + t % s.kernel_w * s.dilation;
        const bool inside = y >= 0 && z >= 0 && y % s.spread == 0 && z % s.spread == 0 && y / s.spread < s.height && z / s.spread < s.width;
        for (std::int64_t c = 0; c < s.in; ++c) {
          const std::int64_t pixel = (image * s.height + y / s.spread) * s.width + z / s.spread;
          total = std::fmaf(inside ? x[pixel * p.x_stride + n / s.out * s.in + c] : 0.0f, w[(n * taps + t) * s.in + c], total);
        }
      }
      if (with_bias) total += bias[depthwise ? n : n / s.out * panels + n % s.out];
      expected[m * channels + n] = total < p.low ? p.low : total > p.high ? p.high : total;
    }
  }
  p.y = seen.data();
  for (const int threads : {1, 3}) {
    std::unique_ptr<ThreadPool> pool;
    SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
    for (const auto& kernel : fconv_kernels()) {
      if (!isa_available(kernel.isa)) {
        sqc_tests::skip_kernel(kernel.name);
        continue;
      }
      sqc_tests::count_kernel(kernel.name);
      for (float& v : seen) v = -7.0f;
      const Array<std::uint8_t> scratch(fconv_scratch_bytes(p) * threads);
      SQC_CHECK(fconv(*pool, kernel, p, scratch.data()).is_ok());
      if (!same_bits(seen, expected)) {
        sqc_tests::fail(__FILE__, __LINE__, "%s differs: %dx%d groups %d %d->%d kernel %d stride %d pad %d dilation %d spread %d",
                        kernel.name, static_cast<int>(s.height), static_cast<int>(s.width), static_cast<int>(s.groups),
                        static_cast<int>(s.in), static_cast<int>(s.out), static_cast<int>(s.kernel_h), static_cast<int>(s.stride),
                        static_cast<int>(s.pad), static_cast<int>(s.dilation), static_cast<int>(s.spread));
      }
    }
  }
}

}  // namespace

SQC_TEST(fconv_windows) {
  Random random(31);
  for (const std::int64_t kernel : {1, 2, 3}) {
    for (const std::int64_t stride : {1, 2}) {
      for (const std::int64_t pad : {-1, 0, 1, 2}) {
        for (const std::int64_t dilation : {1, 2}) {
          for (const std::int64_t spread : {1, 2}) {
            check({2, 6, 5, 1, 3, 18, kernel, kernel, stride, pad, dilation, spread}, stride == 1, false, random);
            check({1, 7, 5, 21, 1, 1, kernel, kernel, stride, pad, dilation, spread}, stride == 1, true, random);
          }
        }
      }
    }
  }
}

SQC_TEST(fconv_channels_and_groups) {
  Random random(32);
  for (const std::int64_t in : {1, 4, 9}) {
    for (const std::int64_t out : {1, 16, 33, 70}) {
      for (const std::int64_t groups : {1, 2, 3}) check({1, 5, 6, groups, in, out, 3, 2, 1, 1, 1, 1}, out % 2 == 0, false, random);
    }
  }
  check({0, 5, 5, 1, 4, 16, 3, 3, 1, 1, 1, 1}, true, false, random);
  check({1, 1, 1, 1, 4, 16, 1, 1, 1, 0, 1, 1}, true, false, random);
  check({1, 20, 20, 1, 8, 64, 3, 3, 1, 1, 1, 1}, true, false, random);
}

SQC_TEST(fconv_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const auto refused = [&](auto change) {
    FconvParams p = {};
    p.window = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    p.groups = p.in_channels = p.out_channels = p.x_stride = p.y_stride = 1;
    change(p);
    return fconv(*pool, fconv_kernel(Isa::scalar), p, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](FconvParams& p) { p.window.out_h = -1; }));
  SQC_CHECK(refused([](FconvParams& p) { p.groups = 0; }));
  SQC_CHECK(refused([](FconvParams& p) { p.groups = 2; }));
  SQC_CHECK(refused([](FconvParams& p) { p.out_channels = 2; }));
  SQC_CHECK(refused([](FconvParams& p) { p.depthwise = true, p.in_channels = 0; }));
}
