// The algorithm of every qdepthwise kernel, over the types of kernels/simd.

#ifndef SQC_KERNELS_QDEPTHWISE_GENERIC_H_
#define SQC_KERNELS_QDEPTHWISE_GENERIC_H_

#include "kernels/epilogue.h"
#include "kernels/qconv/finish.h"
#include "kernels/qdepthwise/qdepthwise.h"

namespace sqc {
namespace {

// Sums of sixteen channels from c on, to pixel m of y.
template <class S>
static SQC_INLINE void finish_channels(const QdepthwiseParams& p, const Requantizer<S>& requantizer, std::int64_t c,
                                       std::int64_t m, typename S::I32 sum) {
  const auto value = S::fma_f(S::to_float(S::add_i(sum, S::load_i(p.bias + c))), S::load_f(p.scale + c), S::load_f(p.offset + c));
  const QconvOutput& y = p.y;
  if (y.values != nullptr) {
    store_clamped<S>(y.values + m * y.stride + c, p.channels - c, value, requantizer.low, requantizer.high);
  } else if (y.other != nullptr) {
    finish_codes<S, true>(requantizer, y, m, c, 16, value);
  } else {
    finish_codes<S, false>(requantizer, y, m, c, 16, value);
  }
}

// Sixteen channels from c on of `rows` rows, whose pointers are pointers[tap * kQdepthwiseRows + row].
template <class S>
static void depthwise_channels(const QdepthwiseParams& p, const Requantizer<S>& requantizer, std::int64_t c, std::int64_t m,
                               std::int64_t rows, const std::uint8_t* const* pointers) {
  const std::int64_t taps = p.window.taps(), packed = (p.channels + 15) / 16 * 16;
  for (std::int64_t r = 0; r < rows; ++r) {
    auto sum = S::set_i(0);
    for (std::int64_t tap = 0; tap < taps; ++tap) {
      const auto x = S::load_u8(pointers[tap * kQdepthwiseRows + r] + c);
      sum = S::add_i(sum, S::mul_i(x, S::load_i8(p.weights + tap * packed + c)));
    }
    finish_channels<S>(p, requantizer, c, m + r, sum);
  }
}

// Sixty-four channels at a time: the bytes of four taps are put beside each other, for a dot product of four taps.
// Up to kQuads times four taps, whose weights are put so once for all rows.
template <class S, int Quads>
static void depthwise_quads(const QdepthwiseParams& p, const Requantizer<S>& requantizer, std::int64_t c, std::int64_t m,
                            std::int64_t rows, const std::uint8_t* const* pointers) {
  const std::int64_t taps = p.window.taps(), packed = (p.channels + 15) / 16 * 16;
  const std::int64_t count = packed - c < 64 ? packed - c : 64;
  typename S::Quad weights[Quads];
  SQC_UNROLL for (int quad = 0; quad < Quads; ++quad) {
    typename S::Bytes bytes[4];
    SQC_UNROLL for (int i = 0; i < 4; ++i) {
      const std::int64_t tap = quad * 4 + i;
      bytes[i] = tap < taps ? S::load_bytes(p.weights + tap * packed + c, count) : S::no_bytes();
    }
    weights[quad] = S::interleave(bytes);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    typename S::QuadSums sums = S::no_sums();
    SQC_UNROLL for (int quad = 0; quad < Quads; ++quad) {
      typename S::Bytes bytes[4];
      SQC_UNROLL for (int i = 0; i < 4; ++i) {
        // Behind the last tap the weights are zero, whatever is read.
        const std::int64_t tap = quad * 4 + i < taps ? quad * 4 + i : 0;
        bytes[i] = S::load_bytes(pointers[tap * kQdepthwiseRows + r] + c, count);
      }
      S::add_products(sums, S::interleave(bytes), weights[quad]);
    }
    S::order(sums);
    for (std::int64_t i = 0; i < count; i += 16) finish_channels<S>(p, requantizer, c + i, m + r, sums.v[i / 16]);
  }
}

template <class S>
static void depthwise_rows(const QdepthwiseParams& p, const Requantizer<S>& requantizer, std::int64_t m, std::int64_t rows,
                           const std::uint8_t* const* pointers) {
  const std::int64_t packed = (p.channels + 15) / 16 * 16;
  if constexpr (S::kHasQuads) {
    const std::int64_t quads = (p.window.taps() + 3) / 4;
    if (quads <= 3) {
      for (std::int64_t c = 0; c < packed; c += 64) depthwise_quads<S, 3>(p, requantizer, c, m, rows, pointers);
      return;
    }
    if (quads <= 7) {
      for (std::int64_t c = 0; c < packed; c += 64) depthwise_quads<S, 7>(p, requantizer, c, m, rows, pointers);
      return;
    }
  }
  for (std::int64_t c = 0; c < packed; c += 16) depthwise_channels<S>(p, requantizer, c, m, rows, pointers);
}

template <class S>
static void qdepthwise_generic(const QdepthwiseParams& p, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  const std::int64_t packed = (p.channels + 15) / 16 * 16;
  const Requantizer<S> requantizer(p.y);
  std::memset(scratch, p.x_zero, static_cast<std::size_t>(packed));
  auto** pointers = reinterpret_cast<const std::uint8_t**>(scratch + (packed + 63) / 64 * 64);
  const std::int64_t total = end - begin, chunks = (total + kQdepthwiseRows - 1) / kQdepthwiseRows;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t m = begin + total * chunk / chunks, rows = begin + total * (chunk + 1) / chunks - m;
    point_at_taps(p.window, p.x, p.x_stride, scratch, m, rows, kQdepthwiseRows, pointers);
    depthwise_rows<S>(p, requantizer, m, rows, pointers);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_QDEPTHWISE_GENERIC_H_
