// The algorithm of every qbinary kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QBINARY_GENERIC_H_
#define SQC_KERNELS_QBINARY_GENERIC_H_

#include "kernels/qbinary/qbinary.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {

template <class S, QbinaryOperation Operation>
static SQC_INLINE typename S::I32 combine(const QbinaryParams& p, typename S::I32 a, typename S::I32 b) {
  a = S::sub_i(a, S::set_i(p.a_zero));
  b = S::sub_i(b, S::set_i(p.b_zero));
  typename S::F32 value;
  if constexpr (Operation == QbinaryOperation::add) {
    value = S::fma_f(S::to_float(a), S::set_f(p.a_scale), S::mul_f(S::to_float(b), S::set_f(p.b_scale)));
  } else {
    value = S::mul_f(S::to_float(S::mul_i(a, b)), S::set_f(p.a_scale));
  }
  return S::add_i(S::round_i(S::min_f(S::max_f(value, S::set_f(p.low)), S::set_f(p.high))), S::set_i(p.zero));
}

template <class S, QbinaryOperation Operation>
static void combine_bytes(const QbinaryParams& p, const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* y,
                          std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 16 <= count; i += 16) S::store_bytes(y + i, combine<S, Operation>(p, S::load_u8(a + i), S::load_u8(b + i)));
  if (i == count) return;
  std::uint8_t room[3][16] = {};
  const auto left = static_cast<std::size_t>(count - i);
  std::memcpy(room[0], a + i, left);
  std::memcpy(room[1], b + i, left);
  S::store_bytes(room[2], combine<S, Operation>(p, S::load_u8(room[0]), S::load_u8(room[1])));
  std::memcpy(y + i, room[2], left);
}

template <class S, QbinaryOperation Operation>
static void combine_rows(const QbinaryParams& p, std::int64_t begin, std::int64_t end) {
  if (p.rows_for_b == 1) {
    const std::int64_t from = begin * p.columns;
    combine_bytes<S, Operation>(p, p.a + from, p.b + from, p.y + from, (end - begin) * p.columns);
    return;
  }
  for (std::int64_t row = begin; row < end; ++row) {
    combine_bytes<S, Operation>(p, p.a + row * p.columns, p.b + row / p.rows_for_b * p.columns, p.y + row * p.columns,
                                p.columns);
  }
}

template <class S>
static void qbinary_generic(const QbinaryParams& p, std::int64_t begin, std::int64_t end) {
  if (p.operation == QbinaryOperation::add) {
    combine_rows<S, QbinaryOperation::add>(p, begin, end);
  } else {
    combine_rows<S, QbinaryOperation::mul>(p, begin, end);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QBINARY_GENERIC_H_
