// The float families' part of the Python module.

#ifndef SQC_BINDINGS_FLOAT_KERNELS_H_
#define SQC_BINDINGS_FLOAT_KERNELS_H_

#include <nanobind/nanobind.h>

namespace sqc_python {

// Adds the families' kernels to what `_native.kernels` returns.
void list_float_kernels(nanobind::dict& families);

void bind_float_kernels(nanobind::module_& m);

}  // namespace sqc_python

#endif  // SQC_BINDINGS_FLOAT_KERNELS_H_
