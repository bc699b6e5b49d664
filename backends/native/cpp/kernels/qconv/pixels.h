// Convolutions with pixels in the lanes of registers: what 64 output pixels see, and the way back to the output. For
// the families whose weights are taken one by one, not in panels.

#ifndef SQC_KERNELS_QCONV_PIXELS_H_
#define SQC_KERNELS_QCONV_PIXELS_H_

#include "kernels/qconv/finish_panel.h"
#include "kernels/qconv/qconv.h"

namespace sqc {
namespace {

// Pointers of output pixels [m, m + rows) at each tap, and of `pixels` in all to zeros behind them.
static inline void point_at_pixels(const QconvParams& p, const std::uint8_t* zeros, std::int64_t m, std::int64_t rows,
                                   std::int64_t pixels, const std::uint8_t** pointers) {
  point_at_taps(p.window, p.x, p.x_stride, zeros, m, rows, kQconvRows, pointers);
  for (std::int64_t tap = 0; tap < p.window.taps(); ++tap) {
    for (std::int64_t r = rows; r < pixels; ++r) pointers[tap * kQconvRows + r] = zeros;
  }
}

// What `pixels` output pixels see, sixteen at a time: to[unit][pixel][4], units of `unit_pixels`.
template <class S>
static void interleave_pixels(std::int64_t taps, std::int64_t run, std::int64_t pixels, std::int64_t unit_pixels,
                              const std::uint8_t* const* pointers, std::uint8_t* to) {
  const std::int64_t unit = unit_pixels * 4;
  for (std::int64_t tap = 0; tap < taps; ++tap, pointers += kQconvRows, to += run / 4 * unit) {
    for (std::int64_t first = 0; first < pixels; first += 16) {
      std::uint8_t* at = to + first * 4;
      std::int64_t channel = 0;
      for (; channel + 16 <= run; channel += 16) {
        typename S::I32 v[4];
        S::load_columns(pointers + first, channel, v);
        SQC_UNROLL for (int i = 0; i < 4; ++i, at += unit) S::store_i(reinterpret_cast<std::int32_t*>(at), v[i]);
      }
      for (; channel < run; channel += 4, at += unit) {
        for (int i = 0; i < 16; ++i) std::memcpy(at + i * 4, pointers[first + i] + channel, 4);
      }
    }
  }
}

// Codes of a panel of 16 outputs for up to 64 pixels, by output: [vector][output][16 pixels].
struct PanelCodes {
  alignas(64) std::uint8_t codes[kQconvRows / 16][16][16];
};

// The other image's codes of a panel, for the `rows` pixels that are there.
template <class S>
static SQC_INLINE void take_others(const QconvOutput& y, std::int64_t panel, std::int64_t m, std::int64_t rows,
                                   PanelCodes* others) {
  const std::uint8_t* from = y.other + m * y.other_stride + panel * 16;
  for (std::int64_t v = 0; v * 16 < rows; ++v, from += 16 * y.other_stride) {
    std::uint8_t(*to)[16] = others->codes[v];
    if (rows - v * 16 >= 16) {
      S::transpose_bytes(from, y.other_stride, to[0], 16);
      continue;
    }
    for (std::int64_t r = 0; r < rows - v * 16; ++r) {
      for (int i = 0; i < 16; ++i) to[i][r] = from[r * y.other_stride + i];
    }
  }
}

// Sums of one output for Vectors x 16 pixels to its codes.
template <class S, int Vectors>
static SQC_INLINE void finish_output(const QconvParams& p, const Requantizer<S>& requantizer, std::int64_t output,
                                     const typename S::I32* sums, const PanelCodes* others, PanelCodes* to) {
  auto bias = S::set_i(p.bias[output]);
  if constexpr (S::kActOffset != 0) bias = S::add_i(bias, S::mul_i(S::set_i(p.sum[output]), S::set_i(S::kActOffset)));
  const auto scale = S::set_f(p.scale[output]), offset = S::set_f(p.offset[output]);
  SQC_UNROLL for (int v = 0; v < Vectors; ++v) {
    const auto value = S::fma_f(S::to_float(S::add_i(sums[v], bias)), scale, offset);
    const auto codes = others == nullptr ? requantizer.codes(value)
                                         : requantizer.codes(value, S::load_u8(others->codes[v][output % 16]));
    S::store_bytes(to->codes[v][output % 16], codes);
  }
}

// Codes of a panel to the output, by way of the table if there is one, for the `rows` pixels that are there.
template <class S>
static SQC_INLINE void give_codes(const QconvOutput& y, std::int64_t panel, std::int64_t m, std::int64_t rows,
                                  PanelCodes* from) {
  std::uint8_t* to = y.codes + m * y.stride + panel * 16;
  for (std::int64_t v = 0; v * 16 < rows; ++v, to += 16 * y.stride) {
    std::uint8_t(*codes)[16] = from->codes[v];
    if (y.table != nullptr) {
      for (int i = 0; i < 16; ++i) {
        for (int r = 0; r < 16; ++r) codes[i][r] = y.table[codes[i][r]];
      }
    }
    if (rows - v * 16 >= 16) {
      S::transpose_bytes(codes[0], 16, to, y.stride);
      continue;
    }
    for (std::int64_t r = 0; r < rows - v * 16; ++r) {
      for (int i = 0; i < 16; ++i) to[r * y.stride + i] = codes[i][r];
    }
  }
}

// Sums [output][Vectors x 16 pixels] of panels [begin, end) to values, for the `rows` pixels that are there.
template <class S, int Vectors>
static SQC_INLINE void finish_values(const QconvParams& p, const Requantizer<S>& requantizer, std::int64_t begin,
                                     std::int64_t end, std::int64_t m, std::int64_t rows, const std::int32_t* sums) {
  constexpr std::int64_t kPixels = Vectors * 16;
  for (std::int64_t panel = begin; panel < end; ++panel) {
    const std::int32_t* of_panel = sums + (panel - begin) * 16 * kPixels;
    for (std::int64_t r = 0; r < rows; r += 16) {
      typename S::I32 v[16];
      for (int i = 0; i < 16; ++i) v[i] = S::load_i(of_panel + i * kPixels + r);
      S::transpose(v);
      std::int32_t ordered[16][16];
      for (int i = 0; i < 16; ++i) S::store_i(ordered[i], v[i]);
      finish_panel<S>(p, requantizer, 0, panel, m + r, rows - r < 16 ? rows - r : 16, ordered[0], 16);
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_PIXELS_H_
