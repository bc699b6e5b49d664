// A `.sqm` file in memory, shared by any number of sessions.

#ifndef SQC_ENGINE_MODEL_H_
#define SQC_ENGINE_MODEL_H_

#include <memory>

#include "base/aligned_buffer.h"
#include "base/span.h"
#include "base/status.h"
#include "engine/plan.h"

namespace sqc {

class Model {
 public:
  // Maps a file and checks it. The file must not be changed while the model lives; sqcompile replaces files
  // by renaming, which leaves the mapped one as it is.
  static Status open(const char* path, std::shared_ptr<const Model>* model) noexcept;

  // The same for bytes in memory, which are copied.
  static Status from_bytes(Span<const std::uint8_t> bytes, std::shared_ptr<const Model>* model) noexcept;

  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  const Plan& plan() const noexcept { return plans_.plan; }
  // The plan that continues texts, or null.
  const Plan* generation() const noexcept { return plans_.generates ? &plans_.generation : nullptr; }
  const format::Generation& generation_settings() const noexcept { return plans_.settings; }

 private:
  Model() noexcept = default;
  Status check(Span<const std::uint8_t> file) noexcept;

  Plans plans_;
  AlignedBuffer copy_;
  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
};

}  // namespace sqc

#endif  // SQC_ENGINE_MODEL_H_
