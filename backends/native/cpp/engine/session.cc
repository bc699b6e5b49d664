#include "engine/session.h"

#include <algorithm>
#include <chrono>
#include <new>

#include "engine/memory_plan.h"
#include "engine/operators.h"

namespace sqc {
namespace {

int length(Span<const char> name) noexcept { return static_cast<int>(name.size() < 80 ? name.size() : 80); }

// An operator's error, with what it was and where it came from.
Status located(const Status& status, const Plan& plan, const format::Operator& step) noexcept {
  const Span<const char> name = plan.name(step.name_offset, step.name_bytes);
  return Status::error(status.code(), "%s at %.*s: %s", find_operator(step.kind)->name, length(name), name.data(),
                       status.message());
}

Status out_of_memory() noexcept { return Status::error(StatusCode::kOutOfMemory, "there is not enough memory"); }

}  // namespace

Status Session::create(std::shared_ptr<const Model> model, int threads, Isa isa,
                       std::unique_ptr<Session>* result) noexcept {
  const Plan& plan = model->plan();
  return create(std::move(model), plan, threads, isa, nullptr, result);
}

Status Session::create_generation(std::shared_ptr<const Model> model, int threads, Isa isa, GenerationState* state,
                                  std::unique_ptr<Session>* result) noexcept {
  const Plan* plan = model->generation();
  if (plan == nullptr) return Status::error(StatusCode::kUnsupported, "the model has no plan that continues texts");
  return create(std::move(model), *plan, threads, isa, state, result);
}

Status Session::create(std::shared_ptr<const Model> model, const Plan& plan, int threads, Isa isa,
                       GenerationState* state, std::unique_ptr<Session>* result) noexcept {
  try {
    std::unique_ptr<Session> session(new Session(std::move(model), plan, isa, state));
    SQC_RETURN_IF_ERROR(ThreadPool::create(threads, &session->pool_));
    SQC_RETURN_IF_ERROR(session->find_symbols());
    *result = std::move(session);
    return Status::ok();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}

// Each symbol is the size of some input's dimension.
Status Session::find_symbols() noexcept {
  const Plan& plan = plan_;
  constexpr std::uint32_t unknown = format::kNone;
  sources_.assign(plan.symbols.size(), Source{unknown, 0});
  symbols_.assign(plan.symbols.size(), 0);
  for (std::uint32_t i = 0; i < plan.inputs.size(); ++i) {
    const format::Value& value = plan.values[plan.inputs[i].value];
    for (int d = 0; d < value.rank; ++d) {
      const format::Size& size = plan.sizes[plan.lists[value.first_size + d]];
      const format::Instruction& code = plan.code[size.first];
      if (size.count != 1 || code.opcode != static_cast<std::uint32_t>(format::Opcode::symbol)) continue;
      Source& source = sources_[static_cast<std::size_t>(code.argument)];
      if (source.input == unknown) source = {i, d};
    }
  }
  for (const Source& source : sources_) {
    if (source.input == unknown) return Status::error(StatusCode::kDamaged, "the file is damaged: no input has the size of a symbol");
  }
  return Status::ok();
}

Status Session::run(Span<const InputView> inputs, std::vector<std::int64_t>* times_ns) noexcept {
  current_ = nullptr;
  SQC_RETURN_IF_ERROR(bind(inputs));
  Execution* execution = nullptr;
  SQC_RETURN_IF_ERROR(find_execution(&execution));
  SQC_RETURN_IF_ERROR(check_inputs(inputs, *execution));
  if (arena_.size() < static_cast<std::size_t>(execution->arena_bytes)) {
    SQC_RETURN_IF_ERROR(arena_.allocate(static_cast<std::size_t>(execution->arena_bytes)));
  }
  if (scratch_.size() < static_cast<std::size_t>(execution->scratch_bytes)) {
    SQC_RETURN_IF_ERROR(scratch_.allocate(static_cast<std::size_t>(execution->scratch_bytes)));
  }
  const Plan& plan = plan_;
  for (Tensor& tensor : execution->tensors) {
    if (tensor.storage < 0) continue;  // a value that no operator defines or uses
    const Storage& storage = execution->storages[static_cast<std::size_t>(tensor.storage)];
    const std::uint8_t* begin = nullptr;
    switch (storage.kind) {
      case format::ValueKind::input: begin = static_cast<const std::uint8_t*>(inputs[storage.source].data); break;
      case format::ValueKind::constant: begin = plan.file + plan.tensors[storage.source].offset; break;
      case format::ValueKind::computed:
        begin = storage.state < 0 ? arena_.data() + storage.offset : state_->tensor(storage.state, state_->rows[0].slot);
        break;
    }
    // Only outputs are written to, and those lie in the arena.
    tensor.data = const_cast<std::uint8_t*>(begin + tensor.offset);
  }
  SQC_RETURN_IF_ERROR(run_steps(*execution, times_ns));
  execution->last_use = ++runs_;
  current_ = execution;
  return Status::ok();
}

const Tensor& Session::output(std::size_t i) const noexcept {
  return current_->tensors[plan_.outputs[i].value];
}

Status Session::bind(Span<const InputView> inputs) noexcept {
  const Plan& plan = plan_;
  if (inputs.size() != plan.inputs.size()) {
    return Status::error(StatusCode::kInvalidArgument, "%zu inputs were given; the model takes %zu", inputs.size(),
                         plan.inputs.size());
  }
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const format::Port& port = plan.inputs[i];
    const format::Value& value = plan.values[port.value];
    const Span<const char> name = plan.name(port.name_offset, port.name_bytes);
    if (inputs[i].dtype != static_cast<DType>(value.dtype) || inputs[i].rank != value.rank) {
      return Status::error(StatusCode::kInvalidArgument, "input '%.*s' is %s with %d dimensions; the model takes %s with %d",
                           length(name), name.data(), dtype_name(inputs[i].dtype), inputs[i].rank,
                           dtype_name(static_cast<DType>(value.dtype)), value.rank);
    }
  }
  for (std::size_t s = 0; s < symbols_.size(); ++s) {
    const format::Symbol& symbol = plan.symbols[s];
    symbols_[s] = inputs[sources_[s].input].shape[sources_[s].dimension];
    if (symbols_[s] < symbol.low || symbols_[s] > symbol.high) {
      const Span<const char> name = plan.name(symbol.name_offset, symbol.name_bytes);
      return Status::error(StatusCode::kInvalidArgument, "%.*s is %lld; the model takes %lld to %lld", length(name),
                           name.data(), static_cast<long long>(symbols_[s]), static_cast<long long>(symbol.low),
                           static_cast<long long>(symbol.high));
    }
  }
  return Status::ok();
}

Status Session::check_inputs(Span<const InputView> inputs, const Execution& execution) noexcept {
  const Plan& plan = plan_;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& expected = execution.tensors[plan.inputs[i].value];
    for (int d = 0; d < expected.rank; ++d) {
      if (inputs[i].shape[d] == expected.shape[d]) continue;
      const Span<const char> name = plan.name(plan.inputs[i].name_offset, plan.inputs[i].name_bytes);
      return Status::error(StatusCode::kInvalidArgument, "dimension %d of input '%.*s' is %lld; the model takes %lld here",
                           d, length(name), name.data(), static_cast<long long>(inputs[i].shape[d]),
                           static_cast<long long>(expected.shape[d]));
    }
  }
  return Status::ok();
}

Status Session::find_execution(Execution** result) noexcept {
  for (const std::unique_ptr<Execution>& execution : executions_) {
    if (execution->symbols == symbols_) {
      *result = execution.get();
      return Status::ok();
    }
  }
  try {
    auto made = std::make_unique<Execution>();
    made->symbols = symbols_;
    SQC_RETURN_IF_ERROR(prepare(*made));
    if (executions_.size() < kPrepared) {
      executions_.push_back(std::move(made));
      *result = executions_.back().get();
      return Status::ok();
    }
    auto oldest = std::min_element(executions_.begin(), executions_.end(),
                                   [](const auto& a, const auto& b) { return a->last_use < b->last_use; });
    *oldest = std::move(made);
    *result = oldest->get();
    return Status::ok();
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
}

Status Session::prepare(Execution& e) {
  const Plan& plan = plan_;
  e.sizes.resize(plan.sizes.size());
  for (std::uint32_t i = 0; i < plan.sizes.size(); ++i) {
    SQC_RETURN_IF_ERROR(evaluate_size(plan, i, e.symbols.data(), &e.sizes[i]));
  }
  e.tensors.resize(plan.values.size());
  for (std::size_t i = 0; i < plan.values.size(); ++i) {
    const format::Value& value = plan.values[i];
    Tensor& tensor = e.tensors[i];
    SQC_RETURN_IF_ERROR(make_tensor(plan, value, e.sizes.data(), &tensor));
    const auto kind = static_cast<format::ValueKind>(value.kind);
    if (kind == format::ValueKind::computed) continue;
    tensor.storage = static_cast<std::int32_t>(e.storages.size());
    e.storages.push_back({kind, value.source, 0, -1});
  }
  return prepare_steps(e);
}

// Goes through the operators as a run does: gives each output its memory, or that of which it is a view.
Status Session::prepare_steps(Execution& e) {
  const Plan& plan = plan_;
  std::vector<Lifetime> lifetimes(e.storages.size(), Lifetime{0, 0, 0, 0});
  const auto last_step = static_cast<std::int32_t>(plan.operators.size());
  for (std::int32_t s = 0; s < last_step; ++s) {
    const format::Operator& step = plan.operators[static_cast<std::size_t>(s)];
    const OperatorInfo& info = *find_operator(step.kind);
    PrepareContext context(plan, step, e.tensors.data(), e.sizes.data());
    context.threads = pool_->threads();
    context.state = state_;
    for (int i = 0; i < context.inputs(); ++i) {
      if (context.has(i) && context.in(i).storage < 0) return located(misfit("input %d is not computed yet", i), plan, step);
    }
    for (int i = 0; i < context.outputs(); ++i) {
      if (context.out(i).storage >= 0) return located(misfit("output %d is computed twice", i), plan, step);
      for (int j = 0; j < i; ++j) {
        if (context.value_of_output(i) == context.value_of_output(j)) return located(misfit("two outputs are one"), plan, step);
      }
    }
    const Status status = info.prepare(context);
    if (!status.is_ok()) return located(status, plan, step);
    for (int i = 0; i < context.inputs() && !context.checks_layouts; ++i) {
      if (context.has(i) && context.in(i).layout != Layout::plain) return located(misfit("input %d is packed", i), plan, step);
    }
    e.scratch_bytes = std::max(e.scratch_bytes, context.scratch_bytes);
    for (int i = 0; i < context.outputs() && context.runs; ++i) {
      Tensor& out = context.out(i);
      out.storage = static_cast<std::int32_t>(e.storages.size());
      e.storages.push_back({format::ValueKind::computed, 0, 0, i == 0 ? context.state_number : -1});
      lifetimes.push_back({s, s, i == 0 && context.state_number >= 0 ? 0 : out.bytes(), 0});
    }
    if (context.runs) e.steps.push_back(static_cast<std::uint32_t>(s));
    for (int i = 0; i < context.inputs(); ++i) {
      if (context.has(i)) lifetimes[static_cast<std::size_t>(context.in(i).storage)].last = s;
    }
  }
  for (const format::Port& port : plan.outputs) {
    const Tensor& tensor = e.tensors[port.value];
    if (tensor.storage < 0 || !tensor.is_contiguous() || tensor.layout != Layout::plain) {
      return Status::error(StatusCode::kDamaged, "the file is damaged: an output is not computed");
    }
    lifetimes[static_cast<std::size_t>(tensor.storage)].last = last_step;
  }
  std::int64_t total = 0;
  for (const Lifetime& lifetime : lifetimes) {
    if (__builtin_add_overflow(total, lifetime.bytes, &total)) return out_of_memory();
  }
  // Inputs and constants have no bytes here, and so take no room.
  e.arena_bytes = std::max<std::int64_t>(plan_memory(lifetimes), 64);
  for (std::size_t i = 0; i < e.storages.size(); ++i) e.storages[i].offset = lifetimes[i].offset;
  return Status::ok();
}

Status Session::run_steps(Execution& e, std::vector<std::int64_t>* times_ns) noexcept {
  const Plan& plan = plan_;
  try {
    if (times_ns != nullptr) times_ns->assign(plan.operators.size(), 0);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  }
  using Clock = std::chrono::steady_clock;
  Clock::time_point begin = times_ns != nullptr ? Clock::now() : Clock::time_point();
  for (const std::uint32_t s : e.steps) {
    const format::Operator& step = plan.operators[s];
    RunContext context(plan, step, e.tensors.data(), e.sizes.data(), *pool_, kernels_, scratch_.data(), state_);
    const Status status = find_operator(step.kind)->run(context);
    if (!status.is_ok()) return located(status, plan, step);
    if (times_ns != nullptr) {
      const Clock::time_point end = Clock::now();
      (*times_ns)[s] = std::chrono::duration_cast<std::chrono::nanoseconds>(end - begin).count();
      begin = end;
    }
  }
  return Status::ok();
}

}  // namespace sqc
