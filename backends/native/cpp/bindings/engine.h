// Python's view of the engine: models and sessions.

#ifndef SQC_BINDINGS_ENGINE_H_
#define SQC_BINDINGS_ENGINE_H_

#include <nanobind/nanobind.h>

namespace sqc_python {

void bind_engine(nanobind::module_& m);

}  // namespace sqc_python

#endif  // SQC_BINDINGS_ENGINE_H_
