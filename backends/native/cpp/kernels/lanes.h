// Sixteen lanes at a time over arrays of any length, and sums in one order on every instruction set.

#ifndef SQC_KERNELS_LANES_H_
#define SQC_KERNELS_LANES_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {

// The first `count` floats at p, zeros after them. Reads no more than that.
template <class S>
static SQC_INLINE typename S::F32 load_lanes(const float* p, std::int64_t count) {
  if (count >= 16) return S::load_f(p);
  float lanes[16] = {};
  for (std::int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return S::load_f(lanes);
}

template <class S>
static SQC_INLINE void store_lanes(float* p, std::int64_t count, typename S::F32 v) {
  if (count >= 16) {
    S::store_f(p, v);
    return;
  }
  float lanes[16];
  S::store_f(lanes, v);
  for (std::int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}

// The first `count` lanes of v, `rest` after them.
template <class S>
static SQC_INLINE typename S::F32 keep_lanes(typename S::F32 v, std::int64_t count, float rest = 0.0f) {
  if (count >= 16) return v;
  float lanes[16];
  S::store_f(lanes, v);
  for (std::int64_t i = count; i < 16; ++i) lanes[i] = rest;
  return S::load_f(lanes);
}

// The sum of all lanes: lane i and i + 8, then i and i + 4, then i and i + 2, then the last two.
template <class S>
static SQC_INLINE float sum_lanes(typename S::F32 v) {
  float lanes[16];
  S::store_f(lanes, v);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// A reduction over [0, count): vectors 0, 4, 8, ... of 16 go into the first of four accumulators, vectors
// 1, 5, 9, ... into the second, and so on, so that four sums hide the latency of each other. Then the first
// is added to the second, the third to the fourth, those two, and the lanes as sum_lanes does.
// `step(accumulator, k, lanes)` returns the accumulator with the values at k, k + 1, ... in it.
template <class S, class Step>
static SQC_INLINE float reduce(std::int64_t count, Step step) {
  typename S::F32 a0 = S::set_f(0.0f), a1 = a0, a2 = a0, a3 = a0;
  std::int64_t k = 0;
  for (; k + 64 <= count; k += 64) {
    a0 = step(a0, k, 16);
    a1 = step(a1, k + 16, 16);
    a2 = step(a2, k + 32, 16);
    a3 = step(a3, k + 48, 16);
  }
  if (k < count) a0 = step(a0, k, count - k);
  if (k + 16 < count) a1 = step(a1, k + 16, count - k - 16);
  if (k + 32 < count) a2 = step(a2, k + 32, count - k - 32);
  if (k + 48 < count) a3 = step(a3, k + 48, count - k - 48);
  return sum_lanes<S>(S::add_f(S::add_f(a0, a1), S::add_f(a2, a3)));
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_LANES_H_
