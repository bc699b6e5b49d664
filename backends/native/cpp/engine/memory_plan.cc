#include "engine/memory_plan.h"

#include <algorithm>
#include <numeric>

namespace sqc {

std::int64_t plan_memory(std::vector<Lifetime>& lifetimes) {
  std::vector<std::size_t> order(lifetimes.size()), placed;
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return lifetimes[a].bytes > lifetimes[b].bytes; });
  placed.reserve(order.size());
  std::int64_t total = 0;
  for (const std::size_t index : order) {
    Lifetime& item = lifetimes[index];
    const std::int64_t bytes = (item.bytes + 63) / 64 * 64;
    std::int64_t offset = 0;
    // `placed` is sorted by offset: the first gap that is wide enough is the lowest.
    for (const std::size_t other : placed) {
      const Lifetime& taken = lifetimes[other];
      if (taken.last < item.first || item.last < taken.first) continue;
      if (taken.offset - offset >= bytes) break;
      offset = std::max(offset, taken.offset + (taken.bytes + 63) / 64 * 64);
    }
    item.offset = offset;
    total = std::max(total, offset + bytes);
    const auto after = std::upper_bound(placed.begin(), placed.end(), offset, [&](std::int64_t value, std::size_t other) {
      return value < lifetimes[other].offset;
    });
    placed.insert(after, index);
  }
  return total;
}

}  // namespace sqc
