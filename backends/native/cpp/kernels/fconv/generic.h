// The algorithm of every fconv kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_FCONV_GENERIC_H_
#define SQC_KERNELS_FCONV_GENERIC_H_

#include "kernels/epilogue.h"
#include "kernels/fconv/fconv.h"
#include "kernels/lanes.h"

namespace sqc {
namespace {

struct FconvProduct {
  std::int64_t panels, panel_floats;
  const float** pointers;  // [taps][kFconvRows]
};

// Rows x Panels sums in registers. `rows` are the pointers of the first row at the first tap.
template <class S, int Rows, int Panels>
static void fconv_tile(const FconvParams& p, const FconvProduct& c, std::int64_t group, std::int64_t panel, std::int64_t m,
                       const float* const* rows) {
  const float* b = p.weights + (group * c.panels + panel) * c.panel_floats;
  typename S::F32 sum[Rows][Panels];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) sum[r][q] = S::set_f(0.0f);
  const std::int64_t taps = p.window.taps();
  for (std::int64_t tap = 0; tap < taps; ++tap, rows += kFconvRows) {
    const float* a[Rows];
    SQC_UNROLL for (int r = 0; r < Rows; ++r) a[r] = rows[r];
    for (std::int64_t k = 0; k < p.in_channels; ++k, b += 16) {
      typename S::F32 column[Panels];
      SQC_UNROLL for (int q = 0; q < Panels; ++q) column[q] = S::load_f(b + q * c.panel_floats);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        const auto factor = S::set_f(a[r][k]);
        SQC_UNROLL for (int q = 0; q < Panels; ++q) sum[r][q] = S::fma_f(factor, column[q], sum[r][q]);
      }
    }
  }
  float sums[Rows][Panels][16];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) S::store_f(sums[r][q], sum[r][q]);
  const auto low = S::set_f(p.low), high = S::set_f(p.high);
  for (int q = 0; q < Panels; ++q) {
    const std::int64_t n = (panel + q) * 16;
    for (int r = 0; r < Rows; ++r) {
      auto total = S::load_f(sums[r][q]);
      if (p.bias != nullptr) total = S::add_f(total, S::load_f(p.bias + group * c.panels * 16 + n));
      store_clamped<S>(p.y + (m + r) * p.y_stride + group * p.out_channels + n, p.out_channels - n, total, low, high);
    }
  }
}

template <class S, int MaxRows, int Panels>
static SQC_INLINE void fconv_rows(std::int64_t rows, const FconvParams& p, const FconvProduct& c, std::int64_t group,
                                  std::int64_t panel, std::int64_t m, const float* const* pointers) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return fconv_rows<S, MaxRows - 1, Panels>(rows, p, c, group, panel, m, pointers);
  }
  fconv_tile<S, MaxRows, Panels>(p, c, group, panel, m, pointers);
}

template <class S, int MaxRows, int Panels>
static void fconv_strip(const FconvParams& p, const FconvProduct& c, std::int64_t group, std::int64_t panel, std::int64_t m,
                        std::int64_t rows) {
  const std::int64_t blocks = (rows + MaxRows - 1) / MaxRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    fconv_rows<S, MaxRows, Panels>(count, p, c, group, panel, m + first, c.pointers + first);
  }
}

// Sixteen channels at a time, each with its own kernel.
template <class S>
static void fconv_depthwise(const FconvParams& p, const FconvProduct& c, std::int64_t m, std::int64_t rows,
                            std::int64_t begin, std::int64_t end) {
  const auto low = S::set_f(p.low), high = S::set_f(p.high);
  const std::int64_t taps = p.window.taps();
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t n = begin * 16; n < end * 16 && n < p.groups; n += 16) {
      const std::int64_t left = p.groups - n;
      auto total = S::set_f(0.0f);
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        const auto x = load_lanes<S>(c.pointers[tap * kFconvRows + r] + n, left);
        total = S::fma_f(x, load_lanes<S>(p.weights + tap * p.groups + n, left), total);
      }
      if (p.bias != nullptr) total = S::add_f(total, load_lanes<S>(p.bias + n, left));
      store_clamped<S>(p.y + (m + r) * p.y_stride + n, left, total, low, high);
    }
  }
}

template <class S, int Rows, int Panels>
static void fconv_generic(const FconvParams& p, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                          std::int64_t panel_end, std::uint8_t* scratch) {
  FconvProduct c = {};
  c.panels = (p.out_channels + 15) / 16;
  c.panel_floats = p.window.taps() * p.in_channels * 16;
  const std::int64_t zeros = (p.depthwise ? p.groups : p.in_channels) * 4;
  std::memset(scratch, 0, static_cast<std::size_t>(zeros));
  c.pointers = reinterpret_cast<const float**>(scratch + (zeros + 63) / 64 * 64);
  const auto* none = reinterpret_cast<const float*>(scratch);
  const std::int64_t total = row_end - row_begin, chunks = (total + kFconvRows - 1) / kFconvRows;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t m = row_begin + total * chunk / chunks, rows = row_begin + total * (chunk + 1) / chunks - m;
    if (p.depthwise) {
      point_at_taps(p.window, p.x, p.x_stride, none, m, rows, kFconvRows, c.pointers);
      fconv_depthwise<S>(p, c, m, rows, panel_begin, panel_end);
      continue;
    }
    for (std::int64_t panel = panel_begin; panel < panel_end;) {
      const std::int64_t group = panel / c.panels, first = group * c.panels;
      const std::int64_t end = panel_end - first < c.panels ? panel_end - first : c.panels;
      point_at_taps(p.window, p.x + group * p.in_channels, p.x_stride, none, m, rows, kFconvRows, c.pointers);
      std::int64_t q = panel - first;
      if constexpr (Panels > 1) {
        for (; q + Panels <= end; q += Panels) fconv_strip<S, Rows, Panels>(p, c, group, q, m, rows);
      }
      for (; q < end; ++q) fconv_strip<S, 2 * Rows, 1>(p, c, group, q, m, rows);
      panel = first + end;
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_FCONV_GENERIC_H_
