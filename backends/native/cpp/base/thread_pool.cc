#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace sqc {
namespace {

thread_local bool inside_task = false;

void pause_cpu() noexcept {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

constexpr auto kSpinTime = std::chrono::microseconds(50);

// Waits for `ready` without sleeping; false when the time is up.
template <typename F>
bool spin_until(F ready) noexcept {
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < 32; ++i) {  // reading the clock costs as much as several pauses
      if (ready()) return true;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return ready();
}

}  // namespace

// A task is published by a new round of the gate. Workers enter an open round, each once, run the task and count
// themselves among the finished; the caller closes the round, after which nobody enters, and waits for those who did.
// The mutex is only taken by who sleeps and by who may have to wake a sleeper.
struct ThreadPool::Team {
  std::mutex turn;  // held by the caller for the whole of `run`

  void (*task)(void*, int) = nullptr;
  void* context = nullptr;
  static constexpr std::uint64_t kEntered = 0xffff, kOpen = 0x10000, kRound = 0x20000;
  std::atomic<std::uint64_t> gate{0};   // how many entered, whether it is open, and the round
  std::atomic<int> finished_workers{0};
  std::atomic<int> awaited_workers{0};  // once the caller knows
  std::atomic<bool> stop{false};

  std::mutex mutex;
  std::condition_variable started, finished;
  int sleeping_workers = 0;     // under mutex
  bool caller_sleeps = false;   // under mutex

  std::vector<std::thread> workers;

  void work(int thread) noexcept {
    inside_task = true;  // whatever runs on a worker is part of a task
    std::uint64_t seen = 0;
    for (;;) {
      const auto published = [&] { return gate.load(std::memory_order_acquire) / kRound != seen; };
      if (!spin_until(published)) {
        std::unique_lock<std::mutex> lock(mutex);
        ++sleeping_workers;
        started.wait(lock, published);
        --sleeping_workers;
      }
      if (stop.load(std::memory_order_relaxed)) return;
      if (!enter(&seen)) continue;
      task(context, thread);
      // Either this sees how many are awaited, or the caller, who says so first and looks then, sees all of them.
      if (finished_workers.fetch_add(1) + 1 == awaited_workers.load()) {
        // Empty on purpose: the caller either sees them under the mutex, or sleeps and is notified.
        bool wake;
        {
          std::lock_guard<std::mutex> lock(mutex);
          wake = caller_sleeps;
        }
        if (wake) finished.notify_one();
      }
    }
  }

  // Whether the newest round was still open; either way it is seen.
  bool enter(std::uint64_t* seen) noexcept {
    for (std::uint64_t now = gate.load(std::memory_order_relaxed);;) {
      *seen = now / kRound;
      if ((now & kOpen) == 0) return false;
      if (gate.compare_exchange_weak(now, now + 1, std::memory_order_acquire, std::memory_order_relaxed)) return true;
    }
  }

  void publish() noexcept {
    bool wake;
    {
      // Under the mutex, so that no worker can check the round before and fall asleep after.
      std::lock_guard<std::mutex> lock(mutex);
      const std::uint64_t round = gate.load(std::memory_order_relaxed) / kRound + 1;
      gate.store(round * kRound | kOpen, std::memory_order_release);
      wake = sleeping_workers > 0;
    }
    if (wake) started.notify_all();
  }

  // Waits for `count` workers, or for those who have entered.
  void wait_for_workers(int count) noexcept {
    if (count < 0) {
      count = static_cast<int>(gate.fetch_and(~kOpen, std::memory_order_relaxed) & kEntered);
    }
    awaited_workers.store(count);
    const auto done = [&] { return finished_workers.load() == count; };
    if (spin_until(done)) return;
    std::unique_lock<std::mutex> lock(mutex);
    caller_sleeps = true;
    finished.wait(lock, done);
    caller_sleeps = false;
  }

  void stop_workers() noexcept {
    stop.store(true, std::memory_order_relaxed);
    publish();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
  }
};

ThreadPool::ThreadPool(int threads) noexcept : threads_(threads) {}

ThreadPool::~ThreadPool() {
  if (team_ != nullptr) team_->stop_workers();
}

Status ThreadPool::create(int threads, std::unique_ptr<ThreadPool>* pool) noexcept {
  if (threads < 1 || threads > kMaxThreads) {
    return Status::error(StatusCode::kInvalidArgument, "%d threads; a pool has 1 to %d", threads, kMaxThreads);
  }
  std::unique_ptr<ThreadPool> made(new (std::nothrow) ThreadPool(threads));
  if (made == nullptr) return Status::error(StatusCode::kOutOfMemory, "cannot allocate a thread pool");
  if (threads > 1) {
    made->team_.reset(new (std::nothrow) Team);
    if (made->team_ == nullptr) return Status::error(StatusCode::kOutOfMemory, "cannot allocate a thread pool");
    Team* team = made->team_.get();
    // The standard library reports a refused thread by an exception; it ends here.
    try {
      team->workers.reserve(static_cast<std::size_t>(threads - 1));
      for (int t = 1; t < threads; ++t) team->workers.emplace_back([team, t] { team->work(t); });
    } catch (const std::exception& error) {
      return Status::error(StatusCode::kInternal, "cannot start thread %d of %d: %s",
                           static_cast<int>(team->workers.size()) + 2, threads, error.what());
    }
  }
  *pool = std::move(made);
  return Status::ok();
}

Status ThreadPool::run(void (*task)(void*, int), void* context) noexcept { return run(task, context, true); }

Status ThreadPool::run_available(void (*task)(void*, int), void* context) noexcept { return run(task, context, false); }

Status ThreadPool::run(void (*task)(void*, int), void* context, bool all) noexcept {
  if (inside_task) {
    return Status::error(StatusCode::kInvalidArgument, "a task on a thread pool cannot run another task on one");
  }
  if (team_ == nullptr) {
    inside_task = true;
    task(context, 0);
    inside_task = false;
    return Status::ok();
  }
  Team& team = *team_;
  const std::lock_guard<std::mutex> turn(team.turn);
  team.task = task;
  team.context = context;
  team.finished_workers.store(0, std::memory_order_relaxed);
  team.awaited_workers.store(-1, std::memory_order_relaxed);
  team.publish();
  inside_task = true;
  task(context, 0);
  inside_task = false;
  team.wait_for_workers(all ? threads_ - 1 : -1);
  return Status::ok();
}

Range split_evenly(std::int64_t count, std::int64_t unit, int threads, int thread) noexcept {
  const std::int64_t units = (count + unit - 1) / unit;
  const std::int64_t begin = units * thread / threads, end = units * (thread + 1) / threads;
  return {std::min(begin * unit, count), std::min(end * unit, count)};
}

Range split_by_cost(Span<const std::uint64_t> before, std::uint64_t each, std::int64_t unit, int threads,
                    int thread, std::int64_t times) noexcept {
  const auto once = static_cast<std::int64_t>(before.size()) - 1, count = once * times;
  if (count <= 0) return {};
  const auto cost_of_first = [&](std::int64_t items) {
    const auto i = static_cast<std::size_t>(items);
    return before[i] - before[0] + each * i;
  };
  const auto cost_before = [&](std::int64_t item) {
    return static_cast<std::uint64_t>(item / once) * cost_of_first(once) + cost_of_first(item % once);
  };
  const std::uint64_t total = cost_before(count);
  // Cut number t: the first item with at least t/threads of the total before it, to the nearest unit.
  const auto cut = [&](int t) -> std::int64_t {
    if (t <= 0) return 0;
    if (t >= threads) return count;
    const auto wanted = static_cast<std::uint64_t>(static_cast<double>(total) * t / threads);
    std::int64_t low = 0, high = count;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (cost_before(middle) < wanted) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return std::min((low + unit / 2) / unit * unit, count);
  };
  return {cut(thread), cut(thread + 1)};
}

}  // namespace sqc
