// A fixed team of threads that runs one task at a time.
//
// A model runs thousands of operators a second, each a few dozen microseconds long, so waking a thread
// must cost less than that: workers spin for about 50 µs after a task, then sleep. Spinning longer
// ruins machines with more runnable threads than cores; sleeping at once costs a wake-up an operator.

#ifndef SQC_BASE_THREAD_POOL_H_
#define SQC_BASE_THREAD_POOL_H_

#include <cstdint>
#include <memory>

#include "base/span.h"
#include "base/status.h"

namespace sqc {

class ThreadPool {
 public:
  static constexpr int kMaxThreads = 256;

  // The thread that calls `run` works too: a pool of one starts no thread.
  static Status create(int threads, std::unique_ptr<ThreadPool>* pool) noexcept;

  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept { return threads_; }

  // Calls task(context, t) once for each t in [0, threads()), on as many threads, and returns when all
  // have returned. Callers on several threads take turns. An error when called from inside a task: the
  // team is busy with that very task.
  Status run(void (*task)(void* context, int thread), void* context) noexcept;

  // Calls task(context, 0), and task(context, t) on each thread that comes before it has returned; nobody waits for the
  // others. For tasks that do all there is to do, however many threads take part: a sleeping thread, or one whose core
  // another process has, costs nothing. Other than that as `run`.
  Status run_available(void (*task)(void* context, int thread), void* context) noexcept;

  // The same for a callable object, which is not copied.
  template <typename F>
  Status run(F&& function) noexcept {
    return run(call<F>, address_of(function));
  }
  template <typename F>
  Status run_available(F&& function) noexcept {
    return run_available(call<F>, address_of(function));
  }

 private:
  template <typename F>
  static void call(void* context, int thread) {
    (*static_cast<std::remove_reference_t<F>*>(context))(thread);
  }
  template <typename F>
  static void* address_of(F& function) noexcept {
    return const_cast<void*>(static_cast<const void*>(&function));
  }
  Status run(void (*task)(void*, int), void* context, bool all) noexcept;

  struct Team;  // keeps <thread> and <condition_variable> out of every file that runs a task

  explicit ThreadPool(int threads) noexcept;

  int threads_;
  std::unique_ptr<Team> team_;  // null for a pool of one
};

struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// The part of `thread` when `count` equally costly items are split, in multiples of `unit`, which only
// the last part may break. Parts differ by at most one unit.
Range split_evenly(std::int64_t count, std::int64_t unit, int threads, int thread) noexcept;

// The same for items of unequal cost, such as the rows of a sparse matrix: item i costs `each` plus
// before[i + 1] - before[i]. `before` has count + 1 ascending entries; all items come `times` times, one round
// after the other, and are counted on.
Range split_by_cost(Span<const std::uint64_t> before, std::uint64_t each, std::int64_t unit, int threads,
                    int thread, std::int64_t times = 1) noexcept;

}  // namespace sqc

#endif  // SQC_BASE_THREAD_POOL_H_
