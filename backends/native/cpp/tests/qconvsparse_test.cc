// Every qconvsparse kernel against qconv with the dense weights, bit for bit, at all densities.

#include "kernels/qconvsparse/qconvsparse.h"
#include "tests/convolution_case.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::ConvolutionCase;
using sqc_tests::ConvolutionShape;
using sqc_tests::GuardedCopy;
using sqc_tests::Random;

namespace {

void check(const ConvolutionShape& s, double density, std::int64_t chunk, bool floats, bool adds, Random& random) {
  ConvolutionCase c(s, density, 1, floats, adds, random);
  std::vector<std::uint8_t> index;
  std::vector<std::int8_t> values;
  std::vector<std::uint64_t> start;
  for (std::int64_t first = 0; first < c.k; first += chunk) {
    const std::int64_t end = first + chunk < c.k ? first + chunk : c.k;
    for (std::int64_t n = 0; n < c.outputs; ++n) {
      start.push_back(index.size() / 4);
      for (std::int64_t plane = first; plane < end; ++plane) {
        if (c.weights[n * c.k + plane] == 0) continue;
        index.push_back(static_cast<std::uint8_t>(plane - first));
        values.push_back(c.weights[n * c.k + plane]);
      }
      while (index.size() % 4 != 0) {  // any plane
        index.push_back(static_cast<std::uint8_t>(end - first - 1));
        values.push_back(0);
      }
    }
  }
  start.push_back(index.size() / 4);
  const GuardedCopy<std::uint8_t> indices(index);
  const GuardedCopy<std::int8_t> weights(values);
  const GuardedCopy<std::uint64_t> starts(start);
  c.check(qconvsparse_kernels(), qconv_parts_scratch_bytes(c.params), [&](ThreadPool& pool, const auto& kernel, std::uint8_t* scratch) {
    return qconvsparse(pool, kernel, {c.params, chunk, indices.data(), weights.data(), starts.data()}, scratch);
  });
}

}  // namespace

SQC_TEST(qconvsparse_windows) {
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

SQC_TEST(qconvsparse_densities_and_sizes) {
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

SQC_TEST(qconvsparse_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const Array<float> y(16);
  const auto refused = [&](auto change) {
    QconvsparseParams p = {};
    p.dense.window = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    p.dense.groups = 1;
    p.dense.in_channels = p.dense.x_stride = 4;
    p.dense.out_channels = p.dense.y.stride = 16;
    p.dense.y.values = y.data();
    p.chunk = 1;
    change(p);
    return qconvsparse(*pool, qconvsparse_kernel(Isa::scalar), p, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QconvsparseParams& p) { p.chunk = 0; }));
  SQC_CHECK(refused([](QconvsparseParams& p) { p.chunk = 257; }));
  SQC_CHECK(refused([](QconvsparseParams& p) { p.dense.groups = 2; }));
  SQC_CHECK(refused([](QconvsparseParams& p) { p.dense.window.batch = -1; }));
}
