// From sums of a panel of 16 outputs to the output of a convolution; see qconv.h.

#ifndef SQC_KERNELS_QCONV_FINISH_PANEL_H_
#define SQC_KERNELS_QCONV_FINISH_PANEL_H_

#include "kernels/epilogue.h"
#include "kernels/qconv/finish.h"

namespace sqc {
namespace {

// Sums of one output panel for `rows` rows, to y.
template <class S, bool Adds>
static SQC_INLINE void finish_panel_codes(const QconvParams& p, const Requantizer<S>& requantizer, std::int64_t channel,
                                          std::int64_t count, std::int64_t m, std::int64_t rows, const std::int32_t* sums,
                                          std::int64_t sum_stride, typename S::I32 bias, typename S::F32 scale,
                                          typename S::F32 offset) {
  for (std::int64_t r = 0; r < rows; ++r, sums += sum_stride) {
    const auto value = S::fma_f(S::to_float(S::add_i(S::load_i(sums), bias)), scale, offset);
    finish_codes<S, Adds>(requantizer, p.y, m + r, channel, count, value);
  }
}

template <class S>
static SQC_INLINE void finish_panel(const QconvParams& p, const Requantizer<S>& requantizer, std::int64_t group,
                                    std::int64_t panel, std::int64_t m, std::int64_t rows, const std::int32_t* sums,
                                    std::int64_t sum_stride) {
  const std::int64_t channel = group * p.out_channels + panel * 16, left = p.out_channels - panel * 16;
  const std::int64_t packed = (group * ((p.out_channels + 15) / 16) + panel) * 16;
  auto bias = S::load_i(p.bias + packed);
  if constexpr (S::kActOffset != 0) {
    bias = S::add_i(bias, S::mul_i(S::load_i(p.sum + packed), S::set_i(S::kActOffset)));
  }
  const auto scale = S::load_f(p.scale + packed), offset = S::load_f(p.offset + packed);
  const QconvOutput& y = p.y;
  if (y.values != nullptr) {
    for (std::int64_t r = 0; r < rows; ++r, sums += sum_stride) {
      const auto value = S::fma_f(S::to_float(S::add_i(S::load_i(sums), bias)), scale, offset);
      store_clamped<S>(y.values + (m + r) * y.stride + channel, left, value, requantizer.low, requantizer.high);
    }
    return;
  }
  // Of one group the channels behind the last one are written too; their weights are zero.
  const std::int64_t count = p.groups == 1 ? 16 : left;
  if (y.other != nullptr) {
    finish_panel_codes<S, true>(p, requantizer, channel, count, m, rows, sums, sum_stride, bias, scale, offset);
  } else {
    finish_panel_codes<S, false>(p, requantizer, channel, count, m, rows, sums, sum_stride, bias, scale, offset);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_FINISH_PANEL_H_
