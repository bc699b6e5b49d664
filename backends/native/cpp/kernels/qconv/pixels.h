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
  const std::int64_t units = run / 4;
  for (std::int64_t tap = 0; tap < taps; ++tap, pointers += kQconvRows, to += units * unit_pixels * 4) {
    for (std::int64_t first = 0; first < pixels; first += 16) {
      for (std::int64_t u = 0; u < units; u += 16) {
        const std::int64_t here = units - u < 16 ? units - u : 16;
        typename S::I32 v[16];
        for (int i = 0; i < 16; ++i) {
          const std::uint8_t* from = pointers[first + i] + u * 4;
          if (here == 16) {
            v[i] = S::load_i(reinterpret_cast<const std::int32_t*>(from));
            continue;
          }
          std::int32_t lanes[16] = {};
          std::memcpy(lanes, from, static_cast<std::size_t>(here) * 4);
          v[i] = S::load_i(lanes);
        }
        S::transpose(v);
        for (std::int64_t i = 0; i < here; ++i) {
          S::store_i(reinterpret_cast<std::int32_t*>(to + ((u + i) * unit_pixels + first) * 4), v[i]);
        }
      }
    }
  }
}

// Sums [output][Vectors x 16 pixels] of panels [begin, end) to the output, for the `rows` pixels that are there.
template <class S, int Vectors>
static SQC_INLINE void finish_strip(const QconvParams& p, const Requantizer<S>& requantizer, std::int64_t begin,
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
