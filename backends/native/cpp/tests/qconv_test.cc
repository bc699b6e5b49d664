// Every qconv and qdepthwise kernel against plain loops over the definition in qconv.h, bit for bit: every stride,
// padding, dilation, spread and number of groups, at borders of guarded memory.

#include <cmath>

#include "kernels/qconv/qconv.h"
#include "kernels/qdepthwise/qdepthwise.h"
#include "kernels/qgemm/qgemm.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

std::int64_t up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

enum class Ending { floats, codes, sum, table, sum_and_table };

struct Shape {
  std::int64_t batch, height, width, groups, in, out;
  std::int64_t kernel_h, kernel_w, stride, pad, dilation, spread;
};

Window window_of(const Shape& s) {
  const auto size = [&](std::int64_t in, std::int64_t kernel) {
    const std::int64_t room = (in == 0 ? 0 : (in - 1) * s.spread + 1) + 2 * s.pad - s.dilation * (kernel - 1) - 1;
    return room < 0 ? 0 : room / s.stride + 1;
  };
  return {s.batch,    s.height, s.width, size(s.height, s.kernel_h), size(s.width, s.kernel_w), s.kernel_h,  s.kernel_w, s.stride,
          s.stride, s.pad,    s.pad,   s.dilation,                 s.dilation,                s.spread, s.spread};
}

// A convolution with everything that it reads and writes in memory of its own.
struct Problem {
  Problem(const Shape& shape, Ending ending_, bool extremes, std::int64_t more_stride, Random& random)
      : s(shape), window(window_of(shape)), depthwise(s.groups > 1 && s.in == 1 && s.out == 1), ending(ending_),
        run(depthwise ? 1 : up(s.in, 4)), outputs(depthwise ? up(s.groups, 16) : s.groups * up(s.out, 16)),
        channels(s.groups * s.out), x_stride((depthwise ? up(s.groups, 16) : s.groups * run) + more_stride),
        y_stride(ending == Ending::floats ? channels : up(channels, 16)), x(s.batch * s.height * s.width * x_stride),
        w(outputs * window.taps() * (depthwise ? 1 : s.in)), sum(outputs), bias(outputs), scale(outputs), offset(outputs),
        other(window.rows() * y_stride), table(256),
        packed(depthwise ? window.taps() * outputs : s.groups * qgemm_packed_bytes(s.out, window.taps() * run)),
        x_zero(static_cast<std::int32_t>(random.integer(0, 255))) {
    for (std::uint8_t& v : x) v = static_cast<std::uint8_t>(extremes ? 255 * random.integer(0, 1) : random.integer(0, 255));
    for (std::int8_t& v : w) v = static_cast<std::int8_t>(extremes ? random.integer(0, 1) * 255 - 128 : random.integer(-128, 127));
    for (std::int32_t& v : sum) v = 0;
    for (std::int32_t& v : bias) v = static_cast<std::int32_t>(random.integer(-100000, 100000));
    // Some results beyond the bounds, most inside.
    const float reach = 300.0f / (20000.0f * std::sqrt(static_cast<float>(window.taps() * s.in) + 1.0f));
    for (float& v : scale) v = random.real(0.2f * reach, reach);
    for (float& v : offset) v = random.real(-2.0f, 2.0f);
    for (std::uint8_t& v : other) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (std::uint8_t& v : table) v = static_cast<std::uint8_t>(random.integer(0, 255));
    pack();
  }

  // Weight of output n (of all groups) at a tap and input channel of its group.
  std::int8_t weight(std::int64_t n, std::int64_t tap, std::int64_t c) const {
    return w[(n * window.taps() + tap) * (depthwise ? 1 : s.in) + c];
  }
  // Where output n of all groups has its numbers.
  std::int64_t place(std::int64_t n) const { return depthwise ? n : n / s.out * up(s.out, 16) + n % s.out; }

  void pack() {
    if (depthwise) {
      for (std::int64_t n = 0; n < outputs; ++n) {
        for (std::int64_t t = 0; t < window.taps(); ++t) packed[t * outputs + n] = n < channels ? weight(n, t, 0) : std::int8_t{0};
      }
      return;
    }
    const std::int64_t k = window.taps() * run;
    for (std::int64_t g = 0; g < s.groups; ++g) {
      std::vector<std::int8_t> matrix(static_cast<std::size_t>(s.out * k));
      for (std::int64_t n = 0; n < s.out; ++n) {
        for (std::int64_t t = 0; t < window.taps(); ++t) {
          for (std::int64_t c = 0; c < s.in; ++c) matrix[static_cast<std::size_t>(n * k + t * run + c)] = weight(g * s.out + n, t, c);
        }
      }
      SQC_CHECK(qgemm_pack(s.out, k, matrix.data(), packed.data() + g * qgemm_packed_bytes(s.out, k), sum.data() + g * up(s.out, 16)).is_ok());
    }
  }

  QconvOutput output(const Array<float>* values, const Array<std::uint8_t>* codes) const {
    QconvOutput y = {};
    y.stride = y_stride;
    y.values = values == nullptr ? nullptr : values->data();
    y.codes = codes == nullptr ? nullptr : codes->data();
    y.zero = 100;
    y.low = -100.0f;
    y.high = 155.0f;
    if (ending == Ending::floats) y.low = -50.0f, y.high = 60.0f;
    if (ending == Ending::sum || ending == Ending::sum_and_table) {
      y.low = -128.0f;
      y.high = 127.0f;
      y.other = other.data();
      y.other_stride = y_stride;
      y.other_zero = 77;
      y.own_scale = 0.8f;
      y.other_scale = 0.61f;
      y.sum_low = 0.0f;
      y.sum_high = 155.0f;
    }
    if (ending == Ending::table || ending == Ending::sum_and_table) y.table = table.data();
    return y;
  }

  // By the definition. Bytes behind the channels stay as they are.
  void expected(const QconvOutput& y) const {
    for (std::int64_t m = 0; m < window.rows(); ++m) {
      const std::int64_t ox = m % window.out_w, oy = m / window.out_w % window.out_h, image = m / window.out_w / window.out_h;
      for (std::int64_t n = 0; n < channels; ++n) {
        std::int64_t total = bias[place(n)];
        for (std::int64_t t = 0; t < window.taps(); ++t) {
          const std::int64_t at_y = oy * s.stride - s.pad + t / s.kernel_w * s.dilation;
          const std::int64_t at_x = ox * s.stride - s.pad + t % s.kernel_w * s.dilation;
          const bool inside = at_y >= 0 && at_x >= 0 && at_y % s.spread == 0 && at_x % s.spread == 0 &&
                              at_y / s.spread < s.height && at_x / s.spread < s.width;
          for (std::int64_t c = 0; c < (depthwise ? 1 : s.in); ++c) {
            const std::int64_t channel = depthwise ? n : n / s.out * s.in + c;
            const std::int64_t pixel = (image * s.height + at_y / s.spread) * s.width + at_x / s.spread;
            total += (inside ? x[pixel * x_stride + channel] : x_zero) * weight(n, t, c);
          }
        }
        const float value = std::fmaf(static_cast<float>(static_cast<std::int32_t>(total)), scale[place(n)], offset[place(n)]);
        const float bounded = value < y.low ? y.low : value > y.high ? y.high : value;
        if (y.values != nullptr) {
          y.values[m * y_stride + n] = bounded;
          continue;
        }
        float code = std::nearbyint(bounded);
        if (y.other != nullptr) {
          const float added = static_cast<float>(y.other[m * y.other_stride + n] - y.other_zero) * y.other_scale;
          const float sum_value = std::fmaf(code, y.own_scale, added);
          code = std::nearbyint(sum_value < y.sum_low ? y.sum_low : sum_value > y.sum_high ? y.sum_high : sum_value);
        }
        const auto byte = static_cast<std::uint8_t>(static_cast<std::int32_t>(code) + y.zero);
        y.codes[m * y_stride + n] = y.table != nullptr ? y.table[byte] : byte;
      }
    }
  }

  template <class Params>
  void fill(Params* p) const {
    p->window = window;
    p->x = x.data();
    p->x_stride = x_stride;
    p->x_zero = x_zero;
    p->weights = packed.data();
    p->bias = bias.data();
    p->scale = scale.data();
    p->offset = offset.data();
  }

  Shape s;
  Window window;
  bool depthwise;
  Ending ending;
  std::int64_t run, outputs, channels, x_stride, y_stride;
  Array<std::uint8_t> x;
  Array<std::int8_t> w;
  Array<std::int32_t> sum, bias;
  Array<float> scale, offset;
  Array<std::uint8_t> other, table;
  Array<std::int8_t> packed;
  std::int32_t x_zero;
};

template <class T>
bool same_channels(const Problem& p, const Array<T>& a, const Array<T>& b) {
  for (std::int64_t m = 0; m < p.window.rows() && a.size() > 0; ++m) {
    if (std::memcmp(a.data() + m * p.y_stride, b.data() + m * p.y_stride, static_cast<std::size_t>(p.channels) * sizeof(T)) != 0) return false;
  }
  return true;
}

template <class Params, class Kernels, class Run, class Scratch>
void check_kernels(const Problem& p, Params params, const Kernels& kernels, Run run, Scratch scratch_bytes) {
  const bool floats = p.ending == Ending::floats;
  const std::int64_t count = p.window.rows() * p.y_stride;
  const Array<float> values(floats ? count : 0), wanted_values(floats ? count : 0);
  const Array<std::uint8_t> codes(floats ? 0 : count), wanted_codes(floats ? 0 : count);
  p.expected(p.output(floats ? &wanted_values : nullptr, floats ? nullptr : &wanted_codes));
  for (const int threads : {1, 3}) {
    std::unique_ptr<ThreadPool> pool;
    SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
    for (const auto& kernel : kernels) {
      if (!isa_available(kernel.isa)) {
        sqc_tests::skip_kernel(kernel.name);
        continue;
      }
      sqc_tests::count_kernel(kernel.name);
      params.y = p.output(floats ? &values : nullptr, floats ? nullptr : &codes);
      const Array<std::uint8_t> scratch(scratch_bytes(params) * threads);
      SQC_CHECK(run(*pool, kernel, params, scratch.data()).is_ok());
      if (!same_channels(p, values, wanted_values) || !same_channels(p, codes, wanted_codes)) {
        sqc_tests::fail(__FILE__, __LINE__, "%s differs: %dx%dx%d groups %d %d->%d kernel %dx%d stride %d pad %d dilation %d spread %d ending %d",
                        kernel.name, static_cast<int>(p.s.batch), static_cast<int>(p.s.height), static_cast<int>(p.s.width),
                        static_cast<int>(p.s.groups), static_cast<int>(p.s.in), static_cast<int>(p.s.out),
                        static_cast<int>(p.s.kernel_h), static_cast<int>(p.s.kernel_w), static_cast<int>(p.s.stride),
                        static_cast<int>(p.s.pad), static_cast<int>(p.s.dilation), static_cast<int>(p.s.spread),
                        static_cast<int>(p.ending));
      }
    }
  }
}

void check(const Problem& p) {
  if (p.depthwise) {
    QdepthwiseParams params = {};
    p.fill(&params);
    params.channels = p.s.groups;
    check_kernels(p, params, qdepthwise_kernels(), qdepthwise, qdepthwise_scratch_bytes);
    return;
  }
  QconvParams params = {};
  p.fill(&params);
  params.sum = p.sum.data();
  params.groups = p.s.groups;
  params.in_channels = p.s.in;
  params.out_channels = p.s.out;
  check_kernels(p, params, qconv_kernels(), qconv, qconv_scratch_bytes);
}

constexpr Ending kEndings[] = {Ending::floats, Ending::codes, Ending::sum, Ending::table, Ending::sum_and_table};

}  // namespace

SQC_TEST(qconv_windows) {
  Random random(21);
  int turn = 0;
  for (const std::int64_t kernel : {1, 2, 3, 5}) {
    for (const std::int64_t stride : {1, 2, 3}) {
      for (const std::int64_t pad : {-1, 0, 1, 2}) {
        for (const std::int64_t dilation : {1, 2}) {
          for (const std::int64_t spread : {1, 2, 3}) {
            const Ending ending = kEndings[turn++ % 5];
            check(Problem({2, 6, 9, 1, 5, 18, kernel, kernel, stride, pad, dilation, spread}, ending, false, 0, random));
            check(Problem({1, 7, 5, 19, 1, 1, kernel, kernel, stride, pad, dilation, spread}, ending, false, 16, random));
          }
        }
      }
    }
  }
}

SQC_TEST(qconv_channels_and_groups) {
  Random random(22);
  int turn = 0;
  for (const std::int64_t in : {1, 3, 4, 8, 17, 64}) {
    for (const std::int64_t out : {1, 15, 16, 33, 64, 90, 130}) {
      check(Problem({1, 4, 5, 1, in, out, 3, 2, 1, 1, 1, 1}, kEndings[turn++ % 5], false, in % 2 == 0 ? 0 : 12, random));
      check(Problem({3, 5, 5, 1, in, out, 1, 1, 1, 0, 1, 1}, kEndings[turn++ % 5], false, 0, random));
    }
  }
  for (const std::int64_t groups : {2, 3, 5}) {
    for (const std::int64_t in : {4, 8, 20}) {
      for (const std::int64_t out : {1, 4, 16, 21}) {
        check(Problem({1, 4, 5, groups, in, out, 3, 3, 2, 1, 1, 1}, kEndings[turn++ % 5], false, 0, random));
      }
    }
  }
  for (const std::int64_t channels : {2, 16, 31, 64, 100, 130}) {
    for (const Ending ending : kEndings) check(Problem({1, 9, 8, channels, 1, 1, 3, 3, 1, 1, 1, 1}, ending, false, 0, random));
  }
}

SQC_TEST(qconv_sizes) {
  Random random(23);
  for (const Ending ending : kEndings) {
    check(Problem({1, 1, 1, 1, 4, 16, 1, 1, 1, 0, 1, 1}, ending, true, 0, random));   // one pixel
    check(Problem({1, 1, 1, 1, 3, 5, 3, 3, 1, 1, 1, 1}, ending, true, 0, random));    // mostly border
    check(Problem({1, 1, 1, 20, 1, 1, 3, 3, 1, 1, 1, 1}, ending, true, 0, random));
    check(Problem({0, 5, 5, 1, 4, 16, 3, 3, 1, 1, 1, 1}, ending, false, 0, random));  // no image
    check(Problem({1, 0, 5, 1, 4, 16, 3, 3, 1, 1, 1, 1}, ending, false, 0, random));  // no pixels
    check(Problem({2, 13, 11, 1, 4, 70, 7, 7, 2, 0, 1, 1}, ending, true, 0, random)); // rows of the kernel adjoin
    check(Problem({1, 23, 24, 1, 36, 80, 3, 3, 1, 1, 1, 1}, ending, true, 0, random));
  }
}

SQC_TEST(qconv_largest_sums) {
  Random random(24);
  for (const int value : {-128, 127}) {
    Problem p({1, 1, 2, 1, kQgemmMaxK, 16, 1, 1, 1, 0, 1, 1}, Ending::floats, false, 0, random);
    for (std::uint8_t& v : p.x) v = 255;
    for (std::int8_t& v : p.w) v = static_cast<std::int8_t>(value);
    for (std::int32_t& v : p.bias) v = 0;
    p.pack();
    check(p);
  }
}

SQC_TEST(qconv_refuses) {
  Random random(25);
  const Problem p({1, 4, 4, 1, 4, 16, 3, 3, 1, 1, 1, 1}, Ending::codes, false, 0, random);
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const Array<std::uint8_t> codes(p.window.rows() * p.y_stride);
  const auto refused = [&](auto change) {
    QconvParams bad = {};
    p.fill(&bad);
    bad.sum = p.sum.data();
    bad.groups = 1;
    bad.in_channels = 4;
    bad.out_channels = 16;
    bad.y = p.output(nullptr, &codes);
    change(bad);
    return qconv(*pool, qconv_kernel(Isa::scalar), bad, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QconvParams& q) { q.window.batch = -1; }));
  SQC_CHECK(refused([](QconvParams& q) { q.window.kernel_h = 0; }));
  SQC_CHECK(refused([](QconvParams& q) { q.window.stride_w = 0; }));
  SQC_CHECK(refused([](QconvParams& q) { q.window.spread_h = 0; }));
  SQC_CHECK(refused([](QconvParams& q) { q.window.in_w = std::int64_t{1} << 40; }));
  SQC_CHECK(refused([](QconvParams& q) { q.groups = 0; }));
  SQC_CHECK(refused([](QconvParams& q) { q.groups = 2, q.in_channels = 2; }));
  SQC_CHECK(refused([](QconvParams& q) { q.in_channels = kQgemmMaxK; }));
  SQC_CHECK(refused([](QconvParams& q) { q.x_stride = 3; }));
  SQC_CHECK(refused([](QconvParams& q) { q.y.stride = 15; }));
  SQC_CHECK(refused([](QconvParams& q) { q.y.codes = nullptr; }));
}
