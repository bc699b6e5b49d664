// Every qimage kernel against plain loops, bit for bit: planes and pixels, few channels and many, with borders.

#include <cmath>

#include "kernels/qimage/qimage.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

namespace {

void check(std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, std::int64_t pixel,
           std::int64_t border, bool planes, Random& random, std::int64_t taps = 1, std::int64_t step = 1) {
  const Array<float> x(batch * channels * height * width);
  for (float& v : x) v = static_cast<float>(random.integer(-40, 40)) * 0.125f;  // with ties
  QimageParams p = {};
  p.batch = batch;
  p.channels = channels;
  p.height = height;
  p.width = width;
  p.x = x.data();
  p.batch_stride = channels * height * width;
  p.channel_stride = planes ? height * width : 1;
  p.row_stride = planes ? width : width * channels;
  p.column_stride = planes ? 1 : channels;
  p.scale = 0.25f;
  p.zero = 9;
  p.low = -9.0f;
  p.high = 8.0f;
  p.pixel = pixel;
  p.top = border;
  p.left = 2 * border;
  p.bottom = border;
  p.right = border;
  p.taps = taps;
  p.step = step;
  const std::int64_t rows = height + 2 * border, columns = p.columns();
  const Array<std::uint8_t> seen(batch * rows * columns * pixel), expected(seen.size());
  for (std::int64_t i = 0; i < expected.size(); ++i) {
    const std::int64_t tap = i % pixel / channels, c = i % pixel % channels;
    const std::int64_t w = i / pixel % columns * step + tap - p.left, h = i / pixel / columns % rows - p.top, n = i / pixel / columns / rows;
    float value = 0.0f;
    if (tap < taps && w >= 0 && w < width && h >= 0 && h < height) {
      value = x[n * p.batch_stride + c * p.channel_stride + h * p.row_stride + w * p.column_stride] / p.scale;
    }
    value = value < p.low ? p.low : value > p.high ? p.high : value;
    expected[i] = static_cast<std::uint8_t>(static_cast<int>(std::nearbyint(value)) + p.zero);
  }
  p.y = seen.data();
  for (const int threads : {1, 2}) {
    std::unique_ptr<ThreadPool> pool;
    SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
    for (const auto& kernel : qimage_kernels()) {
      if (!isa_available(kernel.isa)) {
        sqc_tests::skip_kernel(kernel.name);
        continue;
      }
      sqc_tests::count_kernel(kernel.name);
      for (std::uint8_t& v : seen) v = 77;
      SQC_CHECK(qimage(*pool, kernel, p).is_ok());
      SQC_CHECK(same_bits(seen, expected));
    }
  }
}

}  // namespace

SQC_TEST(qimage_kernels_agree) {
  Random random(51);
  for (const bool planes : {true, false}) {
    for (const std::int64_t channels : {1, 3, 4, 16, 21, 40}) {
      for (const std::int64_t width : {1, 7, 16, 35}) {
        for (const std::int64_t border : {0, 1, 3}) {
          const std::int64_t pixel = channels <= 4 ? 4 : (channels + 15) / 16 * 16;
          check(2, channels, 3, width, pixel, border, planes, random);
          if (channels <= 4) check(1, channels, 2, width, 16, border, planes, random);
        }
      }
    }
    check(0, 3, 3, 3, 4, 1, planes, random);
    check(1, 3, 0, 3, 4, 1, planes, random);
    check(1, 3, 200, 40, 4, 0, planes, random);
  }
}

SQC_TEST(qimage_several_columns_a_pixel) {
  Random random(52);
  for (const std::int64_t channels : {1, 2, 3}) {
    for (const std::int64_t taps : {1, 2, 3, 4, 7}) {
      for (const std::int64_t step : {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, kQimageMaxStep}) {
        for (const std::int64_t width : {1, 10, 40, 300}) {
          for (const std::int64_t border : {0, 1, 3}) {
            check(2, channels, 3, width, (channels * taps + 3) / 4 * 4, border, width % 3 == 1, random, taps, step);
          }
        }
      }
    }
  }
  check(1, 1, 200, 120, 4, 1, true, random, 3, 1);
  check(1, 4, 2, 90, kQimageTapBytes, 1, false, random, 16, 2);
}

SQC_TEST(qimage_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  QimageParams p = {};
  p.taps = p.step = 1;
  p.channels = 5;
  p.pixel = 4;
  SQC_CHECK(!qimage(*pool, qimage_kernel(Isa::scalar), p).is_ok());
  p.channels = 4;
  p.left = -1;
  SQC_CHECK(!qimage(*pool, qimage_kernel(Isa::scalar), p).is_ok());
  p.left = 0;
  p.pixel = 1024;
  for (const std::int64_t taps : {std::int64_t{0}, kQimageTapBytes / 4 + 1, std::int64_t{1} << 62}) {
    p.taps = taps;
    SQC_CHECK(!qimage(*pool, qimage_kernel(Isa::scalar), p).is_ok());
  }
  p.taps = 2;
  p.step = kQimageMaxStep + 1;
  SQC_CHECK(!qimage(*pool, qimage_kernel(Isa::scalar), p).is_ok());
}
