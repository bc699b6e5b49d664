// What a text leaves behind for its next token: keys, values, and other tensors of earlier positions.

#ifndef SQC_ENGINE_GENERATION_STATE_H_
#define SQC_ENGINE_GENERATION_STATE_H_

#include <cstdint>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/span.h"
#include "base/status.h"
#include "engine/plan.h"
#include "kernels/kvcache/kvcache.h"

namespace sqc {

// Where the new tokens of one run belong: entry i is one row of the batch. Its tokens lie behind each other, from
// `first` on; `past` of its slot's positions are taken already.
struct BatchRow {
  std::int64_t slot, first, tokens, past;
};

// The memory behind the operators `cached_attention` and `append` of a plan, for some slots of `capacity`
// positions each. Pages that no position has reached are not touched.
class GenerationState {
 public:
  // Finds out what the plan keeps. An error where that cannot be kept.
  Status create(const Plan& plan, std::int64_t slots, std::int64_t capacity, KvType type) noexcept;

  std::int64_t slots() const noexcept { return slots_; }
  std::int64_t capacity() const noexcept { return capacity_; }
  std::size_t bytes() const noexcept;

  // Whether cache `number` has that kind and geometry: what an operator checks before it relies on it.
  bool has_cache(std::int64_t number, std::int64_t heads, std::int64_t head_dim) const noexcept;
  bool has_tensor(std::int64_t number, std::int64_t position_bytes) const noexcept;
  // Whether some operator is `append`: those see one row at a time.
  bool has_tensors() const noexcept { return has_tensors_; }

  // The cache of slots [slot, slot + count).
  KvCache cache(std::int64_t number, std::int64_t slot, std::int64_t count) const noexcept;
  // Position 0 of slot `slot`, of a tensor kept by `append`.
  std::uint8_t* tensor(std::int64_t number, std::int64_t slot) const noexcept;

  // The rows of the run that follows; only operators read it. Never empty while one runs.
  Span<const BatchRow> rows;

 private:
  struct Part {
    bool is_cache;
    std::int64_t heads, head_dim;  // of caches
    std::int64_t position_bytes;   // of tensors
    AlignedBuffer k, v, k_scale, v_scale;
  };
  std::vector<Part> parts_;
  std::int64_t slots_ = 0, capacity_ = 0;
  KvType type_ = KvType::f32;
  bool has_tensors_ = false;
};

}  // namespace sqc

#endif  // SQC_ENGINE_GENERATION_STATE_H_
