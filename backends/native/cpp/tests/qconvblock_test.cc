// Every qconvblock kernel against qconv with the dense weights, bit for bit, at all densities.

#include "kernels/qconvblock/qconvblock.h"
#include "kernels/qgemm/qgemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

std::int64_t up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Shape {
  std::int64_t batch, height, width, in, out, kernel, stride, pad, dilation, spread;
};

void check(const Shape& s, double density, std::int64_t chunk, bool floats, bool adds, Random& random) {
  const auto size = [&](std::int64_t in) {
    const std::int64_t room = (in - 1) * s.spread + 1 + 2 * s.pad - s.dilation * (s.kernel - 1) - 1;
    return room < 0 ? 0 : room / s.stride + 1;
  };
  QconvParams p = {};
  p.window = {s.batch,  s.height, s.width, size(s.height), size(s.width), s.kernel, s.kernel, s.stride,
              s.stride, s.pad,    s.pad,   s.dilation,     s.dilation,    s.spread, s.spread};
  p.groups = 1;
  p.in_channels = s.in;
  p.out_channels = s.out;
  const std::int64_t run = up(s.in, 4), k = p.window.taps() * run, outputs = up(s.out, 16), units = k / 4;
  p.x_stride = run;
  p.x_zero = 131;
  const Array<std::uint8_t> x(s.batch * s.height * s.width * run), other(p.window.rows() * outputs);
  for (std::uint8_t& v : x) v = static_cast<std::uint8_t>(random.integer(0, 255));
  for (std::uint8_t& v : other) v = static_cast<std::uint8_t>(random.integer(0, 255));
  const Array<std::int8_t> w(outputs * k), packed(qgemm_packed_bytes(s.out, k));
  for (std::int64_t i = 0; i < w.size(); i += 4) {
    const bool kept = i / k < s.out && random.chance(density);
    for (std::int64_t j = 0; j < 4; ++j) {
      const bool inside = (i % k) % run + j < s.in;
      w[i + j] = kept && inside ? static_cast<std::int8_t>(random.integer(-128, 127)) : std::int8_t{0};
    }
  }
  const Array<std::int32_t> sum(outputs), bias(outputs);
  SQC_CHECK(qgemm_pack(s.out, k, w.data(), packed.data(), sum.data()).is_ok());
  const Array<float> scale(outputs), offset(outputs);
  for (std::int32_t& v : bias) v = static_cast<std::int32_t>(random.integer(-1000, 1000));
  for (float& v : scale) v = random.real(0.0001f, 0.002f);
  for (float& v : offset) v = random.real(-1.0f, 1.0f);
  std::vector<std::uint8_t> index;
  std::vector<std::int8_t> values;
  std::vector<std::uint64_t> start;
  for (std::int64_t first = 0; first < units; first += chunk) {
    for (std::int64_t n = 0; n < outputs; ++n) {
      start.push_back(index.size());
      for (std::int64_t u = first; u < units && u < first + chunk; ++u) {
        const std::int8_t* block = w.data() + n * k + u * 4;
        if (block[0] == 0 && block[1] == 0 && block[2] == 0 && block[3] == 0) continue;
        index.push_back(static_cast<std::uint8_t>(u - first));
        values.insert(values.end(), block, block + 4);
      }
    }
  }
  start.push_back(index.size());
  // Copies that end at a page without access.
  const Array<std::uint8_t> index_copy(static_cast<std::int64_t>(index.size()));
  const Array<std::int8_t> values_copy(static_cast<std::int64_t>(values.size()));
  for (std::size_t i = 0; i < index.size(); ++i) index_copy[static_cast<std::int64_t>(i)] = index[i];
  for (std::size_t i = 0; i < values.size(); ++i) values_copy[static_cast<std::int64_t>(i)] = values[i];
  p.x = x.data();
  p.weights = packed.data();
  p.sum = sum.data();
  p.bias = bias.data();
  p.scale = scale.data();
  p.offset = offset.data();
  const std::int64_t count = p.window.rows() * (floats ? s.out : outputs);
  const Array<float> expected_values(floats ? count : 0), seen_values(floats ? count : 0);
  const Array<std::uint8_t> expected(floats ? 0 : count), seen(floats ? 0 : count);
  p.y.stride = floats ? s.out : outputs;
  p.y.low = floats ? -1e30f : -128.0f;
  p.y.high = floats ? 1e30f : 127.0f;
  p.y.zero = 128;
  p.y.own_scale = 0.7f;
  p.y.other_scale = 0.4f;
  p.y.other_zero = 100;
  p.y.sum_low = -128.0f;
  p.y.sum_high = 127.0f;
  if (adds) p.y.other = other.data(), p.y.other_stride = outputs;
  (floats ? p.y.values = expected_values.data() : nullptr);
  p.y.codes = floats ? nullptr : expected.data();
  std::unique_ptr<ThreadPool> one;
  SQC_CHECK(ThreadPool::create(1, &one).is_ok());
  const Array<std::uint8_t> dense_scratch(qconv_scratch_bytes(p));
  SQC_CHECK(qconv(*one, qconv_kernel(Isa::scalar), p, dense_scratch.data()).is_ok());
  p.weights = nullptr;
  (floats ? p.y.values = seen_values.data() : nullptr);
  p.y.codes = floats ? nullptr : seen.data();
  for (const int threads : {1, 3}) {
    std::unique_ptr<ThreadPool> pool;
    SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
    for (const auto& kernel : qconvblock_kernels()) {
      if (!isa_available(kernel.isa)) {
        sqc_tests::skip_kernel(kernel.name);
        continue;
      }
      sqc_tests::count_kernel(kernel.name);
      for (std::uint8_t& v : seen) v = 3;
      for (float& v : seen_values) v = 3.0f;
      const QconvblockParams params = {p, chunk, index_copy.data(), values_copy.data(), start.data()};
      const Array<std::uint8_t> scratch(qconvblock_scratch_bytes(p) * threads);
      SQC_CHECK(qconvblock(*pool, kernel, params, scratch.data()).is_ok());
      if (!same_bits(seen, expected) || !same_bits(seen_values, expected_values)) {
        sqc_tests::fail(__FILE__, __LINE__, "%s differs: %dx%d %d->%d kernel %d stride %d pad %d dilation %d spread %d density %.2f chunk %d",
                        kernel.name, static_cast<int>(s.height), static_cast<int>(s.width), static_cast<int>(s.in),
                        static_cast<int>(s.out), static_cast<int>(s.kernel), static_cast<int>(s.stride), static_cast<int>(s.pad),
                        static_cast<int>(s.dilation), static_cast<int>(s.spread), density, static_cast<int>(chunk));
      }
    }
  }
}

}  // namespace

SQC_TEST(qconvblock_windows) {
  Random random(61);
  for (const std::int64_t kernel : {1, 3}) {
    for (const std::int64_t stride : {1, 2}) {
      for (const std::int64_t pad : {0, 1, 2}) {
        for (const std::int64_t dilation : {1, 2}) {
          for (const std::int64_t spread : {1, 2}) {
            check({2, 6, 7, 9, 20, kernel, stride, pad, dilation, spread}, 0.3, 7, stride == 2, pad == 1 && stride == 1, random);
          }
        }
      }
    }
  }
}

SQC_TEST(qconvblock_densities_and_sizes) {
  Random random(62);
  for (const double density : {0.0, 0.02, 0.15, 0.5, 1.0}) {
    for (const std::int64_t in : {3, 4, 64, 70}) {
      for (const std::int64_t out : {1, 16, 300}) {
        check({1, 9, 9, in, out, 1, 1, 0, 1, 1}, density, 256, false, out == 16, random);
        check({1, 5, 5, in, out, 3, 1, 1, 1, 1}, density, 96, false, false, random);
      }
    }
  }
  check({1, 1, 1, 8, 40, 1, 1, 0, 1, 1}, 0.5, 256, false, true, random);
  check({0, 1, 1, 8, 40, 1, 1, 0, 1, 1}, 0.5, 256, false, true, random);
}

SQC_TEST(qconvblock_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const Array<float> y(16);
  const auto refused = [&](auto change) {
    QconvblockParams p = {};
    p.dense.window = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    p.dense.groups = 1;
    p.dense.in_channels = p.dense.x_stride = 4;
    p.dense.out_channels = p.dense.y.stride = 16;
    p.dense.y.values = y.data();
    p.chunk = 1;
    change(p);
    return qconvblock(*pool, qconvblock_kernel(Isa::scalar), p, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QconvblockParams& p) { p.chunk = 0; }));
  SQC_CHECK(refused([](QconvblockParams& p) { p.chunk = 257; }));
  SQC_CHECK(refused([](QconvblockParams& p) { p.dense.groups = 2; }));
  SQC_CHECK(refused([](QconvblockParams& p) { p.dense.window.batch = -1; }));
}
