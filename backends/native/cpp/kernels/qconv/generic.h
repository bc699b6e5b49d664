// The algorithm of every qconv kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QCONV_GENERIC_H_
#define SQC_KERNELS_QCONV_GENERIC_H_

#include "kernels/qconv/finish_panel.h"
#include "kernels/qconv/qconv.h"

namespace sqc {
namespace {

// One group of a convolution as a matrix product. Where kernel columns lie beside each other in memory and no
// window reaches over the border, a row of the kernel is one tap with as many channels.
template <class S>
struct QconvProduct {
  Window window;
  std::int64_t taps, run;                 // bytes that a tap multiplies, in fours
  std::int64_t panels, panel_bytes;
  const std::uint8_t* zeros;
  const std::uint8_t** pointers;          // [taps][kQconvRows]
  const Requantizer<S>* requantizer;
};

static inline bool rows_of_taps_adjoin(const QconvParams& p) {
  const Window& w = p.window;
  return p.groups == 1 && p.x_stride == (p.in_channels + 3) / 4 * 4 && w.pad_w == 0 && w.dilation_w == 1 && w.spread_w == 1 &&
         (w.out_w - 1) * w.stride_w + w.kernel_w <= w.in_w;
}

// Rows x Panels sums in registers. `rows` are the pointers of the first row at the first tap.
template <class S, int Rows, int Panels>
static void qconv_tile(const QconvParams& p, const QconvProduct<S>& c, std::int64_t group, std::int64_t panel, std::int64_t m,
                       const std::uint8_t* const* rows) {
  const std::int8_t* b = p.weights + (group * c.panels + panel) * c.panel_bytes;
  typename S::Acc acc[Rows][Panels];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::zero();
  for (std::int64_t tap = 0; tap < c.taps; ++tap, rows += kQconvRows) {
    const std::uint8_t* a[Rows];
    SQC_UNROLL for (int r = 0; r < Rows; ++r) a[r] = rows[r];
    for (std::int64_t k = 0; k < c.run; k += 4, b += 64) {
      typename S::Tile tile[Panels];
      SQC_UNROLL for (int q = 0; q < Panels; ++q) tile[q] = S::load_tile(b + q * c.panel_bytes);
      SQC_UNROLL for (int r = 0; r < Rows; ++r) {
        const typename S::Act act = S::load_act_u8(a[r] + k);
        SQC_UNROLL for (int q = 0; q < Panels; ++q) acc[r][q] = S::dot_us(acc[r][q], act, tile[q]);
      }
    }
  }
  // By way of memory, as in qgemm: unrolled over all sums, the epilogue would push them out of the registers.
  std::int32_t sums[Rows][Panels][16];
  SQC_UNROLL for (int r = 0; r < Rows; ++r) {
    SQC_UNROLL for (int q = 0; q < Panels; ++q) S::store_i(sums[r][q], S::reduce(acc[r][q]));
  }
  for (int q = 0; q < Panels; ++q) finish_panel<S>(p, *c.requantizer, group, panel + q, m, Rows, sums[0][q], Panels * 16);
}

template <class S, int MaxRows, int Panels>
static SQC_INLINE void qconv_rows(std::int64_t rows, const QconvParams& p, const QconvProduct<S>& c, std::int64_t group,
                                  std::int64_t panel, std::int64_t m, const std::uint8_t* const* pointers) {
  if constexpr (MaxRows > 1) {
    if (rows < MaxRows) return qconv_rows<S, MaxRows - 1, Panels>(rows, p, c, group, panel, m, pointers);
  }
  qconv_tile<S, MaxRows, Panels>(p, c, group, panel, m, pointers);
}

// `rows` rows whose pointers are there, in blocks that differ by at most one row.
template <class S, int MaxRows, int Panels>
static void qconv_strip(const QconvParams& p, const QconvProduct<S>& c, std::int64_t group, std::int64_t panel, std::int64_t m,
                        std::int64_t rows) {
  const std::int64_t blocks = (rows + MaxRows - 1) / MaxRows;
  for (std::int64_t block = 0; block < blocks; ++block) {
    const std::int64_t first = rows * block / blocks, count = rows * (block + 1) / blocks - first;
    qconv_rows<S, MaxRows, Panels>(count, p, c, group, panel, m + first, c.pointers + first);
  }
}

// Panels [begin, end) of a group: Rows4 x 4, Rows3 x 3, … sums are in registers; 0: not so many panels at once.
template <class S, int Rows4, int Rows3, int Rows2, int Rows1>
static void qconv_panels(const QconvParams& p, const QconvProduct<S>& c, std::int64_t group, std::int64_t begin,
                         std::int64_t end, std::int64_t m, std::int64_t rows) {
  std::int64_t panel = begin;
  if constexpr (Rows4 > 0) {
    for (; panel + 4 <= end; panel += 4) qconv_strip<S, Rows4, 4>(p, c, group, panel, m, rows);
  }
  if constexpr (Rows3 > 0) {
    for (; panel + 3 <= end; panel += 3) qconv_strip<S, Rows3, 3>(p, c, group, panel, m, rows);
  }
  if constexpr (Rows2 > 0) {
    for (; panel + 2 <= end; panel += 2) qconv_strip<S, Rows2, 2>(p, c, group, panel, m, rows);
  }
  for (; panel < end; ++panel) qconv_strip<S, Rows1, 1>(p, c, group, panel, m, rows);
}

template <class S, int Rows4, int Rows3, int Rows2, int Rows1>
static void qconv_generic(const QconvParams& p, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                          std::int64_t panel_end, std::uint8_t* scratch) {
  QconvProduct<S> c = {};
  const Requantizer<S> requantizer(p.y);
  c.requantizer = &requantizer;
  c.window = p.window;
  c.run = (p.in_channels + 3) / 4 * 4;
  c.panels = (p.out_channels + 15) / 16;
  c.panel_bytes = p.window.taps() * c.run * 16;
  if (rows_of_taps_adjoin(p)) {
    c.run *= c.window.kernel_w;
    c.window.kernel_w = 1;
  }
  c.taps = c.window.taps();
  std::memset(scratch, p.x_zero, static_cast<std::size_t>(c.run));
  c.zeros = scratch;
  c.pointers = reinterpret_cast<const std::uint8_t**>(scratch + (c.run + 63) / 64 * 64);
  const std::int64_t total = row_end - row_begin, chunks = (total + kQconvRows - 1) / kQconvRows;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t m = row_begin + total * chunk / chunks, rows = row_begin + total * (chunk + 1) / chunks - m;
    for (std::int64_t panel = panel_begin; panel < panel_end;) {
      const std::int64_t group = panel / c.panels, first = group * c.panels;
      const std::int64_t end = panel_end - first < c.panels ? panel_end - first : c.panels;
      point_at_taps(c.window, p.x + group * p.in_channels, p.x_stride, c.zeros, m, rows, kQconvRows, c.pointers);
      qconv_panels<S, Rows4, Rows3, Rows2, Rows1>(p, c, group, panel - first, end, m, rows);
      panel = first + end;
    }
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_GENERIC_H_
