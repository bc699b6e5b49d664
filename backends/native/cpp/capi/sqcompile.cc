#include "include/sqcompile.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "base/cpu.h"
#include "engine/model.h"
#include "engine/session.h"

struct sqc_model {
  std::shared_ptr<const sqc::Model> model;
};

struct sqc_session {
  std::unique_ptr<sqc::Session> session;
  bool has_run;
};

namespace {

static_assert(SQC_MAX_RANK == sqc::kMaxRank);
static_assert(SQC_BOOL == static_cast<int>(sqc::DType::boolean));
static_assert(SQC_NOT_FOUND == static_cast<int>(sqc::StatusCode::kNotFound));

sqc_status to_c(const sqc::Status& status) noexcept {
  sqc_status result;
  result.code = static_cast<sqc_code>(status.code());
  std::memset(result.message, 0, sizeof result.message);
  std::strncpy(result.message, status.message(), sizeof result.message - 1);
  return result;
}

sqc_status invalid(const char* text) noexcept {
  return to_c(sqc::Status::error(sqc::StatusCode::kInvalidArgument, "%s", text));
}

sqc_status out_of_memory() noexcept {
  return to_c(sqc::Status::error(sqc::StatusCode::kOutOfMemory, "there is not enough memory"));
}

sqc_status describe(const sqc::Plan& plan, sqc::Span<const sqc::format::Port> ports, size_t index,
                    sqc_port* port) noexcept {
  if (index >= ports.size()) return invalid("the model has no such input or output");
  const sqc::format::Value& value = plan.values[ports[index].value];
  const sqc::Span<const char> name = plan.name(ports[index].name_offset, ports[index].name_bytes);
  *port = {name.data(), name.size(), static_cast<sqc_dtype>(value.dtype), value.rank, {}};
  for (int d = 0; d < value.rank; ++d) {
    const sqc::format::Size& code = plan.sizes[plan.lists[value.first_size + static_cast<std::uint32_t>(d)]];
    const sqc::format::Instruction& first = plan.code[code.first];
    const bool fixed = code.count == 1 && first.opcode == static_cast<std::uint32_t>(sqc::format::Opcode::constant);
    port->shape[d] = fixed ? first.argument : -1;
  }
  return to_c(sqc::Status::ok());
}

}  // namespace

sqc_status sqc_model_open(const char* path, sqc_model** model) {
  if (path == nullptr || model == nullptr) return invalid("a pointer is null");
  *model = nullptr;
  std::unique_ptr<sqc_model> made(new (std::nothrow) sqc_model);
  if (made == nullptr) return out_of_memory();
  const sqc::Status status = sqc::Model::open(path, &made->model);
  if (status.is_ok()) *model = made.release();
  return to_c(status);
}

void sqc_model_close(sqc_model* model) { delete model; }

size_t sqc_model_input_count(const sqc_model* model) { return model->model->plan().inputs.size(); }
size_t sqc_model_output_count(const sqc_model* model) { return model->model->plan().outputs.size(); }

sqc_status sqc_model_input(const sqc_model* model, size_t index, sqc_port* port) {
  return describe(model->model->plan(), model->model->plan().inputs, index, port);
}

sqc_status sqc_model_output(const sqc_model* model, size_t index, sqc_port* port) {
  return describe(model->model->plan(), model->model->plan().outputs, index, port);
}

sqc_status sqc_session_create(const sqc_model* model, int threads, sqc_session** session) {
  if (model == nullptr || session == nullptr) return invalid("a pointer is null");
  *session = nullptr;
  sqc::Isa isa = sqc::Isa::scalar;
  const sqc::Status found = sqc::default_isa(&isa);
  if (!found.is_ok()) return to_c(found);
  if (threads == 0) threads = std::clamp(sqc::cpu_info().physical_cores, 1, sqc::ThreadPool::kMaxThreads);
  std::unique_ptr<sqc_session> made(new (std::nothrow) sqc_session);
  if (made == nullptr) return out_of_memory();
  made->has_run = false;
  const sqc::Status status = sqc::Session::create(model->model, threads, isa, &made->session);
  if (status.is_ok()) *session = made.release();
  return to_c(status);
}

void sqc_session_destroy(sqc_session* session) { delete session; }
int sqc_session_threads(const sqc_session* session) { return session->session->threads(); }
const char* sqc_session_isa(const sqc_session* session) { return sqc::isa_name(session->session->isa()); }

sqc_status sqc_session_run(sqc_session* session, const sqc_tensor* inputs, size_t count) {
  if (session == nullptr || (inputs == nullptr && count > 0)) return invalid("a pointer is null");
  session->has_run = false;
  constexpr size_t kOnStack = 16;
  sqc::InputView few[kOnStack];
  std::unique_ptr<sqc::InputView[]> many(count > kOnStack ? new (std::nothrow) sqc::InputView[count] : nullptr);
  if (count > kOnStack && many == nullptr) return out_of_memory();
  sqc::InputView* views = many != nullptr ? many.get() : few;
  for (size_t i = 0; i < count; ++i) {
    if (inputs[i].rank < 0 || inputs[i].rank > SQC_MAX_RANK) return invalid("an input has a wrong rank");
    views[i] = {static_cast<sqc::DType>(inputs[i].dtype), inputs[i].rank, inputs[i].shape, inputs[i].data};
  }
  const sqc::Status status = session->session->run({views, count});
  session->has_run = status.is_ok();
  return to_c(status);
}

sqc_status sqc_session_output(const sqc_session* session, size_t index, sqc_tensor* output) {
  if (session == nullptr || output == nullptr) return invalid("a pointer is null");
  if (!session->has_run) return invalid("there is no successful run");
  if (index >= session->session->plan().outputs.size()) return invalid("the model has no such output");
  const sqc::Tensor& tensor = session->session->output(index);
  *output = {static_cast<sqc_dtype>(tensor.dtype), tensor.rank, {}, tensor.data};
  for (int d = 0; d < tensor.rank; ++d) output->shape[d] = tensor.shape[d];
  return to_c(sqc::Status::ok());
}
