#include "bindings/float_kernels.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include "base/thread_pool.h"
#include "bindings/common.h"
#include "kernels/activation/activation.h"
#include "kernels/attention/attention.h"
#include "kernels/fgemm/fgemm.h"
#include "kernels/kvcache/kvcache.h"
#include "kernels/norm/norm.h"
#include "kernels/rope/rope.h"
#include "kernels/softmax/softmax.h"

namespace sqc_python {
namespace {

using sqc::ThreadPool;

std::string norm(ThreadPool& pool, const std::optional<std::string>& isa, const std::string& kind, Matrix<const float> x,
                 std::optional<Vector<const float>> weight, std::optional<Vector<const float>> bias, float epsilon,
                 Matrix<float> y, int repeat) {
  const auto m = static_cast<std::int64_t>(x.shape(0)), k = static_cast<std::int64_t>(x.shape(1));
  require(kind == "rms" || kind == "layer", "kind is rms or layer");
  require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y have different shapes");
  require((!weight || size_of(*weight) == k) && (!bias || size_of(*bias) == k), "weight or bias has a wrong length");
  const sqc::NormParams params = {kind == "rms" ? sqc::NormKind::rms : sqc::NormKind::layer,
                                  m,
                                  k,
                                  x.data(),
                                  k,
                                  nullptr,
                                  0,
                                  nullptr,
                                  0,
                                  data_or_null(weight),
                                  data_or_null(bias),
                                  epsilon,
                                  y.data(),
                                  k,
                                  nullptr};
  const auto& kernel = sqc::norm_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::norm(pool, kernel, params, nullptr));
  return kernel.name;
}

}  // namespace

void list_float_kernels(nb::dict& families) {
  families["norm"] = kernel_list(sqc::norm_kernels());
  families["kvcache"] = kernel_list(sqc::kvcache_kernels());
  families["attention"] = kernel_list(sqc::attention_kernels());
  families["fgemm"] = kernel_list(sqc::fgemm_kernels());
  families["activation"] = kernel_list(sqc::activation_kernels());
  families["softmax"] = kernel_list(sqc::softmax_kernels());
  families["rope"] = kernel_list(sqc::rope_kernels());
}

void bind_float_kernels(nb::module_& m) {
  m.def("norm", &norm, nb::arg("pool"), nb::arg("isa").none(), nb::arg("kind"), nb::arg("x"), nb::arg("weight").none(),
        nb::arg("bias").none(), nb::arg("epsilon"), nb::arg("y"), nb::arg("repeat") = 1);
}

}  // namespace sqc_python
