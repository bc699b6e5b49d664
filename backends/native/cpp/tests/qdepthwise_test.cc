// What qdepthwise refuses; its results are tested beside qconv's, which has the same definition.

#include "kernels/qdepthwise/qdepthwise.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;

SQC_TEST(qdepthwise_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  const Array<std::uint8_t> bytes(64);
  const auto refused = [&](auto change) {
    QdepthwiseParams p = {};
    p.window = {1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1};
    p.channels = 16;
    p.x_stride = 16;
    p.y.codes = bytes.data();
    p.y.stride = 16;
    change(p);
    return qdepthwise(*pool, qdepthwise_kernel(Isa::scalar), p, nullptr).code() == StatusCode::kInvalidArgument;
  };
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.channels = -1; }));
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.channels = 17; }));
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.window.dilation_w = 0; }));
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.window.kernel_h = kQdepthwiseMaxTaps + 1; }));
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.y.stride = 15; }));
  SQC_CHECK(refused([](QdepthwiseParams& p) { p.y.codes = nullptr; }));
  SQC_CHECK(refused([&](QdepthwiseParams& p) { p.y.other = bytes.data(), p.y.other_stride = 8; }));
}
