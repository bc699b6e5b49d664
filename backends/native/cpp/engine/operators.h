// What an operator of a plan is: how many operands it takes, what fits, and how it runs.

#ifndef SQC_ENGINE_OPERATORS_H_
#define SQC_ENGINE_OPERATORS_H_

#include <cstdint>

#include "base/isa.h"
#include "base/span.h"
#include "base/status.h"
#include "base/thread_pool.h"
#include "engine/plan.h"
#include "engine/tensor.h"

namespace sqc {

// The operands of one operator in one execution.
class Operands {
 public:
  Operands(const Plan& plan, const format::Operator& step, Tensor* tensors, const std::int64_t* sizes) noexcept
      : step_(step),
        list_(plan.lists.data() + step.first_list),
        floats_(plan.floats.data() + step.first_float),
        tensors_(tensors),
        sizes_(sizes) {}

  int inputs() const noexcept { return step_.inputs; }
  int ints() const noexcept { return step_.ints; }
  // Whether input i is there: trailing ones may be missing, others left out.
  bool has(int i) const noexcept { return i < step_.inputs && list_[i] != format::kNone; }
  const Tensor& in(int i) const noexcept { return tensors_[list_[i]]; }
  Tensor& out(int i = 0) const noexcept { return tensors_[list_[step_.inputs + i]]; }
  std::int64_t integer(int i) const noexcept { return sizes_[list_[step_.inputs + step_.outputs + i]]; }
  double number(int i) const noexcept { return floats_[i]; }
  std::uint32_t value_of_input(int i) const noexcept { return list_[i]; }
  std::uint32_t value_of_output(int i) const noexcept { return list_[step_.inputs + i]; }
  int outputs() const noexcept { return step_.outputs; }

 private:
  const format::Operator& step_;
  const std::uint32_t* list_;
  const double* floats_;
  Tensor* tensors_;
  const std::int64_t* sizes_;
};

class GenerationState;

// For `prepare`, once for each set of sizes: inputs have shapes and strides, outputs have the plan's shapes
// and contiguous strides. Nothing has data yet.
class PrepareContext : public Operands {
 public:
  using Operands::Operands;

  int threads = 1;
  // What the text so far has left behind; null where a whole call is computed at once.
  const GenerationState* state = nullptr;

  // Output i is not computed: it shows elements of `base`, `offset` elements from its first one on. Its
  // strides are already set. An operator whose outputs are all views does not run.
  void view(int i, const Tensor& base, std::int64_t offset) noexcept {
    out(i).storage = base.storage;
    out(i).offset = base.offset + offset * dtype_bytes(base.dtype);
    runs = false;
  }

  // Memory for the time of the run; the largest request of all operators is allocated once.
  void need_scratch(std::int64_t bytes) noexcept { scratch_bytes = bytes; }

  // Says that this operator has looked at the layout of each input; else all have to be plain.
  void accept_packed() noexcept { checks_layouts = true; }

  bool runs = true;
  bool checks_layouts = false;
  // Output 0 is what is kept under this number; -1: it is a tensor like others. Its strides are already set.
  std::int64_t state_number = -1;
  std::int64_t scratch_bytes = 0;
};

// The kernels of the instruction set that a session uses.
struct Kernels;

class RunContext : public Operands {
 public:
  RunContext(const Plan& plan, const format::Operator& step, Tensor* tensors, const std::int64_t* sizes,
             ThreadPool& pool, const Kernels& kernels, std::uint8_t* scratch, const GenerationState* state) noexcept
      : Operands(plan, step, tensors, sizes), pool(pool), kernels(kernels), scratch(scratch), state(state) {}

  ThreadPool& pool;
  const Kernels& kernels;
  std::uint8_t* scratch;  // aligned to 64 bytes
  const GenerationState* state;
};

// Says why operands do not fit; the session adds which operator it was.
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
Status misfit(const char* text, ...) noexcept;

#define SQC_REQUIRE(condition)                                    \
  do {                                                            \
    if (!(condition)) return ::sqc::misfit("not %s", #condition); \
  } while (false)

enum class OperatorId : std::uint16_t {
#define SQC_OPERATOR(id, name, ...) name = id,
#include "engine/operators.inc"
#undef SQC_OPERATOR
};

struct OperatorInfo {
  std::uint16_t id;
  const char* name;
  std::uint16_t min_inputs, max_inputs, outputs, min_ints, max_ints, floats;
  std::uint16_t required_inputs;  // the ones after them may be left out
  // Checks that the operands fit, so that `run` stays inside them whatever they hold.
  Status (*prepare)(PrepareContext&) noexcept;
  // Computes the outputs. An error only where the data is at fault, such as an index out of range.
  Status (*run)(RunContext&) noexcept;
};

// Checks what the packed constants of an operator hold, once for each file: kernels follow the masks and
// starts of sparse weights without looking. Says nothing about operators without such constants.
Status check_packed_weights(const Plan& plan, const format::Operator& step) noexcept;

// The operator with this number, or null.
const OperatorInfo* find_operator(std::uint16_t id) noexcept;
Span<const OperatorInfo> all_operators() noexcept;

// Each operator's two functions, as operators.inc lists them.
#define SQC_OPERATOR(id, name, family, ...) \
  Status prepare_##family(PrepareContext&) noexcept; \
  Status run_##name(RunContext&) noexcept;
#include "engine/operators.inc"
#undef SQC_OPERATOR

}  // namespace sqc

#endif  // SQC_ENGINE_OPERATORS_H_
