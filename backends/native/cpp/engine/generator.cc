#include "engine/generator.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "engine/operators.h"

namespace sqc {
namespace {

constexpr std::size_t kPorts = 4;
enum Port { kTokens, kPositions, kLast, kKeys };

long long wide(std::int64_t x) noexcept { return x; }

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "%s", what); }

// Sizes are prepared once each; keys grow with every token, so that few sizes serve all.
std::int64_t key_count(std::int64_t length, std::int64_t most) noexcept {
  std::int64_t keys = kAttentionKeyBlock;
  while (keys < length) keys *= 2;
  return keys < most ? keys : most;
}

}  // namespace

Status Generator::create(std::shared_ptr<const Model> model, int threads, Isa isa, std::int64_t rows,
                         std::int64_t capacity, KvType type, std::unique_ptr<Generator>* result) noexcept {
  if (rows < 1 || rows > kMostRows) {
    return Status::error(StatusCode::kInvalidArgument, "%lld rows; a generator has 1 to %lld", wide(rows), wide(kMostRows));
  }
  if (model->generation() == nullptr) {
    return Status::error(StatusCode::kUnsupported, "the model has no plan that continues texts");
  }
  // Whatever the file says: positions that are counted in 32 bits leave room for sums.
  const std::int64_t limit = std::min<std::int64_t>(model->generation_settings().limit, INT32_MAX);
  if (capacity < 1 || capacity > limit) {
    return Status::error(StatusCode::kInvalidArgument, "a row for %lld tokens; the model takes 1 to %lld", wide(capacity),
                         wide(limit));
  }
  try {
    std::unique_ptr<Generator> made(new Generator);
    made->capacity_ = capacity;
    made->settings_ = model->generation_settings();
    SQC_RETURN_IF_ERROR(made->find_ports(*model));
    const std::int64_t rounded = (capacity + 15) / 16 * 16;
    SQC_RETURN_IF_ERROR(made->state_.create(*model->generation(), rows, rounded, type));
    SQC_RETURN_IF_ERROR(Session::create_generation(std::move(model), threads, isa, &made->state_, &made->session_));
    const auto count = static_cast<std::size_t>(rows);
    made->lengths_.assign(count, 0);
    made->seen_.assign(count, 0);
    made->has_logits_.assign(count, false);
    made->logits_.assign(count * static_cast<std::size_t>(made->outputs_), 0.0f);
    made->order_.assign(static_cast<std::size_t>(made->outputs_), 0);
    made->batch_.reserve(count);
    made->active_.reserve(count);
    made->chosen_.assign(count, 0);
    // A chunk, or one token of every row.
    const std::size_t most = std::max(count, static_cast<std::size_t>(kChunk));
    made->tokens_.reserve(most);
    made->positions_.reserve(most);
    made->last_.reserve(count);
    made->keys_.resize(made->sees_keys_ ? static_cast<std::size_t>(std::max(rounded, kAttentionKeyBlock)) : 1);
    for (std::size_t i = 0; i < made->keys_.size(); ++i) made->keys_[i] = static_cast<std::int64_t>(i);
    *result = std::move(made);
    return Status::ok();
  } catch (const std::bad_alloc&) {
    return Status::error(StatusCode::kOutOfMemory, "there is not enough memory");
  }
}

// What the generation's plan takes and returns has to be what this class gives and reads; shapes are checked by
// each run.
Status Generator::find_ports(const Model& model) noexcept {
  const Plan& plan = *model.generation();
  const auto damaged = [] {
    return Status::error(StatusCode::kDamaged, "the file is damaged: the plan that continues texts has wrong inputs or outputs");
  };
  if (plan.inputs.size() != kPorts || plan.outputs.size() != 1) return damaged();
  for (std::size_t i = 0; i < kPorts; ++i) {
    const format::Value& value = plan.values[plan.inputs[i].value];
    if (value.dtype != static_cast<std::uint8_t>(DType::i64) || value.rank != (i == kTokens ? 2 : 1)) return damaged();
  }
  const format::Value& output = plan.values[plan.outputs[0].value];
  if (output.dtype != static_cast<std::uint8_t>(DType::f32) || output.rank != 2) return damaged();
  SQC_RETURN_IF_ERROR(evaluate_size(plan, plan.lists[output.first_size + 1], nullptr, &outputs_));
  if (outputs_ < 1 || outputs_ > INT32_MAX) return damaged();
  for (const format::Operator& step : plan.operators) {
    sees_keys_ = sees_keys_ || static_cast<OperatorId>(step.kind) == OperatorId::append;
    for (std::uint32_t i = 0; i < step.inputs; ++i) {
      sees_keys_ = sees_keys_ || plan.lists[step.first_list + i] == plan.inputs[kKeys].value;
    }
  }
  return Status::ok();
}

Status Generator::check(Span<const RowTokens> texts) noexcept {
  std::fill(seen_.begin(), seen_.end(), 0);
  for (const RowTokens& text : texts) {
    if (text.row < 0 || text.row >= rows()) {
      return Status::error(StatusCode::kInvalidArgument, "row %lld; the generator has %lld", wide(text.row), wide(rows()));
    }
    if (seen_[static_cast<std::size_t>(text.row)]++ != 0) {
      return Status::error(StatusCode::kInvalidArgument, "row %lld is given twice", wide(text.row));
    }
    if (text.count < 1 || text.tokens == nullptr) {
      return Status::error(StatusCode::kInvalidArgument, "row %lld gets no tokens", wide(text.row));
    }
    if (text.count > capacity_ - length(text.row)) {
      return Status::error(StatusCode::kInvalidArgument,
                           "the cache overflows: %lld tokens do not fit behind the %lld of row %lld, which has room for %lld",
                           wide(text.count), wide(length(text.row)), wide(text.row), wide(capacity_));
    }
    for (std::int64_t i = 0; i < text.count; ++i) {
      const std::int64_t token = text.tokens[i];
      if (token >= 0 && (settings_.vocabulary == 0 || token < settings_.vocabulary)) continue;
      return Status::error(StatusCode::kInvalidArgument, "token %lld of row %lld is %lld; the vocabulary has %lld",
                           wide(i), wide(text.row), wide(token), wide(settings_.vocabulary));
    }
  }
  return Status::ok();
}

Status Generator::feed(Span<const RowTokens> texts) noexcept {
  SQC_RETURN_IF_ERROR(check(texts));
  batch_.clear();
  tokens_.clear();
  for (const RowTokens& text : texts) {
    const auto row = static_cast<std::size_t>(text.row);
    const std::int64_t begin = length(text.row);
    has_logits_[row] = false;
    for (std::int64_t done = 0; done < text.count;) {
      const auto taken = static_cast<std::int64_t>(tokens_.size());
      const std::int64_t part = std::min(text.count - done, std::max<std::int64_t>(kChunk - taken, 1));
      batch_.push_back({text.row, taken, part, begin + done});
      tokens_.insert(tokens_.end(), text.tokens + done, text.tokens + done + part);
      done += part;
      // One token of every row goes together however many there are.
      const bool full = static_cast<std::int64_t>(tokens_.size()) >= kChunk && (part > 1 || done < text.count);
      if (full || state_.has_tensors()) SQC_RETURN_IF_ERROR(flush());
    }
  }
  return flush();
}

Status Generator::flush() noexcept {
  if (batch_.empty()) return Status::ok();
  const Status status = run();
  batch_.clear();
  tokens_.clear();
  return status;
}

Status Generator::run() noexcept {
  const auto count = static_cast<std::int64_t>(tokens_.size()), batch = static_cast<std::int64_t>(batch_.size());
  positions_.clear();
  last_.clear();
  std::int64_t longest = 0;
  for (const BatchRow& row : batch_) {
    for (std::int64_t i = 0; i < row.tokens; ++i) positions_.push_back(row.past + i);
    last_.push_back(row.first + row.tokens - 1);
    longest = std::max(longest, row.past + row.tokens);
  }
  const std::int64_t keys = sees_keys_ ? key_count(longest, state_.capacity()) : 1;
  const std::int64_t token_shape[2] = {1, count};
  const InputView inputs[kPorts] = {{DType::i64, 2, token_shape, tokens_.data()},
                                    {DType::i64, 1, &count, positions_.data()},
                                    {DType::i64, 1, &batch, last_.data()},
                                    {DType::i64, 1, &keys, keys_.data()}};
  state_.rows = {batch_.data(), batch_.size()};
  if (measures_) {
    SQC_RETURN_IF_ERROR(session_->profile({inputs, kPorts}, &times_ns_));
    for (std::size_t i = 0; i < times_ns_.size(); ++i) total_times_ns_[i] += times_ns_[i];
  } else {
    SQC_RETURN_IF_ERROR(session_->run({inputs, kPorts}));
  }
  const Tensor& logits = session_->output(0);
  if (logits.shape[0] != batch || logits.shape[1] != outputs_) {
    return Status::error(StatusCode::kDamaged, "the file is damaged: the plan that continues texts returns no logits");
  }
  for (std::int64_t i = 0; i < batch; ++i) {
    const BatchRow& row = batch_[static_cast<std::size_t>(i)];
    std::memcpy(logits_.data() + row.slot * outputs_, logits.as<float>() + i * outputs_,
                static_cast<std::size_t>(outputs_) * sizeof(float));
    lengths_[static_cast<std::size_t>(row.slot)] = row.past + row.tokens;
    has_logits_[static_cast<std::size_t>(row.slot)] = true;
  }
  return Status::ok();
}

Status Generator::rewind(std::int64_t row, std::int64_t length) noexcept {
  if (row < 0 || row >= rows()) {
    return Status::error(StatusCode::kInvalidArgument, "row %lld; the generator has %lld", wide(row), wide(rows()));
  }
  if (length < 0 || length > this->length(row)) {
    return Status::error(StatusCode::kInvalidArgument, "row %lld cannot go back to %lld tokens: it has %lld", wide(row),
                         wide(length), wide(this->length(row)));
  }
  if (length == this->length(row)) return Status::ok();
  lengths_[static_cast<std::size_t>(row)] = length;
  has_logits_[static_cast<std::size_t>(row)] = false;
  return Status::ok();
}

Status Generator::generate(Span<const RowTokens> prompts, const GenerateOptions& options, TokenCallback callback,
                           void* user) noexcept {
  SQC_RETURN_IF_ERROR(check_options(options.sample));
  if (options.max_new_tokens < 0) return invalid("max_new_tokens is negative");
  SQC_RETURN_IF_ERROR(check(prompts));
  for (const RowTokens& prompt : prompts) {
    // The last new token needs no place.
    if (options.max_new_tokens - 1 <= capacity_ - length(prompt.row) - prompt.count) continue;
    return Status::error(StatusCode::kInvalidArgument,
                         "the cache overflows: %lld tokens and %lld new ones do not fit behind the %lld of row %lld, which "
                         "has room for %lld",
                         wide(prompt.count), wide(options.max_new_tokens), wide(length(prompt.row)), wide(prompt.row),
                         wide(capacity_));
  }
  SQC_RETURN_IF_ERROR(feed(prompts));
  active_.assign(prompts.begin(), prompts.end());
  for (std::int64_t step = 0; step < options.max_new_tokens && !active_.empty(); ++step) {
    std::size_t left = 0;
    for (std::size_t i = 0; i < active_.size(); ++i) {
      const std::int64_t row = active_[i].row;
      const std::int64_t token = sample(logits(row), outputs_, options.sample, static_cast<std::uint64_t>(row),
                                        static_cast<std::uint64_t>(length(row)), order_.data());
      if (!callback(user, row, token)) return Status::ok();
      if (std::find(options.stop.begin(), options.stop.end(), token) != options.stop.end()) continue;
      chosen_[left] = token;
      active_[left] = {row, &chosen_[left], 1};
      ++left;
    }
    active_.resize(left);
    if (step + 1 == options.max_new_tokens) break;
    SQC_RETURN_IF_ERROR(feed({active_.data(), active_.size()}));
  }
  return Status::ok();
}

void Generator::measure(bool on) noexcept {
  measures_ = on;
  if (!on) return;
  try {
    total_times_ns_.assign(session_->plan().operators.size(), 0);
  } catch (const std::bad_alloc&) {
    measures_ = false;
  }
}

}  // namespace sqc
