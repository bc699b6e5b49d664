// A model ready to run: threads, kernels, memory, and what was prepared for the sizes seen so far.

#ifndef SQC_ENGINE_SESSION_H_
#define SQC_ENGINE_SESSION_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/isa.h"
#include "base/thread_pool.h"
#include "engine/generation_state.h"
#include "engine/kernels.h"
#include "engine/model.h"
#include "engine/tensor.h"

namespace sqc {

// A tensor of the caller's: contiguous, and alive as long as `run` needs it.
struct InputView {
  DType dtype;
  int rank;
  const std::int64_t* shape;
  const void* data;
};

// Not for several threads at once; several sessions may share a model.
class Session {
 public:
  // Sets of sizes that stay prepared; the one that was not used for longest goes.
  static constexpr std::size_t kPrepared = 16;

  static Status create(std::shared_ptr<const Model> model, int threads, Isa isa,
                       std::unique_ptr<Session>* session) noexcept;

  // The same for the plan that continues texts, whose past is in `state`; both outlive the session.
  static Status create_generation(std::shared_ptr<const Model> model, int threads, Isa isa, GenerationState* state,
                                  std::unique_ptr<Session>* session) noexcept;

  // Runs the model on one tensor for each input. Allocates only when it sees new sizes.
  Status run(Span<const InputView> inputs) noexcept { return run(inputs, nullptr); }

  // The same, and how long each operator of the plan took, in ns; 0 for those that had nothing to compute.
  Status profile(Span<const InputView> inputs, std::vector<std::int64_t>* times_ns) noexcept {
    return run(inputs, times_ns);
  }

  // Output `i` of the last successful run: contiguous, and valid until the next one.
  const Tensor& output(std::size_t i) const noexcept;

  const Plan& plan() const noexcept { return plan_; }
  int threads() const noexcept { return pool_->threads(); }
  Isa isa() const noexcept { return kernels_.isa; }
  // Bytes of the memory that tensors share, as far as it was needed by now.
  std::size_t memory_bytes() const noexcept { return arena_.size() + scratch_.size(); }

 private:
  // Where tensors take their bytes from.
  struct Storage {
    format::ValueKind kind;
    std::uint32_t source;   // of inputs and constants
    std::int64_t offset;    // in the arena, of what is computed
    std::int64_t state;     // the number of what is kept, or -1
  };
  // Everything that follows from the sizes of one call.
  struct Execution {
    std::vector<std::int64_t> symbols, sizes;
    std::vector<Tensor> tensors;           // by value
    std::vector<Storage> storages;
    std::vector<std::uint32_t> steps;      // operators that compute
    std::int64_t arena_bytes = 0, scratch_bytes = 0;
    std::uint64_t last_use = 0;
  };

  Session(std::shared_ptr<const Model> model, const Plan& plan, Isa isa, GenerationState* state) noexcept
      : model_(std::move(model)), plan_(plan), kernels_(isa), state_(state) {}

  static Status create(std::shared_ptr<const Model> model, const Plan& plan, int threads, Isa isa,
                       GenerationState* state, std::unique_ptr<Session>* session) noexcept;

  Status run(Span<const InputView> inputs, std::vector<std::int64_t>* times_ns) noexcept;
  Status find_symbols() noexcept;
  Status bind(Span<const InputView> inputs) noexcept;
  Status check_inputs(Span<const InputView> inputs, const Execution& execution) noexcept;
  Status find_execution(Execution** execution) noexcept;
  Status prepare(Execution& execution);
  Status prepare_steps(Execution& execution);
  Status run_steps(Execution& execution, std::vector<std::int64_t>* times_ns) noexcept;

  std::shared_ptr<const Model> model_;
  const Plan& plan_;
  Kernels kernels_;
  GenerationState* state_;
  std::unique_ptr<ThreadPool> pool_;
  // Which size of which input each symbol is.
  struct Source {
    std::uint32_t input;
    int dimension;
  };
  std::vector<Source> sources_;
  std::vector<std::int64_t> symbols_;
  std::vector<std::unique_ptr<Execution>> executions_;
  Execution* current_ = nullptr;
  std::uint64_t runs_ = 0;
  AlignedBuffer arena_, scratch_;
};

}  // namespace sqc

#endif  // SQC_ENGINE_SESSION_H_
