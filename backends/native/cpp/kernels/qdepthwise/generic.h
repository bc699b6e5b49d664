// The algorithm of every qdepthwise kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QDEPTHWISE_GENERIC_H_
#define SQC_KERNELS_QDEPTHWISE_GENERIC_H_

#include "kernels/epilogue.h"
#include "kernels/qconv/finish.h"
#include "kernels/qdepthwise/qdepthwise.h"

namespace sqc {
namespace {

// Sixteen channels from c on of `rows` rows, whose pointers are pointers[tap * kQdepthwiseRows + row].
template <class S>
static void depthwise_channels(const QdepthwiseParams& p, std::int64_t c, std::int64_t m, std::int64_t rows,
                               const std::uint8_t* const* pointers) {
  const std::int64_t taps = p.window.taps(), packed = (p.channels + 15) / 16 * 16;
  const auto bias = S::load_i(p.bias + c);
  const auto scale = S::load_f(p.scale + c), offset = S::load_f(p.offset + c);
  const QconvOutput& y = p.y;
  const Requantizer<S> requantizer(y);
  const auto low = S::set_f(y.low), high = S::set_f(y.high);
  for (std::int64_t r = 0; r < rows; ++r) {
    auto sum = bias;
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const auto x = S::load_u8(pointers[tap * kQdepthwiseRows + r] + c);
      sum = S::add_i(sum, S::mul_i(x, S::load_i8(p.weights + tap * packed + c)));
    }
    const auto value = S::fma_f(S::to_float(sum), scale, offset);
    if (y.values != nullptr) {
      store_clamped<S>(y.values + (m + r) * y.stride + c, p.channels - c, value, low, high);
      continue;
    }
    const std::uint8_t* other = y.other == nullptr ? nullptr : y.other + (m + r) * y.other_stride + c;
    store_codes<S>(y.codes + (m + r) * y.stride + c, 16, requantizer.codes(value, other), y.table);
  }
}

template <class S>
static void qdepthwise_generic(const QdepthwiseParams& p, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  const std::int64_t packed = (p.channels + 15) / 16 * 16;
  std::memset(scratch, p.x_zero, static_cast<std::size_t>(packed));
  auto** pointers = reinterpret_cast<const std::uint8_t**>(scratch + (packed + 63) / 64 * 64);
  const std::int64_t total = end - begin, chunks = (total + kQdepthwiseRows - 1) / kQdepthwiseRows;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t m = begin + total * chunk / chunks, rows = begin + total * (chunk + 1) / chunks - m;
    point_at_taps(p.window, p.x, p.x_stride, scratch, m, rows, kQdepthwiseRows, pointers);
    for (std::int64_t c = 0; c < packed; c += 16) depthwise_channels<S>(p, c, m, rows, pointers);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QDEPTHWISE_GENERIC_H_
