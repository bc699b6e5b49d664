// Every qconvblock kernel against qconv with the dense weights, bit for bit, at all densities.

#include "kernels/qconvblock/qconvblock.h"
#include "tests/convolution_case.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::ConvolutionCase;
using sqc_tests::ConvolutionShape;
using sqc_tests::GuardedCopy;
using sqc_tests::Random;

namespace {

void check(const ConvolutionShape& s, double density, std::int64_t chunk, bool floats, bool adds, Random& random) {
  ConvolutionCase c(s, density, 4, floats, adds, random);
  const std::int64_t units = c.k / 4;
  std::vector<std::uint8_t> index;
  std::vector<std::int8_t> values;
  std::vector<std::uint64_t> start;
  for (std::int64_t first = 0; first < units; first += chunk) {
    for (std::int64_t n = 0; n < c.outputs; ++n) {
      start.push_back(index.size());
      for (std::int64_t u = first; u < units && u < first + chunk; ++u) {
        const std::int8_t* block = c.weights.data() + n * c.k + u * 4;
        if (block[0] == 0 && block[1] == 0 && block[2] == 0 && block[3] == 0) continue;
        index.push_back(static_cast<std::uint8_t>(u - first));
        values.insert(values.end(), block, block + 4);
      }
    }
  }
  start.push_back(index.size());
  const GuardedCopy<std::uint8_t> indices(index);
  const GuardedCopy<std::int8_t> blocks(values);
  const GuardedCopy<std::uint64_t> starts(start);
  c.check(qconvblock_kernels(), qconv_parts_scratch_bytes(c.params), [&](ThreadPool& pool, const auto& kernel, std::uint8_t* scratch) {
    return qconvblock(pool, kernel, {c.params, chunk, indices.data(), blocks.data(), starts.data()}, scratch);
  });
}

}  // namespace

SQC_TEST(qconvblock_windows) { sqc_tests::check_windows(check); }

SQC_TEST(qconvblock_densities_and_sizes) { sqc_tests::check_densities_and_sizes(check); }

SQC_TEST(qconvblock_refuses) { sqc_tests::check_refusals(qconvblock, qconvblock_kernel(Isa::scalar)); }
