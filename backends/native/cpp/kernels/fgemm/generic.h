// The algorithm of every fgemm kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_FGEMM_GENERIC_H_
#define SQC_KERNELS_FGEMM_GENERIC_H_

#include "kernels/chain.h"
#include "kernels/epilogue.h"
#include "kernels/fgemm/fgemm.h"
#include "kernels/lanes.h"

namespace sqc {
namespace {

// Steps of k that a strip of panels takes at once when rows pass over it: 128 KiB of floats in four panels,
// which stay in the L2 cache. Between blocks the sums wait in c.
constexpr std::int64_t kFgemmBlock = 512;
constexpr std::int64_t kFgemmWidest = 4;  // panels of a strip

// Rows [m, m + rows) of a strip for steps [k, k + steps).
template <class S, int MaxRows, int Panels, class T>
static void fgemm_tile(const FgemmParams& p, std::int64_t m, std::int64_t rows, std::int64_t panel, const Columns<T>& b,
                       std::int64_t k, std::int64_t steps, Ahead ahead) {
  float tile[MaxRows * kFgemmWidest * 16];
  const std::int64_t width = b.vectors * 16, n = panel * 16;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t w = 0; w < width; w += 16) {
      const auto start = k == 0 ? S::set_f(0.0f) : load_lanes<S>(p.c + (m + r) * p.c_stride + n + w, p.n - n - w);
      S::store_f(tile + r * width + w, start);
    }
  }
  chain_rows<S, MaxRows, Panels>(rows, p.a + m * p.a_stride + k, p.a_stride, b, steps, tile, width, ahead);
  const bool last = k + steps == p.k;
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t w = 0; w < width; w += 16) {
      auto total = S::load_f(tile + r * width + w);
      float* c = p.c + (m + r) * p.c_stride + n + w;
      if (!last) {
        store_lanes<S>(c, p.n - n - w, total);
        continue;
      }
      if (p.bias != nullptr) total = S::add_f(total, S::load_f(p.bias + n + w));
      store_clamped<S>(c, p.n - n - w, total, S::set_f(p.low), S::set_f(p.high));
    }
  }
}

// All rows of a strip of `panels` panels; `more`: as many panels follow.
template <class S, int MaxRows, int Panels, class T>
static void fgemm_strip(const FgemmParams& p, std::int64_t panel, std::int64_t panels, bool more, float* scratch) {
  static_assert(MaxRows >= 6, "fgemm_scratch_bytes counts on it");
  const std::int64_t blocks = (p.m + MaxRows - 1) / MaxRows;
  const auto* b = static_cast<const T*>(p.b) + panel * p.k * 16;
  // One pass of one block of rows reads each weight once: no need to keep any.
  const std::int64_t most = blocks == 1 ? (p.k > 0 ? p.k : 1) : kFgemmBlock;
  std::int64_t k = 0;
  do {
    const std::int64_t steps = p.k - k < most ? p.k - k : most;
    const bool as_floats = sizeof(T) != sizeof(float) && blocks > 2;
    if constexpr (sizeof(T) != sizeof(float)) {
      for (std::int64_t w = 0; as_floats && w < panels; ++w) {
        for (std::int64_t i = 0; i < steps; ++i) {
          S::store_f(scratch + (w * steps + i) * 16, load_as_float<S>(b + (w * p.k + k + i) * 16));
        }
      }
    }
    // What comes next: the strip's next steps, or the next strip. Each block of rows fetches its share.
    Ahead next = {nullptr, 0, 0};
    if (blocks > 1 && (k + steps < p.k || more)) {
      const T* from = k + steps < p.k ? b + (k + steps) * 16 : b + panels * p.k * 16;
      const std::int64_t next_steps = k + steps < p.k ? p.k - k - steps : p.k;
      const std::int64_t bytes = (next_steps < most ? next_steps : most) * 16 * static_cast<std::int64_t>(sizeof(T));
      next = {reinterpret_cast<const char*>(from), bytes / blocks / 64 * 64, p.k * 16 * static_cast<std::int64_t>(sizeof(T))};
    }
    for (std::int64_t block = 0; block < blocks; ++block) {
      const std::int64_t m = p.m * block / blocks, rows = p.m * (block + 1) / blocks - m;
      const Ahead ahead = {next.data + block * next.bytes, next.bytes, next.vector_stride};
      if (as_floats) {
        const Columns<float> columns = {scratch, panels, steps * 16, 16};
        fgemm_tile<S, MaxRows, Panels>(p, m, rows, panel, columns, k, steps, ahead);
      } else {
        const Columns<T> columns = {b + k * 16, panels, p.k * 16, 16};
        fgemm_tile<S, MaxRows, Panels>(p, m, rows, panel, columns, k, steps, ahead);
      }
    }
    k += steps;
  } while (k < p.k);
}

// Up to MaxRows x Panels sums of 16 lanes are in registers.
template <class S, int MaxRows, int Panels, class T>
static void fgemm_panels(const FgemmParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  for (std::int64_t panel = begin; panel < end; panel += kFgemmWidest) {
    const std::int64_t panels = end - panel < kFgemmWidest ? end - panel : kFgemmWidest;
    fgemm_strip<S, MaxRows, Panels, T>(p, panel, panels, panel + 2 * kFgemmWidest <= end, scratch);
  }
}

template <class S, int MaxRows, int Panels>
static void fgemm_generic(const FgemmParams& p, std::int64_t begin, std::int64_t end, float* scratch) {
  if (p.b_type == FgemmType::bf16) {
    fgemm_panels<S, MaxRows, Panels, std::uint16_t>(p, begin, end, scratch);
  } else {
    fgemm_panels<S, MaxRows, Panels, float>(p, begin, end, scratch);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_FGEMM_GENERIC_H_
