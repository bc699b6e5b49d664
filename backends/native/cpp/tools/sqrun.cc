// sqrun: runs a .sqm file without Python.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "include/sqcompile.h"
#include "tools/npy.h"

namespace {

constexpr const char* kUsage =
    "usage: sqrun MODEL.sqm [--threads N] [--out FOLDER] [--repeat N] [NAME=]INPUT.npy ...\n"
    "       sqrun MODEL.sqm --info\n"
    "\n"
    "Runs a model on .npy files, given in the model's order or by name, and writes each output to FOLDER\n"
    "(default: the current one) as its name with .npy. --info lists inputs and outputs. --repeat runs the model\n"
    "that often and prints the median time. SQCOMPILE_ISA forces an instruction set.\n";

constexpr const char* kTypeNames[] = {"f32", "i64", "i32", "i8", "u8", "bool"};

struct Options {
  std::string model, out = ".";
  std::vector<std::string> inputs;
  int threads = 0, repeat = 1;
  bool info = false;
};

int complain(const std::string& what) {
  std::fprintf(stderr, "sqrun: %s\n", what.c_str());
  return 1;
}

bool parse_count(const char* text, int least, int* count) {
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (end == text || *end != '\0' || value < least || value > 1000000) return false;
  *count = static_cast<int>(value);
  return true;
}

bool parse(int argc, char** argv, Options* options) {
  for (int i = 1; i < argc; ++i) {
    const char* item = argv[i];
    const char* next = i + 1 < argc ? argv[i + 1] : nullptr;
    if (std::strcmp(item, "--info") == 0) {
      options->info = true;
    } else if (std::strcmp(item, "--threads") == 0 && next != nullptr) {
      if (!parse_count(argv[++i], 1, &options->threads)) return false;
    } else if (std::strcmp(item, "--repeat") == 0 && next != nullptr) {
      if (!parse_count(argv[++i], 1, &options->repeat)) return false;
    } else if (std::strcmp(item, "--out") == 0 && next != nullptr) {
      options->out = argv[++i];
    } else if (item[0] == '-') {
      return false;
    } else if (options->model.empty()) {
      options->model = item;
    } else {
      options->inputs.emplace_back(item);
    }
  }
  return !options->model.empty();
}

void print_port(const char* what, const sqc_port& port) {
  std::printf("%s %.*s: %s[", what, static_cast<int>(port.name_bytes), port.name, kTypeNames[port.dtype]);
  for (int d = 0; d < port.rank; ++d) {
    std::printf(port.shape[d] < 0 ? "%s?" : "%s%lld", d > 0 ? ", " : "", static_cast<long long>(port.shape[d]));
  }
  std::printf("]\n");
}

int print_info(const sqc_model* model) {
  sqc_port port;
  for (size_t i = 0; i < sqc_model_input_count(model); ++i) {
    if (sqc_model_input(model, i, &port).code == SQC_OK) print_port("input ", port);
  }
  for (size_t i = 0; i < sqc_model_output_count(model); ++i) {
    if (sqc_model_output(model, i, &port).code == SQC_OK) print_port("output", port);
  }
  return 0;
}

// The place of the input that an argument names, or `place`, and the argument without the name.
bool find_input(const sqc_model* model, std::string* argument, size_t* place) {
  for (size_t i = 0; i < sqc_model_input_count(model); ++i) {
    sqc_port port;
    if (sqc_model_input(model, i, &port).code != SQC_OK) continue;
    const std::string prefix = std::string(port.name, port.name_bytes) + "=";
    if (argument->compare(0, prefix.size(), prefix) != 0) continue;
    *argument = argument->substr(prefix.size());
    *place = i;
    return true;
  }
  return *place < sqc_model_input_count(model);
}

int run(const sqc_model* model, const Options& options) {
  const size_t count = sqc_model_input_count(model);
  if (options.inputs.size() != count) {
    return complain(std::to_string(options.inputs.size()) + " inputs were given; the model takes " + std::to_string(count));
  }
  std::vector<sqrun::Array> arrays(count);
  std::vector<bool> given(count, false);
  std::string error;
  for (size_t i = 0; i < count; ++i) {
    std::string argument = options.inputs[i];
    size_t place = i;
    if (!find_input(model, &argument, &place) || given[place]) return complain("an input was given twice: " + argument);
    given[place] = true;
    if (!sqrun::read_npy(argument, &arrays[place], &error)) return complain(error);
  }
  std::vector<sqc_tensor> tensors;
  for (const sqrun::Array& array : arrays) tensors.push_back(array.tensor);

  sqc_session* session = nullptr;
  sqc_status status = sqc_session_create(model, options.threads, &session);
  std::vector<double> milliseconds;
  for (int i = 0; i < options.repeat && status.code == SQC_OK; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    status = sqc_session_run(session, tensors.data(), tensors.size());
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
  }
  for (size_t i = 0; i < sqc_model_output_count(model) && status.code == SQC_OK && error.empty(); ++i) {
    sqc_tensor output;
    sqc_port port;
    status = sqc_session_output(session, i, &output);
    if (status.code == SQC_OK) status = sqc_model_output(model, i, &port);
    if (status.code != SQC_OK) break;
    std::string name(port.name, port.name_bytes);
    std::replace(name.begin(), name.end(), '/', '_');
    sqrun::write_npy(options.out + "/" + name + ".npy", output, &error);
  }
  if (status.code == SQC_OK && error.empty() && options.repeat > 1) {
    std::sort(milliseconds.begin(), milliseconds.end());
    std::printf("%.3f ms, median of %d runs, %d threads, %s\n", milliseconds[milliseconds.size() / 2], options.repeat,
                sqc_session_threads(session), sqc_session_isa(session));
  }
  sqc_session_destroy(session);
  if (status.code != SQC_OK) return complain(status.message);
  return error.empty() ? 0 : complain(error);
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  if (!parse(argc, argv, &options)) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  sqc_model* model = nullptr;
  const sqc_status status = sqc_model_open(options.model.c_str(), &model);
  if (status.code != SQC_OK) return complain(status.message);
  const int result = options.info ? print_info(model) : run(model, options);
  sqc_model_close(model);
  return result;
}
