#include "engine/model.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <initializer_list>
#include <new>

#include "engine/operators.h"
#include "engine/ops/packed_weights.h"

namespace sqc {
namespace {

Status cannot_open(const char* path) noexcept {
  return Status::error(StatusCode::kNotFound, "cannot open '%.120s': %s", path, std::strerror(errno));
}

// Closes a file when it goes out of scope; a mapping stays without it.
struct File {
  int handle;
  ~File() {
    if (handle >= 0) ::close(handle);
  }
};

}  // namespace

Model::~Model() {
  if (mapped_ != nullptr) ::munmap(mapped_, mapped_bytes_);
}

Status Model::open(const char* path, std::shared_ptr<const Model>* result) noexcept {
  std::shared_ptr<Model> model;
  try {
    model.reset(new Model);
  } catch (const std::bad_alloc&) {
    return Status::error(StatusCode::kOutOfMemory, "cannot allocate a model");
  }
  const File file = {::open(path, O_RDONLY | O_CLOEXEC)};
  if (file.handle < 0) return cannot_open(path);
  struct stat status;
  if (::fstat(file.handle, &status) != 0) return cannot_open(path);
  if (!S_ISREG(status.st_mode) || status.st_size == 0) {
    return Status::error(StatusCode::kDamaged, "'%.120s' is no .sqm file: it is empty, or no file", path);
  }
  const auto bytes = static_cast<std::size_t>(status.st_size);
  void* mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file.handle, 0);
  if (mapped == MAP_FAILED) return cannot_open(path);
  model->mapped_ = mapped;
  model->mapped_bytes_ = bytes;
#if defined(__linux__)
  // Decoding streams through all weights. File systems that have huge pages for files then use them;
  // refusal is no error.
  (void)::madvise(mapped, bytes, MADV_HUGEPAGE);
#endif
  SQC_RETURN_IF_ERROR(model->check({static_cast<const std::uint8_t*>(mapped), bytes}));
  *result = std::move(model);
  return Status::ok();
}

Status Model::from_bytes(Span<const std::uint8_t> bytes, std::shared_ptr<const Model>* result) noexcept {
  std::shared_ptr<Model> model;
  try {
    model.reset(new Model);
  } catch (const std::bad_alloc&) {
    return Status::error(StatusCode::kOutOfMemory, "cannot allocate a model");
  }
  SQC_RETURN_IF_ERROR(model->copy_.allocate(bytes.size()));
  if (!bytes.empty()) std::memcpy(model->copy_.data(), bytes.data(), bytes.size());
  SQC_RETURN_IF_ERROR(model->check({model->copy_.data(), bytes.size()}));
  *result = std::move(model);
  return Status::ok();
}

Status Model::check(Span<const std::uint8_t> file) noexcept {
  SQC_RETURN_IF_ERROR(read_plans(file, &plans_));
  // The same weights mostly, but a file may have been written to deceive.
  for (const Plan* plan : {&plans_.plan, &plans_.generation}) {
    for (const format::Operator& step : plan->operators) {
      SQC_RETURN_IF_ERROR(check_packed_weights(*plan, step));
      SQC_RETURN_IF_ERROR(check_convolution_weights(*plan, step));
    }
  }
  return Status::ok();
}

}  // namespace sqc
