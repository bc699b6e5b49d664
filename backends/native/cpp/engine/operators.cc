#include "engine/operators.h"

#include <cstdarg>
#include <cstdio>

namespace sqc {
namespace {

constexpr OperatorInfo make_info(std::uint16_t id, const char* name, std::uint16_t min_inputs, std::uint16_t max_inputs,
                                 std::uint16_t outputs, std::uint16_t min_ints, std::uint16_t max_ints,
                                 std::uint16_t floats, Status (*prepare)(PrepareContext&) noexcept,
                                 Status (*run)(RunContext&) noexcept) {
  return {id, name, min_inputs, max_inputs, outputs, min_ints, max_ints, floats, min_inputs, prepare, run};
}

constexpr OperatorInfo kOperators[] = {
#define SQC_OPERATOR(id, name, family, ...) make_info(id, #name, __VA_ARGS__, prepare_##family, run_##name),
#include "engine/operators.inc"
#undef SQC_OPERATOR
};

// Place in kOperators by number, plus one; 0: there is none.
struct Index {
  std::uint8_t place[256];
};

constexpr Index make_index() {
  Index index{};
  std::uint8_t place = 0;
  for (const OperatorInfo& info : kOperators) index.place[info.id] = ++place;
  return index;
}

constexpr Index kIndex = make_index();

}  // namespace

Span<const OperatorInfo> all_operators() noexcept { return kOperators; }

const OperatorInfo* find_operator(std::uint16_t id) noexcept {
  return id < 256 && kIndex.place[id] != 0 ? &kOperators[kIndex.place[id] - 1] : nullptr;
}

Status misfit(const char* text, ...) noexcept {
  char message[160];
  va_list arguments;
  va_start(arguments, text);
  std::vsnprintf(message, sizeof message, text, arguments);
  va_end(arguments);
  return Status::error(StatusCode::kInvalidArgument, "%s", message);
}

}  // namespace sqc
