// Arrays in NumPy's .npy files: what sqrun reads and writes.

#ifndef SQC_TOOLS_NPY_H_
#define SQC_TOOLS_NPY_H_

#include <string>
#include <vector>

#include "include/sqcompile.h"

namespace sqrun {

struct Array {
  sqc_tensor tensor = {};           // its data points into `bytes`
  std::vector<unsigned char> bytes;
};

// Reads an array in row-major order of a type that models take. On failure, false, and why in `error`.
bool read_npy(const std::string& path, Array* array, std::string* error);
bool write_npy(const std::string& path, const sqc_tensor& tensor, std::string* error);

}  // namespace sqrun

#endif  // SQC_TOOLS_NPY_H_
