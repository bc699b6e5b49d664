// Python's view of the native library. Translation only: no decision is made in this file.

#include <nanobind/nanobind.h>

#include "base/cpu.h"

namespace nb = nanobind;

namespace {

nb::dict cpu_info() {
  const sqc::CpuInfo& info = sqc::cpu_info();

  nb::dict flags;
#define SQC_SET_FLAG(name) flags[#name] = info.flags.name;
  SQC_CPU_FLAGS(SQC_SET_FLAG)
#undef SQC_SET_FLAG

  nb::dict result;
  result["architecture"] = info.architecture;
  result["vendor"] = info.vendor;
  result["brand"] = info.brand;
  result["family"] = info.family;
  result["model"] = info.model;
  result["logical_cores"] = info.logical_cores;
  result["physical_cores"] = info.physical_cores;
  result["l1_bytes"] = info.l1_bytes;
  result["l2_bytes"] = info.l2_bytes;
  result["l3_bytes"] = info.l3_bytes;
  result["flags"] = flags;
  return result;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "C++ part of sqcompile.backends.native";
  m.def("cpu_info", &cpu_info, "What the CPU under this process can do, as a dict.");
}
