// Where a convolution or a pooling reads: the geometry of its windows, and pointers to what they see.
//
// Images lie pixel by pixel, the channels of a pixel together: [batch][height][width][stride]. The output
// pixel (y, x) sees, at place (i, j) of the kernel, the input pixel
//
//   (y * stride - pad + i * dilation) / spread        likewise in x
//
// if that is a whole number and inside the image, and else nothing, for which stands a pixel of zeros. With
// `spread` s the input's pixels lie s apart and between them is nothing: a transposed convolution of stride s
// is a convolution with spread s and stride 1. Padding may be negative, which crops.

#ifndef SQC_KERNELS_WINDOW_H_
#define SQC_KERNELS_WINDOW_H_

#include <cstdint>

#include "kernels/simd/simd.h"

namespace sqc {

struct Window {
  std::int64_t batch, in_h, in_w, out_h, out_w;
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, spread_h, spread_w;

  std::int64_t rows() const { return batch * out_h * out_w; }  // output pixels
  std::int64_t taps() const { return kernel_h * kernel_w; }
  // Whether output pixels are the input's, one for one.
  bool is_point() const {
    return kernel_h == 1 && kernel_w == 1 && stride_h == 1 && stride_w == 1 && pad_h == 0 && pad_w == 0 &&
           spread_h == 1 && spread_w == 1 && in_h == out_h && in_w == out_w;
  }
};

namespace {

// The place in the input, or -1 where there is nothing.
static SQC_INLINE std::int64_t window_place(std::int64_t at, std::int64_t spread, std::int64_t size) {
  if (spread != 1) {
    if (at < 0 || at % spread != 0) return -1;
    at /= spread;
  }
  return at >= 0 && at < size ? at : -1;
}

// What `rows` output pixels from `first` on see: pointers[tap * capacity + row]. `pixel` is the distance of
// pixels, in elements of T.
template <class T>
static void point_at_taps(const Window& w, const T* x, std::int64_t pixel, const T* zeros, std::int64_t first,
                          std::int64_t rows, std::int64_t capacity, const T** pointers) {
  if (w.is_point()) {
    for (std::int64_t r = 0; r < rows; ++r) pointers[r] = x + (first + r) * pixel;
    return;
  }
  std::int64_t ox = first % w.out_w, oy = first / w.out_w % w.out_h, image = first / w.out_w / w.out_h;
  // Output pixels of one row at a time: at a tap, those that see something lie together.
  for (std::int64_t r = 0; r < rows;) {
    const std::int64_t count = w.out_w - ox < rows - r ? w.out_w - ox : rows - r;
    const T* base = x + image * w.in_h * w.in_w * pixel;
    const T** to = pointers + r;
    for (std::int64_t i = 0; i < w.kernel_h; ++i) {
      const std::int64_t y = window_place(oy * w.stride_h - w.pad_h + i * w.dilation_h, w.spread_h, w.in_h);
      for (std::int64_t j = 0; j < w.kernel_w; ++j, to += capacity) {
        const std::int64_t at = ox * w.stride_w - w.pad_w + j * w.dilation_w;
        if (w.spread_w != 1) {
          for (std::int64_t p = 0; p < count; ++p) {
            const std::int64_t place = y < 0 ? -1 : window_place(at + p * w.stride_w, w.spread_w, w.in_w);
            to[p] = place < 0 ? zeros : base + (y * w.in_w + place) * pixel;
          }
          continue;
        }
        std::int64_t begin = at >= 0 ? 0 : (-at + w.stride_w - 1) / w.stride_w;
        std::int64_t end = at >= w.in_w || y < 0 ? 0 : (w.in_w - 1 - at) / w.stride_w + 1;
        begin = begin < count ? begin : count;
        end = end < count ? end : count;
        for (std::int64_t p = 0; p < begin; ++p) to[p] = zeros;
        if (begin < end) {
          const std::int64_t step = w.stride_w * pixel;
          const T* from = base + (y * w.in_w + at + begin * w.stride_w) * pixel;
          for (std::int64_t p = begin; p < end; ++p, from += step) to[p] = from;
        }
        for (std::int64_t p = begin > end ? begin : end; p < count; ++p) to[p] = zeros;
      }
    }
    r += count;
    ox = 0;
    if (++oy == w.out_h) oy = 0, ++image;
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_WINDOW_H_
