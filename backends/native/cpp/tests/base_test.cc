// Threads, splits, status values and buffers.

#include <atomic>
#include <chrono>
#include <thread>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "base/work_shares.h"
#include "tests/test.h"

using namespace sqc;

namespace {

std::unique_ptr<ThreadPool> make_pool(int threads) {
  std::unique_ptr<ThreadPool> pool;
  SQC_CHECK(ThreadPool::create(threads, &pool).is_ok());
  return pool;
}

}  // namespace

SQC_TEST(pool_runs_every_index_once) {
  for (const int threads : {1, 2, 3, 5}) {
    const auto pool = make_pool(threads);
    std::vector<int> runs(static_cast<std::size_t>(threads));  // written without atomics: TSan watches
    for (int round = 0; round < 2000; ++round) {
      SQC_CHECK(pool->run([&](int thread) { ++runs[static_cast<std::size_t>(thread)]; }).is_ok());
    }
    for (const int count : runs) SQC_CHECK(count == 2000);
  }
}

SQC_TEST(pool_wakes_sleeping_workers) {
  const auto pool = make_pool(3);
  std::atomic<int> runs{0};
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(std::chrono::microseconds(round % 4 * 100));
    SQC_CHECK(pool->run([&](int) { ++runs; }).is_ok());
  }
  SQC_CHECK(runs == 60);
}

SQC_TEST(pool_caller_sleeps_until_a_slow_worker_is_done) {
  const auto pool = make_pool(2);
  for (int round = 0; round < 5; ++round) {
    int result = 0;
    SQC_CHECK(pool->run([&](int thread) {
                    if (thread == 0) return;
                    std::this_thread::sleep_for(std::chrono::milliseconds(3));
                    result = 7;
                  }).is_ok());
    SQC_CHECK(result == 7);
  }
}

SQC_TEST(pool_is_destroyed_in_any_state) {
  for (int round = 0; round < 100; ++round) {
    const auto pool = make_pool(4);
    if (round % 2 == 0) SQC_CHECK(pool->run([](int) {}).is_ok());
    if (round % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(120));
  }
}

SQC_TEST(pool_refuses_nested_use) {
  for (const int threads : {1, 2}) {
    const auto pool = make_pool(threads), other = make_pool(2);
    std::atomic<int> refused{0};
    SQC_CHECK(pool->run([&](int) {
                    if (pool->run([](int) {}).code() == StatusCode::kInvalidArgument) ++refused;
                    if (other->run([](int) {}).code() == StatusCode::kInvalidArgument) ++refused;
                  }).is_ok());
    SQC_CHECK(refused == 2 * threads);
    SQC_CHECK(pool->run([](int) {}).is_ok());
  }
}

SQC_TEST(pool_serves_several_callers) {
  const auto pool = make_pool(2);
  int sum = 0;  // only touched inside tasks, which exclude each other
  std::vector<std::thread> callers;
  for (int c = 0; c < 3; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 300; ++i) {
        SQC_CHECK(pool->run([&](int thread) {
                        if (thread == 1) ++sum;
                      }).is_ok());
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  SQC_CHECK(sum == 900);
}

SQC_TEST(pool_waits_for_those_who_came_and_for_nobody_else) {
  const auto pool = make_pool(4);
  std::vector<int> runs(4);  // written without atomics: TSan watches
  for (int round = 0; round < 3000; ++round) {
    if (round % 1000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // some are asleep
    const int own = runs[0];
    std::vector<int> before = runs;
    SQC_CHECK(pool->run_available([&](int thread) { ++runs[static_cast<std::size_t>(thread)]; }).is_ok());
    SQC_CHECK(runs[0] == own + 1);
    for (std::size_t t = 0; t < runs.size(); ++t) SQC_CHECK(runs[t] - before[t] <= 1);
    if (round % 100 == 0) {  // those who were not awaited are there again
      before = runs;
      SQC_CHECK(pool->run([&](int thread) { ++runs[static_cast<std::size_t>(thread)]; }).is_ok());
      for (std::size_t t = 0; t < runs.size(); ++t) SQC_CHECK(runs[t] == before[t] + 1);
    }
  }
}

SQC_TEST(pool_refuses_bad_thread_counts) {
  std::unique_ptr<ThreadPool> pool;
  for (const int threads : {0, -1, ThreadPool::kMaxThreads + 1}) {
    const Status status = ThreadPool::create(threads, &pool);
    SQC_CHECK(status.code() == StatusCode::kInvalidArgument && status.message()[0] != '\0');
    SQC_CHECK(pool == nullptr);
  }
}

SQC_TEST(split_covers_every_item_once) {
  for (const std::int64_t count : {0, 1, 2, 7, 64, 1000}) {
    for (const std::int64_t unit : {1, 2, 4}) {
      for (const int threads : {1, 2, 3, 8}) {
        std::int64_t next = 0;
        for (int t = 0; t < threads; ++t) {
          const Range range = split_evenly(count, unit, threads, t);
          SQC_CHECK(range.begin == next && range.end >= range.begin);
          SQC_CHECK(range.begin % unit == 0 || range.begin == count);
          next = range.end;
        }
        SQC_CHECK(next == count);
      }
    }
  }
}

SQC_TEST(shares_cover_every_item_once) {
  for (const int threads : {1, 2, 3, 5}) {
    const auto pool = make_pool(threads);
    for (const std::int64_t count : {0, 1, 2, 7, 64, 1001}) {
      for (const std::int64_t unit : {1, 2, 4}) {
        for (const std::int64_t least : {1, 5, 2000}) {
          std::vector<int> runs(static_cast<std::size_t>(count));  // written without atomics: TSan watches
          const auto mark = [&](int thread, Range part) {
            SQC_CHECK(thread >= 0 && thread < threads && part.begin < part.end && part.end <= count);
            SQC_CHECK(part.begin % unit == 0 && (part.end % unit == 0 || part.end == count));
            for (std::int64_t i = part.begin; i < part.end; ++i) ++runs[static_cast<std::size_t>(i)];
          };
          SQC_CHECK(run_shared(*pool, count, unit, least, mark).is_ok());
          for (const int times : runs) SQC_CHECK(times == 1);
        }
      }
    }
  }
}

SQC_TEST(who_is_done_takes_what_others_have_not_begun) {
  const auto pool = make_pool(2);
  constexpr std::int64_t kCount = 1024, kLeast = 8;
  std::atomic<std::int64_t> done{0};
  std::int64_t own[2] = {};
  const auto work = [&](int thread, Range part) {
    own[thread] += part.end - part.begin;
    const std::int64_t all = done.fetch_add(part.end - part.begin) + part.end - part.begin;
    // Thread 0 is held up in its first part until all the rest is done.
    while (thread == 0 && all < kCount && done.load() < kCount) std::this_thread::yield();
  };
  SQC_CHECK(run_shared(*pool, kCount, 1, kLeast, work).is_ok());
  SQC_CHECK(own[0] + own[1] == kCount);
  SQC_CHECK(own[0] <= kCount / 4);  // half of its half
}

SQC_TEST(shares_by_cost_cover_every_item_once) {
  const std::vector<std::uint64_t> before = {7, 7, 107, 108, 109, 110, 310, 311, 311};
  const auto pool = make_pool(3);
  std::vector<int> runs(before.size() - 1);
  const auto mark = [&](int, Range part) {
    for (std::int64_t i = part.begin; i < part.end; ++i) ++runs[static_cast<std::size_t>(i)];
  };
  SQC_CHECK(run_shared_by_cost(*pool, {before.data(), before.size()}, 1, 1, 1, mark).is_ok());
  for (const int times : runs) SQC_CHECK(times == 1);
}

SQC_TEST(split_by_cost_balances_cost) {
  sqc_tests::Random random(1);
  for (const std::int64_t count : {0, 1, 2, 7, 64, 1000}) {
    std::vector<std::uint64_t> before(static_cast<std::size_t>(count) + 1);
    std::uint64_t total = 100, largest = 0;  // a slice of a longer list does not start at zero
    for (std::int64_t i = 0; i <= count; ++i) {
      before[static_cast<std::size_t>(i)] = total;
      const auto cost = static_cast<std::uint64_t>(random.integer(0, i < count / 2 ? 10 : 1000));
      if (i < count) total += cost, largest = cost > largest ? cost : largest;
    }
    for (const int threads : {1, 2, 3, 8}) {
      std::int64_t next = 0;
      for (int t = 0; t < threads; ++t) {
        const Range range = split_by_cost({before.data(), before.size()}, 3, 1, threads, t);
        SQC_CHECK(range.begin == next && range.end >= range.begin);
        next = range.end;
        const std::uint64_t cost =
            before[static_cast<std::size_t>(range.end)] - before[static_cast<std::size_t>(range.begin)] +
            3 * static_cast<std::uint64_t>(range.end - range.begin);
        const std::uint64_t all = total - 100 + 3 * static_cast<std::uint64_t>(count);
        SQC_CHECK(cost <= all / static_cast<std::uint64_t>(threads) + 2 * (largest + 3));
      }
      SQC_CHECK(next == count);
    }
  }
}

// Two rounds for two threads: each has one.
SQC_TEST(split_by_cost_in_rounds) {
  const std::vector<std::uint64_t> before = {5, 6, 16, 17, 17};
  for (const std::int64_t times : {0, 1, 2, 6}) {
    for (const int threads : {1, 2, 3}) {
      std::int64_t next = 0;
      for (int t = 0; t < threads; ++t) {
        const Range range = split_by_cost({before.data(), before.size()}, 1, 1, threads, t, times);
        SQC_CHECK(range.begin == next && range.end >= range.begin);
        if (times % threads == 0) SQC_CHECK(range.end - range.begin == 4 * times / threads);
        next = range.end;
      }
      SQC_CHECK(next == 4 * times);
    }
  }
}

SQC_TEST(isa_names_round_trip) {
  for (const Isa isa : isa_levels()) {
    Isa found = Isa::scalar;
    const Status status = find_isa(isa_name(isa), &found);
    SQC_CHECK(status.is_ok() == isa_available(isa));
    if (status.is_ok()) SQC_CHECK(found == isa);
    SQC_CHECK(isa_includes(isa, Isa::scalar) && isa_includes(isa, isa));
  }
  Isa isa = Isa::scalar;
  SQC_CHECK(find_isa("avx1024", &isa).code() == StatusCode::kInvalidArgument);
  SQC_CHECK(find_isa("", &isa).code() == StatusCode::kInvalidArgument);
#if defined(SQC_ARCH_X86)
  SQC_CHECK(find_isa("neon_dotprod", &isa).code() == StatusCode::kUnsupported);
#else
  SQC_CHECK(find_isa("avx2", &isa).code() == StatusCode::kUnsupported);
#endif
}

SQC_TEST(buffers_are_aligned_zeroed_and_moved) {
  for (const std::size_t size : {std::size_t{1}, std::size_t{1000}, AlignedBuffer::kHugePage + 5}) {
    AlignedBuffer buffer;
    SQC_CHECK(buffer.allocate(size).is_ok());
    SQC_CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % AlignedBuffer::kAlignment == 0);
    SQC_CHECK(buffer.size() == size && buffer.data()[0] == 0 && buffer.data()[size - 1] == 0);
    std::uint8_t* data = buffer.data();
    AlignedBuffer other = std::move(buffer);
    SQC_CHECK(other.data() == data && buffer.data() == nullptr && buffer.size() == 0);
  }
  AlignedBuffer buffer;
  SQC_CHECK(buffer.allocate(0).is_ok() && buffer.data() == nullptr);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they end the program themselves
  SQC_CHECK(buffer.allocate(std::size_t{1} << 62).code() == StatusCode::kOutOfMemory);
  SQC_CHECK(buffer.data() == nullptr);
#endif
}
