// A convolution with random data, and what qconv's scalar kernel makes of it: for families that compute the same from
// other forms of the weights. And the cases that each of them is tested with.

#ifndef SQC_TESTS_CONVOLUTION_CASE_H_
#define SQC_TESTS_CONVOLUTION_CASE_H_

#include <memory>
#include <vector>

#include "kernels/qconv/parts.h"
#include "kernels/qgemm/qgemm.h"
#include "tests/test.h"

namespace sqc_tests {

struct ConvolutionShape {
  std::int64_t batch, height, width, in, out, kernel, stride, pad, dilation, spread;
};

class ConvolutionCase {
 public:
  // `block` weights in a row are zero or not together. `adds`: another image is added.
  ConvolutionCase(const ConvolutionShape& s, double density, std::int64_t block, bool floats, bool adds, Random& random)
      : run((s.in + 3) / 4 * 4),
        k(s.kernel * s.kernel * run),
        outputs((s.out + 15) / 16 * 16),
        weights(outputs * k),
        shape_(s),
        density_(density),
        x_(s.batch * s.height * s.width * run),
        other_(s.batch * side(s.height) * side(s.width) * outputs),
        packed_(sqc::qgemm_packed_bytes(s.out, k)),
        sum_(outputs),
        bias_(outputs),
        scale_(outputs),
        offset_(outputs),
        table_(256),
        expected_values_(floats ? s.batch * side(s.height) * side(s.width) * s.out : 0),
        seen_values_(expected_values_.size()),
        expected_(floats ? 0 : other_.size()),
        seen_(expected_.size()) {
    fill(block, random);
    params = {};
    params.window = {s.batch,  s.height, s.width, side(s.height), side(s.width), s.kernel, s.kernel, s.stride,
                     s.stride, s.pad,    s.pad,   s.dilation,     s.dilation,    s.spread, s.spread};
    params.groups = 1;
    params.in_channels = s.in;
    params.out_channels = s.out;
    params.x = x_.data();
    params.x_stride = run;
    params.x_zero = 131;
    params.weights = packed_.data();
    params.sum = sum_.data();
    params.bias = bias_.data();
    params.scale = scale_.data();
    params.offset = offset_.data();
    params.y.stride = floats ? s.out : outputs;
    params.y.low = floats ? -1e30f : -128.0f;
    params.y.high = floats ? 1e30f : 127.0f;
    params.y.zero = 128;
    params.y.own_scale = 0.7f;
    params.y.other_scale = 0.4f;
    params.y.other_zero = 100;
    params.y.sum_low = -128.0f;
    params.y.sum_high = 127.0f;
    if (!floats && random.chance(0.5)) params.y.table = table_.data();
    if (adds) params.y.other = other_.data(), params.y.other_stride = outputs;
    params.y.values = floats ? expected_values_.data() : nullptr;
    params.y.codes = floats ? nullptr : expected_.data();
    std::unique_ptr<sqc::ThreadPool> one;
    SQC_CHECK(sqc::ThreadPool::create(1, &one).is_ok());
    const Array<std::uint8_t> scratch(sqc::qconv_scratch_bytes(params));
    SQC_CHECK(sqc::qconv(*one, sqc::qconv_kernel(sqc::Isa::scalar), params, scratch.data()).is_ok());
    params.weights = nullptr;
    params.y.values = floats ? seen_values_.data() : nullptr;
    params.y.codes = floats ? nullptr : seen_.data();
  }

  // Runs every kernel of a family by run(pool, kernel, scratch), with one thread and with several.
  template <class Kernels, class Run>
  void check(const Kernels& kernels, std::int64_t scratch_bytes, Run run) {
    for (const int threads : {1, 3}) {
      std::unique_ptr<sqc::ThreadPool> pool;
      SQC_CHECK(sqc::ThreadPool::create(threads, &pool).is_ok());
      for (const auto& kernel : kernels) {
        if (!sqc::isa_available(kernel.isa)) {
          skip_kernel(kernel.name);
          continue;
        }
        count_kernel(kernel.name);
        for (std::uint8_t& v : seen_) v = 3;
        for (float& v : seen_values_) v = 3.0f;
        const Array<std::uint8_t> scratch(scratch_bytes * threads);
        SQC_CHECK(run(*pool, kernel, scratch.data()).is_ok());
        if (same_bits(seen_, expected_) && same_bits(seen_values_, expected_values_)) continue;
        fail(__FILE__, __LINE__, "%s differs: %dx%d %d->%d kernel %d stride %d pad %d dilation %d spread %d density %.2f",
             kernel.name, static_cast<int>(shape_.height), static_cast<int>(shape_.width), static_cast<int>(shape_.in),
             static_cast<int>(shape_.out), static_cast<int>(shape_.kernel), static_cast<int>(shape_.stride),
             static_cast<int>(shape_.pad), static_cast<int>(shape_.dilation), static_cast<int>(shape_.spread), density_);
      }
    }
  }

  std::int64_t run, k, outputs;  // inputs in fours; a row of the weights; outputs in sixteens
  Array<std::int8_t> weights;    // [outputs][taps][run]
  sqc::QconvParams params;       // without weights

 private:
  std::int64_t side(std::int64_t in) const {
    const std::int64_t room = (in - 1) * shape_.spread + 1 + 2 * shape_.pad - shape_.dilation * (shape_.kernel - 1) - 1;
    return room < 0 ? 0 : room / shape_.stride + 1;
  }

  void fill(std::int64_t block, Random& random) {
    for (std::uint8_t& v : x_) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (std::uint8_t& v : other_) v = static_cast<std::uint8_t>(random.integer(0, 255));
    for (std::int64_t i = 0; i < weights.size(); i += block) {
      const bool kept = i / k < shape_.out && random.chance(density_);
      for (std::int64_t j = i; j < i + block; ++j) {
        const bool inside = j % k % run < shape_.in;
        weights[j] = kept && inside ? static_cast<std::int8_t>(random.integer(-128, 127)) : std::int8_t{0};
      }
    }
    SQC_CHECK(sqc::qgemm_pack(shape_.out, k, weights.data(), packed_.data(), sum_.data()).is_ok());
    for (std::int32_t& v : bias_) v = static_cast<std::int32_t>(random.integer(-1000, 1000));
    for (float& v : scale_) v = random.real(0.0001f, 0.002f);
    for (float& v : offset_) v = random.real(-1.0f, 1.0f);
    for (std::uint8_t& v : table_) v = static_cast<std::uint8_t>(random.integer(0, 255));
  }

  ConvolutionShape shape_;
  double density_;
  Array<std::uint8_t> x_, other_;
  Array<std::int8_t> packed_;
  Array<std::int32_t> sum_, bias_;
  Array<float> scale_, offset_;
  Array<std::uint8_t> table_;  // in half of the cases
  Array<float> expected_values_, seen_values_;
  Array<std::uint8_t> expected_, seen_;
};

// A copy that ends at a page without access.
template <typename T>
struct GuardedCopy : Array<T> {
  explicit GuardedCopy(const std::vector<T>& from) : Array<T>(static_cast<std::int64_t>(from.size())) {
    for (std::size_t i = 0; i < from.size(); ++i) (*this)[static_cast<std::int64_t>(i)] = from[i];
  }
};

// check(shape, density, chunk, floats, adds, random) is a family's: it packs the weights and compares.
template <class Check>
void check_windows(Check check) {
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

template <class Check>
void check_densities_and_sizes(Check check) {
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

template <class Kernel, class Params>
void check_refusals(sqc::Status (*run)(sqc::ThreadPool&, const Kernel&, const Params&, std::uint8_t*) noexcept,
                    const Kernel& kernel) {
  std::unique_ptr<sqc::ThreadPool> pool;
  SQC_CHECK(sqc::ThreadPool::create(1, &pool).is_ok());
  const Array<float> y(16);
  const auto refused = [&](auto change) {
    Params p = {};
    p.dense.window = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    p.dense.groups = 1;
    p.dense.in_channels = p.dense.x_stride = 4;
    p.dense.out_channels = p.dense.y.stride = 16;
    p.dense.y.values = y.data();
    p.chunk = 1;
    change(p);
    return run(*pool, kernel, p, nullptr).code() == sqc::StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](Params& p) { p.chunk = 0; }));
  SQC_CHECK(refused([](Params& p) { p.chunk = 257; }));
  SQC_CHECK(refused([](Params& p) { p.dense.in_channels = 0; }));
  SQC_CHECK(refused([](Params& p) { p.dense.groups = 2; }));
  SQC_CHECK(refused([](Params& p) { p.dense.window.batch = -1; }));
}

}  // namespace sqc_tests

#endif  // SQC_TESTS_CONVOLUTION_CASE_H_
