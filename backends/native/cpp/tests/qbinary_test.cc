// Every qbinary kernel against plain loops, bit for bit.

#include <cmath>

#include "kernels/qbinary/qbinary.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;
using sqc_tests::Random;

SQC_TEST(qbinary_kernels_agree) {
  Random random(41);
  for (const std::int64_t rows : {0, 1, 6, 2100}) {
    for (const std::int64_t columns : {0, 1, 15, 16, 17, 48}) {
      for (const std::int64_t rows_for_b : {1, 3}) {
        for (const QbinaryOperation operation : {QbinaryOperation::add, QbinaryOperation::mul}) {
          const Array<std::uint8_t> a(rows * columns), b((rows + rows_for_b - 1) / rows_for_b * columns), seen(a.size()), expected(a.size());
          for (std::uint8_t& v : a) v = static_cast<std::uint8_t>(random.integer(0, 255));
          for (std::uint8_t& v : b) v = static_cast<std::uint8_t>(random.integer(0, 255));
          QbinaryParams p = {operation, rows, columns, rows_for_b, a.data(), b.data(), seen.data(), 0, 0, 0, 0, 0, 0, 0};
          p.a_zero = 13;
          p.b_zero = 200;
          p.zero = 90;
          p.a_scale = operation == QbinaryOperation::add ? 0.73f : 0.011f;
          p.b_scale = 0.5f;
          p.low = -90.0f;
          p.high = 165.0f;
          for (std::int64_t i = 0; i < a.size(); ++i) {
            const int x = a[i] - p.a_zero, y = b[i / columns / rows_for_b * columns + i % columns] - p.b_zero;
            float value = operation == QbinaryOperation::add
                              ? std::fmaf(static_cast<float>(x), p.a_scale, static_cast<float>(y) * p.b_scale)
                              : static_cast<float>(x * y) * p.a_scale;
            value = value < p.low ? p.low : value > p.high ? p.high : value;
            expected[i] = static_cast<std::uint8_t>(static_cast<int>(std::nearbyint(value)) + p.zero);
          }
          for (const int threads : {1, 3}) {
            std::unique_ptr<ThreadPool> pool;
            SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
            for (const auto& kernel : qbinary_kernels()) {
              if (!isa_available(kernel.isa)) {
                sqc_tests::skip_kernel(kernel.name);
                continue;
              }
              sqc_tests::count_kernel(kernel.name);
              for (std::uint8_t& v : seen) v = 1;
              SQC_CHECK(qbinary(*pool, kernel, p).is_ok());
              SQC_CHECK(same_bits(seen, expected));
            }
          }
        }
      }
    }
  }
}

SQC_TEST(qbinary_refuses) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(1, &pool).is_ok());
  QbinaryParams p = {QbinaryOperation::add, -1, 1, 1, nullptr, nullptr, nullptr, 0, 0, 0, 0, 0, 0, 0};
  SQC_CHECK(!qbinary(*pool, qbinary_kernel(Isa::scalar), p).is_ok());
  p.rows = 1;
  p.rows_for_b = 0;
  SQC_CHECK(!qbinary(*pool, qbinary_kernel(Isa::scalar), p).is_ok());
}
