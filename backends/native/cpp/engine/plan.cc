#include "engine/plan.h"

#include <cstring>

#include "base/crc32.h"
#include "engine/operators.h"

namespace sqc {
namespace {

using format::kNone;

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
Status damaged(const char* text, ...) noexcept {
  char message[160];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(message, sizeof message, text, arguments);
  va_end(arguments);
  return Status::error(StatusCode::kDamaged, "the file is damaged: %s", message);
}

unsigned long long wide(std::uint64_t x) noexcept { return x; }

bool inside(std::uint64_t offset, std::uint64_t bytes, std::uint64_t total) noexcept {
  return offset <= total && bytes <= total - offset;
}

class Reader {
 public:
  Reader(Span<const std::uint8_t> file, Plans* plans) noexcept : file_(file), plans_(*plans) {}

  Status read() noexcept {
    SQC_RETURN_IF_ERROR(header());
    SQC_RETURN_IF_ERROR(sections());
    using Kind = format::SectionKind;
    SQC_RETURN_IF_ERROR(table(Kind::strings, &plan_.strings));
    SQC_RETURN_IF_ERROR(table(Kind::tensors, &plan_.tensors));
    SQC_RETURN_IF_ERROR(table(Kind::metadata, &plan_.metadata));
    plan_.file = file_.data();
    SQC_RETURN_IF_ERROR(tensors());
    plans_.generates = section_count() > format::kSectionCount;
    if (plans_.generates) {
      SQC_RETURN_IF_ERROR(settings());
      SQC_RETURN_IF_ERROR(tables(Kind::generation_symbols, Kind::generation_operators));
      plans_.generation = plan_;
    }
    SQC_RETURN_IF_ERROR(tables(Kind::symbols, Kind::operators));
    plans_.plan = plan_;
    return Status::ok();
  }

 private:
  // The tables of one plan: those of symbols to floats, and those of operators, inputs and outputs.
  Status tables(format::SectionKind first, format::SectionKind second) noexcept {
    const auto behind = [](format::SectionKind kind, std::uint32_t places) {
      return static_cast<format::SectionKind>(static_cast<std::uint32_t>(kind) + places);
    };
    SQC_RETURN_IF_ERROR(table(first, &plan_.symbols));
    SQC_RETURN_IF_ERROR(table(behind(first, 1), &plan_.code));
    SQC_RETURN_IF_ERROR(table(behind(first, 2), &plan_.sizes));
    SQC_RETURN_IF_ERROR(table(behind(first, 3), &plan_.values));
    SQC_RETURN_IF_ERROR(table(behind(first, 4), &plan_.lists));
    SQC_RETURN_IF_ERROR(table(behind(first, 5), &plan_.floats));
    SQC_RETURN_IF_ERROR(table(second, &plan_.operators));
    SQC_RETURN_IF_ERROR(table(behind(second, 1), &plan_.inputs));
    SQC_RETURN_IF_ERROR(table(behind(second, 2), &plan_.outputs));
    SQC_RETURN_IF_ERROR(symbols());
    SQC_RETURN_IF_ERROR(sizes());
    SQC_RETURN_IF_ERROR(values());
    SQC_RETURN_IF_ERROR(ports(plan_.inputs, "input"));
    SQC_RETURN_IF_ERROR(ports(plan_.outputs, "output"));
    SQC_RETURN_IF_ERROR(input_values());
    return operators();
  }

  Status settings() noexcept {
    Span<const format::Generation> records;
    SQC_RETURN_IF_ERROR(table(format::SectionKind::generation, &records));
    if (records.size() != 1) return damaged("there are no settings of the generation");
    plans_.settings = records[0];
    if (records[0].limit < 1 || records[0].vocabulary < 0) return damaged("the settings of the generation are wrong");
    return Status::ok();
  }

  std::uint32_t section_count() const noexcept { return header_.section_count; }

  Status header() noexcept {
    if (file_.size() < sizeof header_) return damaged("%zu bytes are less than a header", file_.size());
    std::memcpy(&header_, file_.data(), sizeof header_);
    if (std::memcmp(header_.magic, format::kMagic, sizeof header_.magic) != 0) {
      return Status::error(StatusCode::kDamaged, "this is no .sqm file: it does not begin as one");
    }
    if (header_.version != format::kVersion && header_.version != format::kVersionWithGeneration) {
      return Status::error(StatusCode::kUnsupported, "the file has version %u; this build reads versions %u to %u",
                           header_.version, format::kVersion, format::kVersionWithGeneration);
    }
    if (header_.header_crc != crc32(file_.data(), 28)) return damaged("the header's checksum is wrong");
    if (header_.file_bytes != file_.size()) {
      return damaged("it has %zu bytes, and should have %llu", file_.size(), wide(header_.file_bytes));
    }
    const std::uint32_t expected =
        header_.version == format::kVersion ? format::kSectionCount : format::kSectionCountWithGeneration;
    if (header_.section_count != expected) return damaged("%u sections instead of %u", header_.section_count, expected);
    return Status::ok();
  }

  Status sections() noexcept {
    const std::size_t bytes = section_count() * sizeof(format::Section);
    if (!inside(sizeof header_, bytes, file_.size())) return damaged("the table of sections is cut off");
    if (header_.sections_crc != crc32(file_.data() + sizeof header_, bytes)) {
      return damaged("the checksum of the table of sections is wrong");
    }
    std::memcpy(sections_, file_.data() + sizeof header_, bytes);
    for (std::uint32_t i = 0; i < section_count(); ++i) {
      const format::Section& section = sections_[i];
      if (section.kind != i) return damaged("section %u is of kind %u", i, section.kind);
      const bool data = i == static_cast<std::uint32_t>(format::SectionKind::data);
      const std::uint64_t alignment = data ? format::kDataAlignment : format::kSectionAlignment;
      if (section.offset % alignment != 0) return damaged("section %u is not aligned", i);
      if (!inside(section.offset, section.bytes, file_.size())) return damaged("section %u is cut off", i);
      if (!data && section.crc != crc32(file_.data() + section.offset, section.bytes)) {
        return damaged("the checksum of section %u is wrong", i);
      }
    }
    return Status::ok();
  }

  template <typename T>
  Status table(format::SectionKind kind, Span<const T>* result) noexcept {
    const format::Section& section = sections_[static_cast<std::uint32_t>(kind)];
    if (section.bytes % sizeof(T) != 0 || section.bytes / sizeof(T) >= kNone) {
      return damaged("section %u holds no whole number of records", section.kind);
    }
    *result = {reinterpret_cast<const T*>(file_.data() + section.offset),
               static_cast<std::size_t>(section.bytes / sizeof(T))};
    return Status::ok();
  }

  Status symbols() noexcept {
    for (const format::Symbol& symbol : plan_.symbols) {
      SQC_RETURN_IF_ERROR(name(symbol.name_offset, symbol.name_bytes));
      if (symbol.low < 0 || symbol.high < symbol.low) return damaged("a symbol has no sizes");
    }
    return Status::ok();
  }

  Status sizes() noexcept {
    for (const format::Instruction& step : plan_.code) {
      if (step.opcode >= format::kOpcodeCount) return damaged("there is no opcode %u", step.opcode);
      if (step.opcode == static_cast<std::uint32_t>(format::Opcode::symbol) &&
          static_cast<std::uint64_t>(step.argument) >= plan_.symbols.size()) {
        return damaged("a size refers to a symbol that does not exist");
      }
    }
    for (const format::Size& size : plan_.sizes) {
      if (!inside(size.first, size.count, plan_.code.size())) return damaged("the code of a size is cut off");
      int depth = 0;
      for (const format::Instruction& step : Span<const format::Instruction>(plan_.code.data() + size.first, size.count)) {
        depth += step.opcode <= static_cast<std::uint32_t>(format::Opcode::symbol) ? 1 : -1;
        if (depth < 1 || depth > format::kMaxStack) return damaged("the code of a size uses a wrong stack");
      }
      if (depth != 1) return damaged("the code of a size leaves no single number");
    }
    return Status::ok();
  }

  Status tensors() noexcept {
    const format::Section& data = sections_[static_cast<std::uint32_t>(format::SectionKind::data)];
    for (std::size_t i = 0; i < plan_.tensors.size(); ++i) {
      const format::Tensor& tensor = plan_.tensors[i];
      const std::uint64_t alignment =
          tensor.bytes >= format::kLargeTensor ? format::kDataAlignment : format::kTensorAlignment;
      if (tensor.offset % alignment != 0) return damaged("tensor %zu is not aligned", i);
      if (tensor.offset < data.offset || !inside(tensor.offset - data.offset, tensor.bytes, data.bytes)) {
        return damaged("tensor %zu is cut off", i);
      }
      if (tensor.crc != crc32(file_.data() + tensor.offset, tensor.bytes)) {
        return damaged("the checksum of tensor %zu is wrong", i);
      }
    }
    return Status::ok();
  }

  Status values() noexcept {
    for (std::size_t i = 0; i < plan_.values.size(); ++i) {
      const format::Value& value = plan_.values[i];
      if (value.dtype >= kDTypeCount || value.rank > kMaxRank || value.layout >= kLayoutCount) {
        return damaged("value %zu has an unknown type, rank or layout", i);
      }
      if (!inside(value.first_size, value.rank, plan_.lists.size())) return damaged("the shape of value %zu is cut off", i);
      for (int d = 0; d < value.rank; ++d) {
        if (plan_.lists[value.first_size + d] >= plan_.sizes.size()) {
          return damaged("the shape of value %zu refers to a size that does not exist", i);
        }
      }
      switch (static_cast<format::ValueKind>(value.kind)) {
        case format::ValueKind::computed: break;
        case format::ValueKind::input:
          if (value.source >= plan_.inputs.size()) return damaged("value %zu is no input", i);
          break;
        case format::ValueKind::constant: SQC_RETURN_IF_ERROR(constant(i, value)); break;
        default: return damaged("value %zu is of an unknown kind", i);
      }
      if (value.kind != static_cast<std::uint8_t>(format::ValueKind::constant) && value.layout != 0) {
        return damaged("value %zu is packed, and no constant", i);
      }
    }
    return Status::ok();
  }

  Status constant(std::size_t i, const format::Value& value) noexcept {
    if (value.source >= plan_.tensors.size()) return damaged("value %zu refers to a tensor that does not exist", i);
    std::int64_t count = 1;
    for (int d = 0; d < value.rank; ++d) {
      std::int64_t size = 0;
      SQC_RETURN_IF_ERROR(evaluate_size(plan_, plan_.lists[value.first_size + d], nullptr, &size));
      if (size < 0 || __builtin_mul_overflow(count, size, &count)) return damaged("value %zu has no size", i);
    }
    std::int64_t bytes = 0;
    if (__builtin_mul_overflow(count, dtype_bytes(static_cast<DType>(value.dtype)), &bytes) ||
        static_cast<std::uint64_t>(bytes) != plan_.tensors[value.source].bytes) {
      return damaged("value %zu has another size than its tensor", i);
    }
    return Status::ok();
  }

  Status ports(Span<const format::Port> ports, const char* what) noexcept {
    for (const format::Port& port : ports) {
      if (port.value >= plan_.values.size()) return damaged("an %s refers to a value that does not exist", what);
      if (plan_.values[port.value].dtype > static_cast<std::uint8_t>(DType::boolean)) {
        return damaged("an %s has a type that no caller knows", what);
      }
      SQC_RETURN_IF_ERROR(name(port.name_offset, port.name_bytes));
    }
    return Status::ok();
  }

  // Each input's value says that it is that input.
  Status input_values() noexcept {
    for (std::size_t i = 0; i < plan_.inputs.size(); ++i) {
      const format::Value& value = plan_.values[plan_.inputs[i].value];
      if (value.kind != static_cast<std::uint8_t>(format::ValueKind::input) || value.source != i) {
        return damaged("input %zu has another input's value", i);
      }
    }
    return Status::ok();
  }

  Status operators() noexcept {
    for (std::size_t i = 0; i < plan_.operators.size(); ++i) {
      const format::Operator& step = plan_.operators[i];
      const OperatorInfo* info = find_operator(step.kind);
      if (info == nullptr) {
        return Status::error(StatusCode::kUnsupported, "the file needs operator %u, which this build does not have",
                             step.kind);
      }
      SQC_RETURN_IF_ERROR(name(step.name_offset, step.name_bytes));
      if (step.inputs < info->min_inputs || step.inputs > info->max_inputs || step.outputs != info->outputs ||
          step.ints < info->min_ints || step.ints > info->max_ints || step.floats != info->floats) {
        return damaged("operator %zu (%s) has a wrong number of operands", i, info->name);
      }
      const std::uint64_t count = std::uint64_t{step.inputs} + step.outputs + step.ints;
      if (!inside(step.first_list, count, plan_.lists.size()) ||
          !inside(step.first_float, step.floats, plan_.floats.size())) {
        return damaged("the operands of operator %zu (%s) are cut off", i, info->name);
      }
      const std::uint32_t* list = plan_.lists.data() + step.first_list;
      for (std::uint64_t j = 0; j < count; ++j) {
        const bool is_size = j >= std::uint64_t{step.inputs} + step.outputs;
        if (!is_size && list[j] == kNone && j >= info->required_inputs && j < step.inputs) continue;
        if (list[j] >= (is_size ? plan_.sizes.size() : plan_.values.size())) {
          return damaged("an operand of operator %zu (%s) does not exist", i, info->name);
        }
      }
      for (std::uint64_t j = step.inputs; j < std::uint64_t{step.inputs} + step.outputs; ++j) {
        if (plan_.values[list[j]].kind != static_cast<std::uint8_t>(format::ValueKind::computed)) {
          return damaged("operator %zu (%s) writes to what is not its own", i, info->name);
        }
      }
    }
    return Status::ok();
  }

  Status name(std::uint32_t offset, std::uint32_t bytes) noexcept {
    return inside(offset, bytes, plan_.strings.size()) ? Status::ok() : damaged("a name is cut off");
  }

  Span<const std::uint8_t> file_;
  Plans& plans_;
  Plan plan_;  // the one that is being read
  format::Header header_ = {};
  format::Section sections_[format::kSectionCountWithGeneration] = {};
};

// Rounds towards minus infinity, as Python does.
bool floor_divide(std::int64_t a, std::int64_t b, std::int64_t* quotient, std::int64_t* rest) noexcept {
  if (b == 0 || (b == -1 && a == INT64_MIN)) return false;
  *quotient = a / b;
  *rest = a % b;
  if (*rest != 0 && (*rest < 0) != (b < 0)) {
    --*quotient;
    *rest += b;
  }
  return true;
}

}  // namespace

Status read_plans(Span<const std::uint8_t> file, Plans* plans) noexcept { return Reader(file, plans).read(); }

Status evaluate_size(const Plan& plan, std::uint32_t size, const std::int64_t* symbols, std::int64_t* result) noexcept {
  std::int64_t stack[format::kMaxStack] = {};
  int top = -1;
  const format::Size& range = plan.sizes[size];
  for (std::uint32_t i = 0; i < range.count; ++i) {
    const format::Instruction& step = plan.code[range.first + i];
    const auto opcode = static_cast<format::Opcode>(step.opcode);
    if (opcode == format::Opcode::constant) {
      stack[++top] = step.argument;
      continue;
    }
    if (opcode == format::Opcode::symbol) {
      if (symbols == nullptr) return damaged("a constant has a size that depends on the call");
      stack[++top] = symbols[step.argument];
      continue;
    }
    const std::int64_t b = stack[top--], a = stack[top];
    std::int64_t value = 0, rest = 0;
    bool fits = true;
    switch (opcode) {
      case format::Opcode::add: fits = !__builtin_add_overflow(a, b, &value); break;
      case format::Opcode::sub: fits = !__builtin_sub_overflow(a, b, &value); break;
      case format::Opcode::mul: fits = !__builtin_mul_overflow(a, b, &value); break;
      case format::Opcode::floordiv: fits = floor_divide(a, b, &value, &rest); break;
      case format::Opcode::mod: fits = floor_divide(a, b, &rest, &value); break;
      case format::Opcode::min: value = a < b ? a : b; break;
      case format::Opcode::max: value = a > b ? a : b; break;
      default: break;
    }
    if (!fits) return Status::error(StatusCode::kInvalidArgument, "a size of the plan cannot be computed for this call");
    stack[top] = value;
  }
  *result = stack[0];
  return Status::ok();
}

Status make_tensor(const Plan& plan, const format::Value& value, const std::int64_t* sizes, Tensor* tensor) noexcept {
  *tensor = Tensor();
  tensor->dtype = static_cast<DType>(value.dtype);
  tensor->layout = static_cast<Layout>(value.layout);
  tensor->rank = value.rank;
  std::int64_t bytes = dtype_bytes(tensor->dtype);
  for (int d = 0; d < value.rank; ++d) {
    const std::int64_t size = sizes[plan.lists[value.first_size + d]];
    tensor->shape[d] = size;
    // A zero would hide what overflows behind it, so that it counts as one here.
    if (size < 0 || __builtin_mul_overflow(bytes, size > 0 ? size : 1, &bytes) || bytes > (std::int64_t{1} << 46)) {
      return Status::error(StatusCode::kInvalidArgument, "a tensor of the plan has an impossible size for this call");
    }
  }
  tensor->set_contiguous();
  return Status::ok();
}

}  // namespace sqc
