#include "include/sqcompile.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>

#include "base/cpu.h"
#include "engine/generator.h"
#include "engine/model.h"
#include "engine/session.h"

struct sqc_model {
  std::shared_ptr<const sqc::Model> model;
};

struct sqc_session {
  std::unique_ptr<sqc::Session> session;
  bool has_run;
};

struct sqc_generator {
  std::unique_ptr<sqc::Generator> generator;
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

// The instruction set, and the threads of one a core where 0 are asked for.
sqc_status choose(int* threads, sqc::Isa* isa) noexcept {
  if (*threads == 0) *threads = std::clamp(sqc::cpu_info().physical_cores, 1, sqc::ThreadPool::kMaxThreads);
  return to_c(sqc::default_isa(isa));
}

// The engine's form of texts; null where there is no memory.
std::unique_ptr<sqc::RowTokens[]> rows_of(const sqc_text* texts, size_t count) noexcept {
  std::unique_ptr<sqc::RowTokens[]> rows(new (std::nothrow) sqc::RowTokens[count > 0 ? count : 1]);
  for (size_t i = 0; rows != nullptr && i < count; ++i) rows[i] = {texts[i].row, texts[i].tokens, texts[i].count};
  return rows;
}

struct Callback {
  sqc_token_callback function;
  void* user;
};

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
  const sqc_status chosen = choose(&threads, &isa);
  if (chosen.code != SQC_OK) return chosen;
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

int64_t sqc_model_limit(const sqc_model* model) {
  return model->model->generation() != nullptr ? model->model->generation_settings().limit : 0;
}
int64_t sqc_model_vocabulary(const sqc_model* model) { return model->model->generation_settings().vocabulary; }

sqc_status sqc_generator_create(const sqc_model* model, int threads, int64_t rows, int64_t capacity,
                                sqc_kv_type kv_type, sqc_generator** generator) {
  if (model == nullptr || generator == nullptr) return invalid("a pointer is null");
  *generator = nullptr;
  if (kv_type != SQC_KV_F32 && kv_type != SQC_KV_I8) return invalid("there is no such type of cache");
  sqc::Isa isa = sqc::Isa::scalar;
  const sqc_status chosen = choose(&threads, &isa);
  if (chosen.code != SQC_OK) return chosen;
  std::unique_ptr<sqc_generator> made(new (std::nothrow) sqc_generator);
  if (made == nullptr) return out_of_memory();
  const sqc::KvType type = kv_type == SQC_KV_I8 ? sqc::KvType::s8 : sqc::KvType::f32;
  const sqc::Status status = sqc::Generator::create(model->model, threads, isa, rows, capacity, type, &made->generator);
  if (status.is_ok()) *generator = made.release();
  return to_c(status);
}

void sqc_generator_destroy(sqc_generator* generator) { delete generator; }

sqc_status sqc_generator_feed(sqc_generator* generator, const sqc_text* texts, size_t count) {
  if (generator == nullptr || (texts == nullptr && count > 0)) return invalid("a pointer is null");
  const std::unique_ptr<sqc::RowTokens[]> rows = rows_of(texts, count);
  if (rows == nullptr) return out_of_memory();
  return to_c(generator->generator->feed({rows.get(), count}));
}

sqc_status sqc_generator_logits(const sqc_generator* generator, int64_t row, const float** logits, int64_t* count) {
  if (generator == nullptr || logits == nullptr || count == nullptr) return invalid("a pointer is null");
  if (sqc_generator_length(generator, row) < 0) return invalid("there is no such row");
  if (!generator->generator->has_logits(row)) return invalid("the row has no logits: it is empty, or was taken back");
  *logits = generator->generator->logits(row);
  *count = generator->generator->outputs();
  return to_c(sqc::Status::ok());
}

int64_t sqc_generator_length(const sqc_generator* generator, int64_t row) {
  return row >= 0 && row < generator->generator->rows() ? generator->generator->length(row) : -1;
}

sqc_status sqc_generator_rewind(sqc_generator* generator, int64_t row, int64_t length) {
  if (generator == nullptr) return invalid("a pointer is null");
  return to_c(generator->generator->rewind(row, length));
}

sqc_status sqc_generator_generate(sqc_generator* generator, const sqc_text* prompts, size_t count,
                                  const sqc_sampling* sampling, sqc_token_callback callback, void* user) {
  if (generator == nullptr || (prompts == nullptr && count > 0) || sampling == nullptr || callback == nullptr ||
      (sampling->stop == nullptr && sampling->stop_count > 0)) {
    return invalid("a pointer is null");
  }
  const std::unique_ptr<sqc::RowTokens[]> rows = rows_of(prompts, count);
  if (rows == nullptr) return out_of_memory();
  const sqc::GenerateOptions options = {
      sampling->max_new_tokens,
      {sampling->temperature, sampling->top_k, sampling->top_p, sampling->seed},
      {sampling->stop, sampling->stop_count}};
  Callback both = {callback, user};
  const auto call = [](void* data, std::int64_t row, std::int64_t token) {
    const auto* own = static_cast<const Callback*>(data);
    return own->function(own->user, row, token) != 0;
  };
  return to_c(generator->generator->generate({rows.get(), count}, options, call, &both));
}
