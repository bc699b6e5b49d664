// The constants of one operator, as a file holds them: what kernels follow without looking is checked once, when
// the file is opened.

#ifndef SQC_ENGINE_OPS_PACKED_WEIGHTS_H_
#define SQC_ENGINE_OPS_PACKED_WEIGHTS_H_

#include "engine/operators.h"

namespace sqc {

class PackedWeights {
 public:
  PackedWeights(const Plan& plan, const format::Operator& step) noexcept : plan_(plan), step_(step) {}

  // Whether input i is a constant of that type and layout, with `count` elements.
  bool is(int i, DType dtype, Layout layout, std::int64_t count) const noexcept {
    const format::Value* value = find(i);
    return value != nullptr && value->dtype == static_cast<std::uint8_t>(dtype) &&
           value->layout == static_cast<std::uint8_t>(layout) && count >= 0 &&
           plan_.tensors[value->source].bytes == static_cast<std::uint64_t>(count * dtype_bytes(dtype));
  }
  bool has(int i) const noexcept { return i < step_.inputs && plan_.lists[step_.first_list + i] != format::kNone; }
  std::int64_t bytes(int i) const noexcept {
    const format::Value* value = find(i);
    return value == nullptr ? 0 : static_cast<std::int64_t>(plan_.tensors[value->source].bytes);
  }
  template <typename T>
  const T* data(int i) const noexcept {
    return reinterpret_cast<const T*>(plan_.file + plan_.tensors[find(i)->source].offset);
  }
  // A whole-number operand that does not depend on a call.
  Status integer(int i, std::int64_t* value) const noexcept {
    return evaluate_size(plan_, plan_.lists[step_.first_list + step_.inputs + step_.outputs + i], nullptr, value);
  }

 private:
  const format::Value* find(int i) const noexcept {
    if (!has(i)) return nullptr;
    const format::Value& value = plan_.values[plan_.lists[step_.first_list + i]];
    return value.kind == static_cast<std::uint8_t>(format::ValueKind::constant) ? &value : nullptr;
  }

  const Plan& plan_;
  const format::Operator& step_;
};

// Of convolutions; says nothing about other operators.
Status check_convolution_weights(const Plan& plan, const format::Operator& step) noexcept;

}  // namespace sqc

#endif  // SQC_ENGINE_OPS_PACKED_WEIGHTS_H_
