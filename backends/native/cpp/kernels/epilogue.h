// The end of every matrix product: from a panel's sums to 16 floats of c.

#ifndef SQC_KERNELS_EPILOGUE_H_
#define SQC_KERNELS_EPILOGUE_H_

#include "kernels/simd/simd.h"

namespace sqc {
namespace {

// Stores the first `count` of 16 lanes, clamped; a NaN stays one.
template <class S>
static SQC_INLINE void store_clamped(float* c, std::int64_t count, typename S::F32 v, typename S::F32 low,
                                     typename S::F32 high) {
  v = S::min_f(high, S::max_f(low, v));
  if (count >= 16) {
    S::store_f(c, v);
    return;
  }
  float lanes[16];
  S::store_f(lanes, v);
  for (std::int64_t i = 0; i < count; ++i) c[i] = lanes[i];
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_EPILOGUE_H_
