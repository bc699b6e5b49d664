// What the files of the bindings share: arrays, errors, the choice of an instruction set.

#ifndef SQC_BINDINGS_COMMON_H_
#define SQC_BINDINGS_COMMON_H_

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include "base/isa.h"
#include "base/status.h"

namespace nb = nanobind;

namespace sqc_python {

using sqc::Isa;
using sqc::Kernel;
using sqc::Span;
using sqc::Status;
using sqc::StatusCode;

template <typename T, std::size_t Dimensions>
using Array = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <typename T>
using Vector = Array<T, 1>;
template <typename T>
using Matrix = Array<T, 2>;

inline void raise_unless_ok(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk: return;
    case StatusCode::kInvalidArgument: throw nb::value_error(status.message());
    case StatusCode::kOutOfMemory: throw std::bad_alloc();
    default: throw std::runtime_error(status.message());
  }
}

// Everything that a kernel reads or writes lies inside its array; this is what holds it to that.
inline void require(bool condition, const char* what) {
  if (!condition) throw nb::value_error(what);
}

template <typename T>
std::int64_t size_of(const T& array) {
  return static_cast<std::int64_t>(array.size());
}

// An optional array's data, null when absent.
template <typename T>
auto data_or_null(const std::optional<T>& array) {
  return array ? array->data() : nullptr;
}

inline Isa isa_called(const std::optional<std::string>& name) {
  Isa isa = Isa::scalar;
  raise_unless_ok(name ? sqc::find_isa(name->c_str(), &isa) : sqc::default_isa(&isa));
  return isa;
}

template <typename Function>
nb::list kernel_list(Span<const Kernel<Function>> kernels) {
  nb::list list;
  for (const Kernel<Function>& kernel : kernels) {
    list.append(nb::make_tuple(kernel.name, sqc::isa_name(kernel.isa), sqc::isa_available(kernel.isa)));
  }
  return list;
}

}  // namespace sqc_python

#endif  // SQC_BINDINGS_COMMON_H_
