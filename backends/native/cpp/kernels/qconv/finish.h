// From the sums of a convolution to its output: see qconv.h. Used by every kernel that ends in codes.

#ifndef SQC_KERNELS_QCONV_FINISH_H_
#define SQC_KERNELS_QCONV_FINISH_H_

#include "kernels/qconv/qconv.h"

namespace sqc {
namespace {

// What finish_codes needs of QconvOutput, in registers.
template <class S>
struct Requantizer {
  typename S::F32 low, high, own_scale, other_scale, sum_low, sum_high;
  typename S::I32 zero, other_zero;

  explicit SQC_INLINE Requantizer(const QconvOutput& y)
      : low(S::set_f(y.low)),
        high(S::set_f(y.high)),
        own_scale(S::set_f(y.own_scale)),
        other_scale(S::set_f(y.other_scale)),
        sum_low(S::set_f(y.sum_low)),
        sum_high(S::set_f(y.sum_high)),
        zero(S::set_i(y.zero)),
        other_zero(S::set_i(y.other_zero)) {}

  // Sixteen codes of values in steps. Bounds come before rounding, which changes nothing, since they are whole
  // numbers, and keeps lanes inside int32.
  SQC_INLINE typename S::I32 steps(typename S::F32 value) const { return S::round_i(S::min_f(S::max_f(value, low), high)); }
  SQC_INLINE typename S::I32 codes(typename S::F32 value) const { return S::add_i(steps(value), zero); }
  // The same with the codes of another image added.
  SQC_INLINE typename S::I32 codes(typename S::F32 value, typename S::I32 other) const {
    const auto added = S::mul_f(S::to_float(S::sub_i(other, other_zero)), other_scale);
    const auto total = S::fma_f(S::to_float(steps(value)), own_scale, added);
    return S::add_i(S::round_i(S::min_f(S::max_f(total, sum_low), sum_high)), zero);
  }
};

// Stores the first `count` of sixteen codes, by way of the table if there is one.
template <class S>
static SQC_INLINE void store_codes(std::uint8_t* to, std::int64_t count, typename S::I32 codes,
                                   const std::uint8_t* table) {
  if (count >= 16 && table == nullptr) {
    S::store_bytes(to, codes);
    return;
  }
  std::uint8_t bytes[16];
  S::store_bytes(bytes, codes);
  if (table != nullptr) {
    for (int i = 0; i < 16; ++i) bytes[i] = table[bytes[i]];
  }
  std::memcpy(to, bytes, static_cast<std::size_t>(count < 16 ? count : 16));
}

// Values of sixteen channels to y, `count` of which are wanted; there are 16 bytes of the other image to read.
template <class S, bool Adds>
static SQC_INLINE void finish_codes(const Requantizer<S>& requantizer, const QconvOutput& y, std::int64_t pixel,
                                    std::int64_t channel, std::int64_t count, typename S::F32 value) {
  typename S::I32 codes;
  if constexpr (Adds) {
    const std::uint8_t* other = y.other + pixel * y.other_stride + channel;
    std::uint8_t room[16] = {};
    if (count < 16) {
      std::memcpy(room, other, static_cast<std::size_t>(count));
      other = room;
    }
    codes = requantizer.codes(value, S::load_u8(other));
  } else {
    codes = requantizer.codes(value);
  }
  store_codes<S>(y.codes + pixel * y.stride + channel, count, codes, y.table);
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_FINISH_H_
