// Items that a team of threads takes in parts: each its own share, then what others have not begun.
//
// Two equal halves do not take equal time: cores share memory, and other processes take one of them away for a
// while. With fixed halves the faster core waited a fifth of the time of a decoded token (two cores of a Zen 4
// under load, 22 layers of a Llama). A share is begun with its first half, then the half of what is left, so that
// it is read in long runs and yet divisible to the end. Threads that have not come when all is taken are not awaited.

#ifndef SQC_BASE_WORK_SHARES_H_
#define SQC_BASE_WORK_SHARES_H_

#include <atomic>
#include <cstdint>

#include "base/thread_pool.h"

namespace sqc {

class WorkShares {
 public:
  static constexpr std::int64_t kMost = 0xffffffff;

  // At most kMost items. Parts begin at multiples of `unit` behind the begin of a share and have at least `least`
  // items, where so many are left.
  WorkShares(int threads, std::int64_t unit, std::int64_t least) noexcept
      : threads_(threads), unit_(unit), least_(least > unit ? least : unit) {}

  // The share that `thread` begins with; for each thread, before any takes a part.
  void set(int thread, Range share) noexcept { shares_[thread].items.store(pack(share), std::memory_order_relaxed); }

  // The next part for `thread`; false when there is none.
  bool take(int thread, Range* part) noexcept {
    std::atomic<std::uint64_t>& own = shares_[thread].items;
    for (std::uint64_t seen = own.load(std::memory_order_relaxed);;) {
      const Range left = unpack(seen);
      if (left.begin == left.end) break;
      const std::int64_t end = threads_ == 1 ? left.end : after_half(left);
      if (own.compare_exchange_weak(seen, pack({end, left.end}), std::memory_order_relaxed)) {
        *part = {left.begin, end};
        return true;
      }
    }
    return steal(part);
  }

 private:
  // From the end of the longest share, so that its owner goes on where it is.
  bool steal(Range* part) noexcept {
    for (;;) {
      std::uint64_t seen = 0;
      std::int64_t longest = 0;
      int victim = 0;
      for (int i = 0; i < threads_; ++i) {
        const std::uint64_t items = shares_[i].items.load(std::memory_order_relaxed);
        const Range left = unpack(items);
        if (left.end - left.begin > longest) {
          longest = left.end - left.begin;
          seen = items;
          victim = i;
        }
      }
      if (longest == 0) return false;
      const Range left = unpack(seen);
      const std::int64_t cut = longest <= least_ ? left.begin : after_half(left);
      const std::int64_t begin = cut < left.end ? cut : left.begin;
      if (shares_[victim].items.compare_exchange_strong(seen, pack({left.begin, begin}), std::memory_order_relaxed)) {
        *part = {begin, left.end};
        return true;
      }
    }
  }

  // A multiple of the unit behind about half of the items, or their end.
  std::int64_t after_half(Range left) const noexcept {
    std::int64_t count = (left.end - left.begin) / 2;
    if (count < least_) count = least_;
    const std::int64_t end = left.begin + (count + unit_ - 1) / unit_ * unit_;
    return end < left.end ? end : left.end;
  }

  static std::uint64_t pack(Range range) noexcept {
    return static_cast<std::uint64_t>(range.end) << 32 | static_cast<std::uint64_t>(range.begin);
  }
  static Range unpack(std::uint64_t items) noexcept {
    return {static_cast<std::int64_t>(items & 0xffffffffu), static_cast<std::int64_t>(items >> 32)};
  }

  struct alignas(64) Share {
    std::atomic<std::uint64_t> items;
  };

  int threads_;
  std::int64_t unit_, least_;
  Share shares_[ThreadPool::kMaxThreads];  // those of the team are set
};

// Calls f(thread, part) until all of `count` equally costly items are done. Shares are in multiples of `unit`, parts of
// them in multiples of `step`, or of the unit.
template <class F>
Status run_shared(ThreadPool& pool, std::int64_t count, std::int64_t unit, std::int64_t least, F f,
                  std::int64_t step = 0) noexcept {
  if (count > WorkShares::kMost) {
    return pool.run([&](int thread) {
      const Range part = split_evenly(count, unit, pool.threads(), thread);
      if (part.begin < part.end) f(thread, part);
    });
  }
  WorkShares shares(pool.threads(), step > 0 ? step : unit, least);
  for (int i = 0; i < pool.threads(); ++i) shares.set(i, split_evenly(count, unit, pool.threads(), i));
  return pool.run_available([&](int thread) {
    for (Range part; shares.take(thread, &part);) f(thread, part);
  });
}

// The same for items of unequal cost, `times` times one after the other; see split_by_cost.
template <class F>
Status run_shared_by_cost(ThreadPool& pool, Span<const std::uint64_t> before, std::uint64_t each, std::int64_t unit,
                          std::int64_t least, F f, std::int64_t times = 1) noexcept {
  WorkShares shares(pool.threads(), unit, least);
  for (int i = 0; i < pool.threads(); ++i) shares.set(i, split_by_cost(before, each, unit, pool.threads(), i, times));
  return pool.run_available([&](int thread) {
    for (Range part; shares.take(thread, &part);) f(thread, part);
  });
}

// Items of so many bytes that make a part worth its beginning: a few microseconds of reading.
constexpr std::int64_t items_of_a_part(std::int64_t item_bytes) noexcept {
  constexpr std::int64_t kPartBytes = 65536;
  return item_bytes > 0 ? (kPartBytes + item_bytes - 1) / item_bytes : 1;
}

}  // namespace sqc

#endif  // SQC_BASE_WORK_SHARES_H_
