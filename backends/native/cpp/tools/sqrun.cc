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
    "       sqrun MODEL.sqm --generate COUNT [--threads N] [--kv f32|int8] [--temperature T] [--top-k K] [--top-p P]\n"
    "             [--seed S] [--stop TOKEN]... PROMPT ...\n"
    "       sqrun MODEL.sqm --info\n"
    "\n"
    "Runs a model on .npy files, given in the model's order or by name, and writes each output to FOLDER\n"
    "(default: the current one) as its name with .npy. --info lists inputs and outputs. --repeat runs the model\n"
    "that often and prints the median time. SQCOMPILE_ISA forces an instruction set.\n"
    "\n"
    "--generate continues each prompt by up to COUNT tokens and prints them, a line a prompt; of a single prompt each\n"
    "as it comes. A prompt is a list of token ids (1,15043,29892), or a .npy file [tokens] or [prompts, tokens].\n"
    "Speed goes to standard error.\n";

constexpr const char* kTypeNames[] = {"f32", "i64", "i32", "i8", "u8", "bool"};

struct Options {
  std::string model, out = ".";
  std::vector<std::string> inputs;
  int threads = 0, repeat = 1;
  bool info = false, generate = false;
  sqc_kv_type kv_type = SQC_KV_F32;
  sqc_sampling sampling = {0, 0.0f, 0, 1.0f, 0, nullptr, 0};
  std::vector<int64_t> stop;
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

bool parse_number(const char* text, double* number) {
  char* end = nullptr;
  *number = std::strtod(text, &end);
  return end != text && *end == '\0';
}

// Options of --generate; whether `item` is one, with its value in `next`.
bool parse_generation(const char* item, const char* next, Options* options, bool* good) {
  double number = 0.0;
  *good = false;
  if (next == nullptr) return false;
  if (std::strcmp(item, "--kv") == 0) {
    *good = std::strcmp(next, "int8") == 0 || std::strcmp(next, "f32") == 0;
    options->kv_type = std::strcmp(next, "int8") == 0 ? SQC_KV_I8 : SQC_KV_F32;
    return true;
  }
  if (std::strcmp(item, "--seed") == 0) {
    char* end = nullptr;
    options->sampling.seed = std::strtoull(next, &end, 10);
    *good = end != next && *end == '\0';
    return true;
  }
  const bool known = parse_number(next, &number);
  if (std::strcmp(item, "--temperature") == 0) {
    options->sampling.temperature = static_cast<float>(number);
  } else if (std::strcmp(item, "--top-p") == 0) {
    options->sampling.top_p = static_cast<float>(number);
  } else if (std::strcmp(item, "--top-k") == 0) {
    options->sampling.top_k = std::strtoll(next, nullptr, 10);
  } else if (std::strcmp(item, "--stop") == 0) {
    options->stop.push_back(std::strtoll(next, nullptr, 10));
  } else {
    return false;
  }
  *good = known;
  return true;
}

bool parse(int argc, char** argv, Options* options) {
  for (int i = 1; i < argc; ++i) {
    const char* item = argv[i];
    const char* next = i + 1 < argc ? argv[i + 1] : nullptr;
    bool good = false;
    if (parse_generation(item, next, options, &good)) {
      if (!good) return false;
      ++i;
      continue;
    }
    if (std::strcmp(item, "--info") == 0) {
      options->info = true;
    } else if (std::strcmp(item, "--threads") == 0 && next != nullptr) {
      if (!parse_count(argv[++i], 1, &options->threads)) return false;
    } else if (std::strcmp(item, "--generate") == 0 && next != nullptr) {
      int count = 0;
      if (!parse_count(argv[++i], 0, &count)) return false;
      options->generate = true;
      options->sampling.max_new_tokens = count;
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
  if (sqc_model_limit(model) > 0) {
    std::printf("generates texts of up to %lld tokens\n", static_cast<long long>(sqc_model_limit(model)));
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

using Prompts = std::vector<std::vector<int64_t>>;

// A list of numbers with commas.
bool read_list(const std::string& text, std::vector<int64_t>* tokens) {
  for (const char* at = text.c_str();;) {
    char* end = nullptr;
    tokens->push_back(std::strtoll(at, &end, 10));
    if (end == at) return false;
    if (*end == '\0') return true;
    if (*end != ',') return false;
    at = end + 1;
  }
}

bool read_prompts(const std::string& argument, Prompts* prompts, std::string* error) {
  std::vector<int64_t> list;
  if (argument.find(".npy") == std::string::npos) {
    if (!read_list(argument, &list)) {
      *error = "a prompt is a list of token ids or a .npy file: " + argument;
      return false;
    }
    prompts->push_back(std::move(list));
    return true;
  }
  sqrun::Array array;
  if (!sqrun::read_npy(argument, &array, error)) return false;
  const sqc_tensor& tensor = array.tensor;
  if (tensor.dtype != SQC_I64 || tensor.rank < 1 || tensor.rank > 2) {
    *error = argument + ": prompts are [tokens] or [prompts, tokens] of int64";
    return false;
  }
  const int64_t rows = tensor.rank == 2 ? tensor.shape[0] : 1, count = tensor.shape[tensor.rank - 1];
  const auto* data = static_cast<const int64_t*>(tensor.data);
  for (int64_t row = 0; row < rows; ++row) prompts->emplace_back(data + row * count, data + (row + 1) * count);
  return true;
}

// What comes out, and when.
struct Written {
  Prompts tokens;
  std::chrono::steady_clock::time_point first, last;
  int64_t count = 0;

  static int take(void* user, int64_t row, int64_t token) {
    auto* written = static_cast<Written*>(user);
    written->last = std::chrono::steady_clock::now();
    if (written->count++ == 0) written->first = written->last;
    std::vector<int64_t>& tokens = written->tokens[static_cast<size_t>(row)];
    tokens.push_back(token);
    if (written->tokens.size() == 1) {
      std::printf(tokens.size() > 1 ? " %lld" : "%lld", static_cast<long long>(token));
      std::fflush(stdout);
    }
    return 1;
  }
};

int generate(const sqc_model* model, const Options& options) {
  Prompts prompts;
  std::string error;
  for (const std::string& argument : options.inputs) {
    if (!read_prompts(argument, &prompts, &error)) return complain(error);
  }
  if (prompts.empty()) return complain("there is no prompt");
  std::vector<sqc_text> texts;
  size_t longest = 1, total = 0;
  for (const std::vector<int64_t>& prompt : prompts) {
    texts.push_back({static_cast<int64_t>(texts.size()), prompt.data(), static_cast<int64_t>(prompt.size())});
    longest = std::max(longest, prompt.size());
    total += prompt.size();
  }
  // The last new token needs no place.
  const int64_t capacity = static_cast<int64_t>(longest) + std::max<int64_t>(options.sampling.max_new_tokens - 1, 0);
  sqc_generator* generator = nullptr;
  sqc_status status = sqc_generator_create(model, options.threads, static_cast<int64_t>(texts.size()), capacity,
                                           options.kv_type, &generator);
  if (status.code != SQC_OK) return complain(status.message);
  Written written;
  written.tokens.resize(texts.size());
  sqc_sampling sampling = options.sampling;
  sampling.stop = options.stop.data();
  sampling.stop_count = options.stop.size();
  const auto begin = std::chrono::steady_clock::now();
  status = sqc_generator_generate(generator, texts.data(), texts.size(), &sampling, &Written::take, &written);
  sqc_generator_destroy(generator);
  if (status.code != SQC_OK) return complain(status.message);
  for (const std::vector<int64_t>& tokens : written.tokens) {
    for (size_t i = 0; i < tokens.size() && texts.size() > 1; ++i) {
      std::printf(i > 0 ? " %lld" : "%lld", static_cast<long long>(tokens[i]));
    }
    std::printf("\n");
  }
  std::fflush(stdout);
  const auto seconds = [](auto from, auto to) { return std::chrono::duration<double>(to - from).count(); };
  const auto first = static_cast<int64_t>(texts.size());  // all rows get their first token behind the prompts
  if (written.count > 0) {
    std::fprintf(stderr, "%zu tokens of prompts: %.1f a second", total, static_cast<double>(total) / seconds(begin, written.first));
    if (written.count > first) {
      std::fprintf(stderr, "; %lld new ones: %.1f a second", static_cast<long long>(written.count),
                   static_cast<double>(written.count - first) / seconds(written.first, written.last));
    }
    std::fprintf(stderr, "\n");
  }
  return 0;
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
  const int result = options.info       ? print_info(model)
                     : options.generate ? generate(model, options)
                                        : run(model, options);
  sqc_model_close(model);
  return result;
}
