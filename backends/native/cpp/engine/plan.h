// A plan: what a `.sqm` file says, checked. Everything is a view of the file's bytes.

#ifndef SQC_ENGINE_PLAN_H_
#define SQC_ENGINE_PLAN_H_

#include <cstdint>

#include "base/span.h"
#include "base/status.h"
#include "engine/format.h"
#include "engine/tensor.h"

namespace sqc {

struct Plan {
  Span<const char> strings;
  Span<const format::Symbol> symbols;
  Span<const format::Instruction> code;
  Span<const format::Size> sizes;
  Span<const format::Value> values;
  Span<const std::uint32_t> lists;
  Span<const double> floats;
  Span<const format::Operator> operators;
  Span<const format::Port> inputs, outputs;
  Span<const format::Tensor> tensors;
  Span<const char> metadata;
  const std::uint8_t* file = nullptr;

  Span<const char> name(std::uint32_t offset, std::uint32_t bytes) const noexcept {
    return {strings.data() + offset, bytes};
  }
};

// What a file holds: the plan for whole calls, and perhaps one that continues texts.
struct Plans {
  Plan plan, generation;
  bool generates = false;
  format::Generation settings = {};
};

// Reads and checks the whole file: sizes, checksums, every index and every number whose meaning is fixed by
// the format. What a plan holds afterwards can be followed without further checks; that operators fit their
// operands is for their `prepare` to say. `file` is aligned to 64 bytes and outlives the plan.
Status read_plans(Span<const std::uint8_t> file, Plans* plans) noexcept;

// The value of a size, where `symbols` are given (null: none may occur in it). An error where it overflows
// or divides by zero.
Status evaluate_size(const Plan& plan, std::uint32_t size, const std::int64_t* symbols, std::int64_t* result) noexcept;

// Shape and type of a value; strides are contiguous. An error where a size is negative, or the tensor is
// larger than any memory.
Status make_tensor(const Plan& plan, const format::Value& value, const std::int64_t* sizes, Tensor* tensor) noexcept;

}  // namespace sqc

#endif  // SQC_ENGINE_PLAN_H_
