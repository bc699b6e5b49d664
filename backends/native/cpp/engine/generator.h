// Continues texts: a model's second plan, with the cache of some rows of tokens.

#ifndef SQC_ENGINE_GENERATOR_H_
#define SQC_ENGINE_GENERATOR_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "engine/generation_state.h"
#include "engine/sample.h"
#include "engine/session.h"

namespace sqc {

// Tokens for one row.
struct RowTokens {
  std::int64_t row;
  const std::int64_t* tokens;
  std::int64_t count;
};

struct GenerateOptions {
  std::int64_t max_new_tokens = 0;
  SampleOptions sample;
  Span<const std::int64_t> stop;  // a row ends behind one of these
};

// Sees each new token when it is chosen, rows in their order; false ends the whole generation.
using TokenCallback = bool (*)(void* user, std::int64_t row, std::int64_t token);

// Not for several threads at once; several generators may share a model.
class Generator {
 public:
  static constexpr std::int64_t kMostRows = 4096;
  // Tokens that go through the model together: enough for the products to be as fast as they get, few enough
  // for what lies between them to stay small.
  static constexpr std::int64_t kChunk = 256;

  // For `rows` rows of at most `capacity` tokens each.
  static Status create(std::shared_ptr<const Model> model, int threads, Isa isa, std::int64_t rows,
                       std::int64_t capacity, KvType type, std::unique_ptr<Generator>* generator) noexcept;

  // Appends tokens to rows, at least one to each that is named, each at most once. On failure, rows have some of
  // their tokens, as `length` says.
  Status feed(Span<const RowTokens> texts) noexcept;

  // Logits [outputs] behind the last token of a row that has some. Rows keep theirs while others are fed.
  const float* logits(std::int64_t row) const noexcept { return logits_.data() + row * outputs_; }
  std::int64_t outputs() const noexcept { return outputs_; }
  bool has_logits(std::int64_t row) const noexcept { return has_logits_[static_cast<std::size_t>(row)]; }

  std::int64_t rows() const noexcept { return state_.slots(); }
  std::int64_t capacity() const noexcept { return capacity_; }
  std::int64_t length(std::int64_t row) const noexcept { return lengths_[static_cast<std::size_t>(row)]; }
  // Forgets a row's tokens from `length` on. Its logits are gone.
  Status rewind(std::int64_t row, std::int64_t length) noexcept;

  // Feeds the prompts, then chooses and feeds tokens until each row has had its number of them or a stop. The last
  // token of a row is not fed.
  Status generate(Span<const RowTokens> prompts, const GenerateOptions& options, TokenCallback callback,
                  void* user) noexcept;

  int threads() const noexcept { return session_->threads(); }
  Isa isa() const noexcept { return session_->isa(); }
  std::size_t cache_bytes() const noexcept { return state_.bytes(); }
  std::size_t memory_bytes() const noexcept { return session_->memory_bytes(); }
  // Begins to add up the nanoseconds of each operator, or ends it.
  void measure(bool on) noexcept;
  const std::vector<std::int64_t>& times_ns() const noexcept { return total_times_ns_; }

 private:
  Generator() noexcept = default;

  Status find_ports(const Model& model) noexcept;
  Status check(Span<const RowTokens> texts) noexcept;
  // Runs the plan on `batch_`, whose tokens are in `tokens_`.
  Status run() noexcept;
  Status flush() noexcept;

  GenerationState state_;
  std::unique_ptr<Session> session_;
  format::Generation settings_ = {};
  std::int64_t capacity_ = 0, outputs_ = 0;
  bool sees_keys_ = false;
  std::vector<std::int64_t> lengths_, seen_;
  std::vector<BatchRow> batch_;
  std::vector<std::int64_t> tokens_, positions_, last_, keys_;
  std::vector<float> logits_;
  std::vector<bool> has_logits_;
  std::vector<std::int32_t> order_;
  bool measures_ = false;
  std::vector<std::int64_t> times_ns_, total_times_ns_;
  // Of generate: rows that go on, and each one's token.
  std::vector<RowTokens> active_;
  std::vector<std::int64_t> chosen_;
};

}  // namespace sqc

#endif  // SQC_ENGINE_GENERATOR_H_
