// The algorithm of every qimage kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QIMAGE_GENERIC_H_
#define SQC_KERNELS_QIMAGE_GENERIC_H_

#include "kernels/qimage/qimage.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {

// Up to sixteen values at a distance of `stride`, zeros behind them.
template <class S>
static SQC_INLINE typename S::F32 load_strided(const float* x, std::int64_t stride, std::int64_t count) {
  if (count >= 16 && stride == 1) return S::load_f(x);
  float lanes[16] = {};
  for (std::int64_t i = 0; i < count && i < 16; ++i) lanes[i] = x[i * stride];
  return S::load_f(lanes);
}

template <class S>
struct Quantizer {
  typename S::F32 scale, low, high;
  typename S::I32 zero;

  explicit SQC_INLINE Quantizer(const QimageParams& p)
      : scale(S::set_f(p.scale)), low(S::set_f(p.low)), high(S::set_f(p.high)), zero(S::set_i(p.zero)) {}
  SQC_INLINE typename S::I32 codes(typename S::F32 x) const {
    return S::add_i(S::round_i(S::min_f(S::max_f(S::div_f(x, scale), low), high)), zero);
  }
};

// Channels beside each other in memory.
template <class S>
static void quantize_pixels(const QimageParams& p, const Quantizer<S>& quantizer, const float* x, std::uint8_t* y) {
  for (std::int64_t w = 0; w < p.width; ++w, x += p.column_stride, y += p.pixel) {
    for (std::int64_t c = 0; c < p.channels; c += 16) {
      std::uint8_t bytes[16];
      S::store_bytes(bytes, quantizer.codes(load_strided<S>(x + c, 1, p.channels - c)));
      std::memcpy(y + c, bytes, static_cast<std::size_t>(p.channels - c < 16 ? p.channels - c : 16));
    }
  }
}

// At most four channels a pixel: sixteen pixels are one vector.
template <class S>
static void quantize_fours(const QimageParams& p, const Quantizer<S>& quantizer, const float* x, std::uint8_t* y) {
  for (std::int64_t w = 0; w < p.width; w += 16) {
    const std::int64_t left = p.width - w;
    auto pixels = S::set_i(0);
    for (std::int64_t c = 4; c-- > 0;) {
      const auto codes = c < p.channels ? quantizer.codes(load_strided<S>(x + c * p.channel_stride + w * p.column_stride,
                                                                          p.column_stride, left))
                                        : S::set_i(p.zero);
      pixels = S::or_i(S::template shift_left<8>(pixels), codes);
    }
    std::int32_t lanes[16];
    S::store_i(lanes, pixels);
    std::memcpy(y + w * 4, lanes, static_cast<std::size_t>(left < 16 ? left : 16) * 4);
  }
}

// Planes of channels: sixteen pixels of sixteen channels at a time.
template <class S>
static void quantize_planes(const QimageParams& p, const Quantizer<S>& quantizer, const float* x, std::uint8_t* y) {
  for (std::int64_t w = 0; w < p.width; w += 16) {
    const std::int64_t pixels = p.width - w < 16 ? p.width - w : 16;
    for (std::int64_t c = 0; c < p.channels; c += 16) {
      const std::int64_t channels = p.channels - c < 16 ? p.channels - c : 16;
      typename S::I32 codes[16];
      for (std::int64_t i = 0; i < 16; ++i) {
        codes[i] = i < channels ? quantizer.codes(load_strided<S>(x + (c + i) * p.channel_stride + w * p.column_stride,
                                                                  p.column_stride, pixels))
                                : S::set_i(p.zero);
      }
      S::transpose(codes);
      for (std::int64_t i = 0; i < pixels; ++i) {
        std::uint8_t bytes[16];
        S::store_bytes(bytes, codes[i]);
        std::memcpy(y + (w + i) * p.pixel + c, bytes, static_cast<std::size_t>(channels));
      }
    }
  }
}

// Several columns a pixel: codes of the row first, then what each pixel sees of them. `x` is the first column of the image,
// `y` the first pixel.
template <class S>
static void quantize_columns(const QimageParams& p, const Quantizer<S>& quantizer, const float* x, std::uint8_t* y) {
  constexpr std::int64_t kPixels = 16;  // at a time
  std::uint8_t row[((kPixels - 1) * kQimageMaxStep + 1) * kQimageTapBytes];
  const std::int64_t columns = p.columns(), bytes = p.taps * p.channels;
  for (std::int64_t first = 0; first < columns; first += kPixels) {
    const std::int64_t pixels = columns - first < kPixels ? columns - first : kPixels;
    // Columns [begin, end) of the bordered image, and which of them the image has.
    const std::int64_t begin = first * p.step, end = begin + (pixels - 1) * p.step + p.taps;
    const std::int64_t from = begin < p.left ? p.left : begin, to = end < p.left + p.width ? end : p.left + p.width;
    if (from > begin || to < end) std::memset(row, p.zero, static_cast<std::size_t>((end - begin) * p.channels));
    for (std::int64_t c = 0; c < p.channels; ++c) {
      for (std::int64_t w = from; w < to; w += 16) {
        const std::int64_t count = to - w < 16 ? to - w : 16;
        std::uint8_t codes[16];
        const float* at = x + c * p.channel_stride + (w - p.left) * p.column_stride;
        S::store_bytes(codes, quantizer.codes(load_strided<S>(at, p.column_stride, count)));
        std::uint8_t* out = row + (w - begin) * p.channels + c;
        for (std::int64_t i = 0; i < count; ++i) out[i * p.channels] = codes[i];
      }
    }
    for (std::int64_t i = 0; i < pixels; ++i, y += p.pixel) {
      if (bytes == 4) {
        std::memcpy(y, row + i * p.step * p.channels, 4);
      } else {
        std::memcpy(y, row + i * p.step * p.channels, static_cast<std::size_t>(bytes));
      }
      for (std::int64_t b = bytes; b < p.pixel; ++b) y[b] = static_cast<std::uint8_t>(p.zero);
    }
  }
}

template <class S>
static void qimage_generic(const QimageParams& p, std::int64_t begin, std::int64_t end) {
  const Quantizer<S> quantizer(p);
  const std::int64_t rows = p.top + p.height + p.bottom, row_bytes = p.columns() * p.pixel;
  const bool several = p.taps > 1 || p.step > 1;
  for (std::int64_t row = begin; row < end; ++row) {
    std::uint8_t* y = p.y + row * row_bytes;
    const std::int64_t h = row % rows - p.top;
    // Whatever no channel is written to.
    if (h < 0 || h >= p.height || (!several && (p.left > 0 || p.right > 0 || p.channels < p.pixel))) {
      std::memset(y, p.zero, static_cast<std::size_t>(row_bytes));
    }
    if (h < 0 || h >= p.height) continue;
    const float* x = p.x + row / rows * p.batch_stride + h * p.row_stride;
    if (several) {
      quantize_columns(p, quantizer, x, y);
      continue;
    }
    y += p.left * p.pixel;
    if (p.pixel == 4) {
      quantize_fours(p, quantizer, x, y);
    } else if (p.channel_stride == 1 || p.channels == 1) {
      quantize_pixels(p, quantizer, x, y);
    } else {
      quantize_planes(p, quantizer, x, y);
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QIMAGE_GENERIC_H_
