// The result of an operation that can fail. The library throws nothing, prints nothing and aborts
// nothing: whoever calls it decides what a failure means.

#ifndef SQC_BASE_STATUS_H_
#define SQC_BASE_STATUS_H_

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace sqc {

enum class StatusCode : std::uint8_t {
  kOk = 0,
  kInvalidArgument,  // the caller's mistake: a shape, a name, a count
  kUnsupported,      // right, but not here: this CPU or this build lacks it
  kOutOfMemory,
  kInternal,         // the system refused something that should work, such as starting a thread
  kDamaged,          // a file is not what it should be: cut off, changed, or another kind
  kNotFound,         // a file that cannot be opened
};

// Holds its text in itself, so that making one allocates nothing.
class [[nodiscard]] Status {
 public:
  static Status ok() noexcept { return Status(); }

#if defined(__GNUC__)
  __attribute__((format(printf, 2, 3)))
#endif
  static Status error(StatusCode code, const char* format, ...) noexcept {
    Status status;
    status.code_ = code;
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(status.message_, sizeof status.message_, format, arguments);
    va_end(arguments);
    return status;
  }

  bool is_ok() const noexcept { return code_ == StatusCode::kOk; }
  StatusCode code() const noexcept { return code_; }
  const char* message() const noexcept { return message_; }  // empty when ok

 private:
  Status() noexcept = default;

  StatusCode code_ = StatusCode::kOk;
  char message_[207] = "";
};

// Returns from the current function when `expression` is an error.
#define SQC_RETURN_IF_ERROR(expression)                      \
  do {                                                       \
    const ::sqc::Status sqc_status = (expression);           \
    if (!sqc_status.is_ok()) return sqc_status;              \
  } while (false)

}  // namespace sqc

#endif  // SQC_BASE_STATUS_H_
