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

SQC_TEST(qconvsparse_windows) { sqc_tests::check_windows(check); }

SQC_TEST(qconvsparse_densities_and_sizes) { sqc_tests::check_densities_and_sizes(check); }

SQC_TEST(qconvsparse_refuses) { sqc_tests::check_refusals(qconvsparse, qconvsparse_kernel(Isa::scalar)); }
