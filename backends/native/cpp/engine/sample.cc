#include "engine/sample.h"

#include <algorithm>
#include <cmath>

namespace sqc {
namespace {

// Steele, Lea, Flood 2014: "Fast splittable pseudorandom number generators", the finalizer of SplitMix64.
std::uint64_t mix(std::uint64_t x) noexcept {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

Status check_options(const SampleOptions& o) noexcept {
  const auto invalid = [](const char* what) { return Status::error(StatusCode::kInvalidArgument, "%s", what); };
  if (!(o.temperature >= 0.0f) || o.temperature > 1e6f) return invalid("the temperature is not between 0 and 1000000");
  if (o.top_k < 0) return invalid("top_k is negative");
  if (!(o.top_p > 0.0f) || o.top_p > 1.0f) return invalid("top_p is not above 0 and at most 1");
  return Status::ok();
}

std::int64_t most_likely(const float* logits, std::int64_t count) noexcept {
  std::int64_t best = 0;
  for (std::int64_t i = 1; i < count; ++i) {
    if (logits[i] > logits[best] || logits[best] != logits[best]) best = i;
  }
  return best;
}

std::int64_t sample(const float* logits, std::int64_t count, const SampleOptions& options, std::uint64_t stream,
                    std::uint64_t step, std::int32_t* order) noexcept {
  const std::int64_t best = most_likely(logits, count);
  if (options.temperature == 0.0f || !std::isfinite(logits[best])) return best;
  const double largest = logits[best], scale = 1.0 / options.temperature;
  const auto weight = [&](std::int64_t i) {
    return logits[i] == logits[i] ? std::exp((static_cast<double>(logits[i]) - largest) * scale) : 0.0;
  };
  const double uniform = static_cast<double>(mix(mix(mix(options.seed) ^ stream) ^ step) >> 11) * 0x1p-53;
  const bool all = (options.top_k == 0 || options.top_k >= count) && options.top_p >= 1.0f;
  double total = 0.0;
  if (all || options.top_k == 0 || options.top_k >= count) {
    for (std::int64_t i = 0; i < count; ++i) total += weight(i);
  }
  if (all) {
    double rest = uniform * total;
    std::int64_t last = best;
    for (std::int64_t i = 0; i < count; ++i) {
      const double w = weight(i);
      if (w == 0.0) continue;
      last = i;
      rest -= w;
      if (rest < 0.0) break;
    }
    return last;
  }
  // The likely ones first, from a heap: most of the vocabulary is never sorted. Of equals, the first one.
  const auto less = [&](std::int32_t a, std::int32_t b) {
    const float x = logits[a] == logits[a] ? logits[a] : -INFINITY, y = logits[b] == logits[b] ? logits[b] : -INFINITY;
    return x < y || (x == y && a > b);
  };
  for (std::int64_t i = 0; i < count; ++i) order[i] = static_cast<std::int32_t>(i);
  std::make_heap(order, order + count, less);
  const std::int64_t most = options.top_k > 0 && options.top_k < count ? options.top_k : count;
  // They go to the end, in falling order: the k-th likely is order[count - 1 - k].
  std::int64_t kept = 0;
  double sum = 0.0;
  const auto pop = [&] {
    std::pop_heap(order, order + count - kept, less);
    ++kept;
  };
  if (most < count) {
    while (kept < most) {
      pop();
      total += weight(order[count - kept]);
    }
    kept = 0;
    while (kept < most && sum < options.top_p * total) sum += weight(order[count - 1 - kept++]);
  } else {
    while (kept < most && sum < options.top_p * total) {
      pop();
      sum += weight(order[count - kept]);
    }
  }
  double rest = uniform * sum;
  for (std::int64_t k = 0; k < kept; ++k) {
    rest -= weight(order[count - 1 - k]);
    if (rest < 0.0) return order[count - 1 - k];
  }
  return order[count - 1];
}

}  // namespace sqc
