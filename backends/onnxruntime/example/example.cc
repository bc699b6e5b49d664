// Runs the model of this folder in ONNX Runtime on the arrays of `inputs`, and compares with `expected`.
//
//   c++ -std=c++17 -O2 example.cc -o example -I "$ORT/include" -L "$ORT/lib" -lonnxruntime -Wl,-rpath,"$ORT/lib"
//   ./example
//
// It ends with 1 if an output of floating point is more than a hundredth of its greatest value away.

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr double kTolerance = 0.01;

struct Array {
  ONNXTensorElementDataType type;
  std::size_t element_bytes;
  std::vector<int64_t> shape;
  std::vector<char> data;
};

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Returns an array of a .npy file of version 1, as NumPy writes it.
Array read_array(const std::string& path) {
  static const struct {
    const char* name;
    ONNXTensorElementDataType type;
    std::size_t bytes;
  } kTypes[] = {
      {"<f4", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4},  {"<f8", ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8},
      {"<f2", ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}, {"<i8", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8},
      {"<i4", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4},  {"<i2", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16, 2},
      {"|i1", ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1},   {"|u1", ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1},
      {"|b1", ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1},
  };
  const std::string text = read_file(path);
  const std::runtime_error strange(path + ": is no array that this example reads");
  if (text.size() < 10 || text.compare(0, 7, "\x93NUMPY\x01") != 0) throw strange;
  const std::size_t begin =
      10 + static_cast<unsigned char>(text[8]) + 256u * static_cast<unsigned char>(text[9]);
  const std::string header = text.substr(10, begin - 10);
  const std::size_t shape = header.find("'shape': (");
  if (shape == std::string::npos || header.find("'fortran_order': False") == std::string::npos) throw strange;
  for (const auto& type : kTypes) {
    if (header.find(std::string("'descr': '") + type.name) == std::string::npos) continue;
    Array array{type.type, type.bytes, {}, {text.begin() + static_cast<std::ptrdiff_t>(begin), text.end()}};
    std::size_t count = 1;
    for (const char* at = header.c_str() + shape + 10; *at != ')' && *at != '\0';) {
      char* end = nullptr;
      array.shape.push_back(std::strtoll(at, &end, 10));
      if (end == at) throw strange;
      count *= static_cast<std::size_t>(array.shape.back());
      for (at = end; *at == ',' || *at == ' ';) ++at;
    }
    if (array.data.size() != count * array.element_bytes) throw strange;
    return array;
  }
  throw strange;
}

// Returns a number of session_options.json, which is a flat table of numbers.
int option(const std::string& text, const std::string& name) {
  const std::size_t at = text.find('"' + name + '"');
  if (at == std::string::npos) throw std::runtime_error("session_options.json has no " + name);
  return std::atoi(text.c_str() + text.find(':', at) + 1);
}

Ort::SessionOptions read_options() {
  const std::string text = read_file("session_options.json");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(option(text, "intra_op_num_threads"));
  options.SetInterOpNumThreads(option(text, "inter_op_num_threads"));
  options.SetExecutionMode(static_cast<ExecutionMode>(option(text, "execution_mode")));
  options.SetGraphOptimizationLevel(static_cast<GraphOptimizationLevel>(option(text, "graph_optimization_level")));
  options.SetLogSeverityLevel(option(text, "log_severity_level"));
  return options;
}

// Prints how far an output is from what was expected; whether it is near.
bool compare(const std::string& name, const Ort::Value& output, const Array& expected) {
  const auto about = output.GetTensorTypeAndShapeInfo();
  std::printf("%s: %zu values", name.c_str(), about.GetElementCount());
  if (about.GetShape() != expected.shape || about.GetElementType() != expected.type) {
    std::printf(" of another type or shape than expected\n");
    return false;
  }
  if (expected.type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    const char* seen = output.GetTensorData<char>();  // as bytes; the name for that came after ONNX Runtime 1.12
    std::size_t other = 0;
    for (std::size_t at = 0; at < expected.data.size(); at += expected.element_bytes)
      other += std::memcmp(seen + at, expected.data.data() + at, expected.element_bytes) != 0;
    std::printf(", %zu other than expected\n", other);
    return true;
  }
  const float* seen = output.GetTensorData<float>();
  double apart = 0.0, greatest = 0.0;
  bool finite = true;
  for (std::size_t at = 0; at < about.GetElementCount(); ++at) {
    float right;
    std::memcpy(&right, expected.data.data() + 4 * at, 4);
    if (std::isfinite(right) != std::isfinite(seen[at])) finite = false;
    if (!std::isfinite(right) || !std::isfinite(seen[at])) continue;
    apart = std::max(apart, std::abs(static_cast<double>(right) - seen[at]));
    greatest = std::max(greatest, std::abs(static_cast<double>(right)));
  }
  std::printf(", at most %.3g from what was expected, whose greatest is %.3g\n", apart, greatest);
  return finite && apart <= kTolerance * greatest;
}

bool run() {
  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "example");
  Ort::Session session(environment, "model.onnx", read_options());
  Ort::AllocatorWithDefaultOptions allocator;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  std::vector<std::string> inputs, outputs;
  for (std::size_t i = 0; i < session.GetInputCount(); ++i)
    inputs.emplace_back(session.GetInputNameAllocated(i, allocator).get());
  for (std::size_t i = 0; i < session.GetOutputCount(); ++i)
    outputs.emplace_back(session.GetOutputNameAllocated(i, allocator).get());

  std::vector<Array> arrays;
  for (const std::string& name : inputs) arrays.push_back(read_array("inputs/" + name + ".npy"));
  std::vector<Ort::Value> values;
  for (Array& array : arrays)
    values.push_back(Ort::Value::CreateTensor(memory, array.data.data(), array.data.size(), array.shape.data(),
                                              array.shape.size(), array.type));
  std::vector<const char*> input_names, output_names;
  for (const std::string& name : inputs) input_names.push_back(name.c_str());
  for (const std::string& name : outputs) output_names.push_back(name.c_str());
  const auto results = session.Run(Ort::RunOptions{nullptr}, input_names.data(), values.data(), values.size(),
                                   output_names.data(), output_names.size());
  bool good = true;
  for (std::size_t i = 0; i < results.size(); ++i)
    good = compare(outputs[i], results[i], read_array("expected/" + outputs[i] + ".npy")) && good;
  return good;
}

}  // namespace

int main() {
  try {
    return run() ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "example: %s\n", error.what());
    return 1;
  }
}
