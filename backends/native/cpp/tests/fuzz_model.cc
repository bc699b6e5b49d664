// Opens and runs whatever bytes it is given: the reader's fuzz target.
//
// With clang this is a libFuzzer target (-DSQC_FUZZER=ON). Elsewhere it is a program that takes a whole file and a
// number, and tries as many mutations of it, the same ones at every run; the sanitizers do the rest. Checksums
// are made right after each mutation, because what lies behind them is to be tested.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "base/crc32.h"
#include "engine/generator.h"
#include "engine/model.h"
#include "engine/session.h"

namespace {

namespace format = sqc::format;

// Whoever mutates sizes asks for much memory sooner or later; that it is refused is not the question here.
constexpr std::int64_t kLargestInput = 1 << 16;

void seal(std::vector<std::uint8_t>& file) {
  format::Header header;
  format::Section sections[format::kSectionCountWithGeneration] = {};
  if (file.size() < sizeof header) return;
  std::memcpy(&header, file.data(), sizeof header);
  const std::size_t table_bytes =
      (header.version == format::kVersion ? format::kSectionCount : format::kSectionCountWithGeneration) * sizeof(format::Section);
  if (file.size() < sizeof header + table_bytes) return;
  std::memcpy(sections, file.data() + sizeof header, table_bytes);
  const auto inside = [&](std::uint64_t offset, std::uint64_t bytes) {
    return offset <= file.size() && bytes <= file.size() - offset;
  };
  const format::Section& table = sections[static_cast<int>(format::SectionKind::tensors)];
  for (std::uint64_t at = 0; inside(table.offset, table.bytes) && at + sizeof(format::Tensor) <= table.bytes;
       at += sizeof(format::Tensor)) {
    format::Tensor tensor;
    std::memcpy(&tensor, file.data() + table.offset + at, sizeof tensor);
    if (!inside(tensor.offset, tensor.bytes)) continue;
    tensor.crc = sqc::crc32(file.data() + tensor.offset, tensor.bytes);
    std::memcpy(file.data() + table.offset + at, &tensor, sizeof tensor);
  }
  for (format::Section& section : sections) {
    if (inside(section.offset, section.bytes)) section.crc = sqc::crc32(file.data() + section.offset, section.bytes);
  }
  header.file_bytes = file.size();
  header.sections_crc = sqc::crc32(sections, table_bytes);
  std::memcpy(file.data() + sizeof header, sections, table_bytes);
  header.header_crc = sqc::crc32(&header, 28);
  std::memcpy(file.data(), &header, sizeof header);
}

// Feeds two rows and takes one back, with whatever plan a file has for continuing texts.
void generate(const std::shared_ptr<const sqc::Model>& model) {
  if (model->generation() == nullptr) return;
  for (const sqc::KvType type : {sqc::KvType::f32, sqc::KvType::s8}) {
    std::unique_ptr<sqc::Generator> generator;
    if (!sqc::Generator::create(model, 1, sqc::best_isa(), 2, 8, type, &generator).is_ok()) return;
    const std::int64_t tokens[] = {1, 0, 1};
    const sqc::RowTokens texts[] = {{0, tokens, 3}, {1, tokens, 1}};
    const auto go_on = [](void*, std::int64_t, std::int64_t) { return true; };
    sqc::GenerateOptions options;
    options.max_new_tokens = 2;
    if (!generator->generate({texts, 2}, options, go_on, nullptr).is_ok()) return;
    (void)generator->rewind(0, 1).is_ok();
    (void)generator->feed({texts, 2}).is_ok();
  }
}

// Runs the model on zeros of the smallest sizes that it takes; whether it opened.
bool open_and_run(sqc::Span<const std::uint8_t> file) {
  std::shared_ptr<const sqc::Model> model;
  if (!sqc::Model::from_bytes(file, &model).is_ok()) return false;
  generate(model);
  std::unique_ptr<sqc::Session> session;
  if (!sqc::Session::create(model, 1, sqc::best_isa(), &session).is_ok()) return true;
  const sqc::Plan& plan = model->plan();
  std::vector<std::int64_t> symbols;
  for (const format::Symbol& symbol : plan.symbols) symbols.push_back(symbol.low > 1 ? symbol.low : symbol.high > 1 ? 2 : 1);
  std::vector<std::vector<std::int64_t>> all_shapes;
  std::vector<std::vector<std::uint8_t>> data;
  for (const format::Port& port : plan.inputs) {
    const format::Value& value = plan.values[port.value];
    std::vector<std::int64_t> shape;
    std::int64_t count = 1;
    for (int d = 0; d < value.rank; ++d) {
      std::int64_t size = 0;
      if (!sqc::evaluate_size(plan, plan.lists[value.first_size + d], symbols.data(), &size).is_ok()) return true;
      if (size < 0 || size > kLargestInput || (count *= size) > kLargestInput) return true;
      shape.push_back(size);
    }
    all_shapes.push_back(shape);
    data.emplace_back(static_cast<std::size_t>(count * 8));
  }
  std::vector<sqc::InputView> inputs;
  for (std::size_t i = 0; i < plan.inputs.size(); ++i) {
    const format::Value& value = plan.values[plan.inputs[i].value];
    inputs.push_back({static_cast<sqc::DType>(value.dtype), value.rank, all_shapes[i].data(), data[i].data()});
  }
  (void)session->run({inputs.data(), inputs.size()}).is_ok();
  return true;
}

}  // namespace

#if defined(SQC_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<std::uint8_t> file(data, data + size);
  seal(file);
  open_and_run({file.data(), file.size()});
  return 0;
}

#else

namespace {

void mutate(std::vector<std::uint8_t>& file, std::mt19937_64& random) {
  const auto below = [&](std::uint64_t n) { return random() % n; };
  if (below(16) == 0) file.resize(below(file.size()) + 1);
  // Tables lie in front and are what matters; packed weights behind them are followed by kernels.
  const std::uint64_t front = file.size() < 12288 ? file.size() : 12288;
  for (std::uint64_t changes = 1 + below(4); changes > 0; --changes) {
    const std::uint64_t range = below(4) == 0 ? file.size() : front;
    if (range < 4) return;
    const std::uint64_t at = below(range - 3) / 4 * 4;
    std::uint32_t word;
    std::memcpy(&word, file.data() + at, 4);
    constexpr std::uint32_t interesting[] = {0, 1, 2, 7, 8, 255, 65535, 0x7fffffff, 0x80000000, 0xffffffff};
    switch (below(5)) {
      case 0: word = interesting[below(10)]; break;
      case 1: word ^= 1u << below(32); break;
      case 2: word += static_cast<std::uint32_t>(below(5)) - 2; break;
      case 3: std::memcpy(&word, file.data() + below(range - 3) / 4 * 4, 4); break;
      default: word = static_cast<std::uint32_t>(random()); break;
    }
    std::memcpy(file.data() + at, &word, 4);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::FILE* input = std::fopen(argv[1], "rb");
  if (input == nullptr) return 2;
  std::vector<std::uint8_t> whole;
  for (int byte; (byte = std::fgetc(input)) != EOF;) whole.push_back(static_cast<std::uint8_t>(byte));
  std::fclose(input);
  if (!open_and_run({whole.data(), whole.size()})) return 1;
  std::mt19937_64 random(7);
  const long count = std::atol(argv[2]);
  long opened = 0;
  for (long i = 0; i < count; ++i) {
    std::vector<std::uint8_t> file = whole;
    mutate(file, random);
    seal(file);
    opened += open_and_run({file.data(), file.size()}) ? 1 : 0;
  }
  std::printf("%ld mutations, %ld opened\n", count, opened);
  return 0;
}

#endif
