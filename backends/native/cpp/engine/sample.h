// Choosing the next token from logits.

#ifndef SQC_ENGINE_SAMPLE_H_
#define SQC_ENGINE_SAMPLE_H_

#include <cstdint>
#include <vector>

#include "base/status.h"

namespace sqc {

struct SampleOptions {
  float temperature = 0.0f;  // 0: the most likely token
  std::int64_t top_k = 0;    // only among so many of the most likely; 0: all
  float top_p = 1.0f;        // only among the fewest that together have this probability
  std::uint64_t seed = 0;
};

Status check_options(const SampleOptions& options) noexcept;

// The most likely token, the first of equals. A NaN is no number to choose.
std::int64_t most_likely(const float* logits, std::int64_t count) noexcept;

// A token drawn by softmax(logits / temperature) after top_k, then top_p. The same for the same logits, options,
// stream and step, whatever was drawn before: a row of a batch gets what it would get alone. `order` has room for
// `count` numbers.
std::int64_t sample(const float* logits, std::int64_t count, const SampleOptions& options, std::uint64_t stream,
                    std::uint64_t step, std::int32_t* order) noexcept;

}  // namespace sqc

#endif  // SQC_ENGINE_SAMPLE_H_
