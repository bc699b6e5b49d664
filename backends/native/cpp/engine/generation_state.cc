#include "engine/generation_state.h"

#include <algorithm>
#include <new>

#include "engine/operators.h"

namespace sqc {
namespace {

// More than any memory, and far from overflow.
constexpr std::int64_t kMostBytes = std::int64_t{1} << 46;

Status damaged(const char* what) noexcept {
  return Status::error(StatusCode::kDamaged, "the file is damaged: %s", what);
}

// The size of a value's dimension, which no call may decide.
Status fixed_size(const Plan& plan, const format::Value& value, int d, std::int64_t* size) noexcept {
  SQC_RETURN_IF_ERROR(evaluate_size(plan, plan.lists[value.first_size + static_cast<std::uint32_t>(d)], nullptr, size));
  return *size >= 1 && *size <= (std::int64_t{1} << 31) ? Status::ok() : damaged("what is kept of a text has no size");
}

}  // namespace

Status GenerationState::create(const Plan& plan, std::int64_t slots, std::int64_t capacity, KvType type) noexcept {
  slots_ = slots;
  capacity_ = capacity;
  type_ = type;
  try {
    std::size_t count = 0;
    for (const format::Operator& step : plan.operators) {
      const auto id = static_cast<OperatorId>(step.kind);
      count += id == OperatorId::cached_attention || id == OperatorId::append ? 1 : 0;
    }
    parts_.resize(count);
    std::vector<bool> seen(count, false);
    for (const format::Operator& step : plan.operators) {
      const auto id = static_cast<OperatorId>(step.kind);
      if (id != OperatorId::cached_attention && id != OperatorId::append) continue;
      const std::uint32_t* list = plan.lists.data() + step.first_list;
      std::int64_t first = 0, number = 0;
      SQC_RETURN_IF_ERROR(evaluate_size(plan, list[step.inputs + step.outputs], nullptr, &first));
      SQC_RETURN_IF_ERROR(evaluate_size(plan, list[step.inputs + step.outputs + 1], nullptr, &number));
      if (number < 0 || number >= static_cast<std::int64_t>(count) || seen[static_cast<std::size_t>(number)]) {
        return damaged("two operators keep their past in one place");
      }
      seen[static_cast<std::size_t>(number)] = true;
      Part& part = parts_[static_cast<std::size_t>(number)];
      part.is_cache = id == OperatorId::cached_attention;
      if (part.is_cache) {
        const format::Value& key = plan.values[list[1]];
        if (key.rank != 4) return damaged("keys have no four dimensions");
        SQC_RETURN_IF_ERROR(fixed_size(plan, key, 1, &part.heads));
        SQC_RETURN_IF_ERROR(fixed_size(plan, key, 3, &part.head_dim));
        if (part.head_dim > 65536) return damaged("heads are too large");
        KvCache cache = {type, 1, part.heads, capacity, part.head_dim, nullptr, nullptr, nullptr, nullptr};
        std::int64_t elements = 0;
        if (__builtin_mul_overflow(part.heads * kv_row(part.head_dim), capacity, &elements) || elements > kMostBytes / 8 / slots) {
          return Status::error(StatusCode::kOutOfMemory, "the cache for %lld positions is larger than any memory",
                               static_cast<long long>(capacity));
        }
        cache.batch = slots;
        const KvBytes bytes = kv_bytes(cache);
        SQC_RETURN_IF_ERROR(part.k.allocate(static_cast<std::size_t>(bytes.k)));
        SQC_RETURN_IF_ERROR(part.v.allocate(static_cast<std::size_t>(bytes.v)));
        SQC_RETURN_IF_ERROR(part.k_scale.allocate(static_cast<std::size_t>(bytes.scale)));
        SQC_RETURN_IF_ERROR(part.v_scale.allocate(static_cast<std::size_t>(bytes.scale)));
        continue;
      }
      has_tensors_ = true;
      const format::Value& value = plan.values[list[step.inputs]];
      part.position_bytes = dtype_bytes(static_cast<DType>(value.dtype));
      for (int d = 0; d < value.rank; ++d) {
        std::int64_t size = 1;
        if (d != first) SQC_RETURN_IF_ERROR(fixed_size(plan, value, d, &size));
        if (__builtin_mul_overflow(part.position_bytes, size, &part.position_bytes)) return damaged("a kept tensor is too large");
      }
      std::int64_t bytes = 0;
      if (__builtin_mul_overflow(part.position_bytes, capacity, &bytes) || bytes > kMostBytes / slots) {
        return Status::error(StatusCode::kOutOfMemory, "what is kept of %lld positions is larger than any memory",
                             static_cast<long long>(capacity));
      }
      SQC_RETURN_IF_ERROR(part.k.allocate(static_cast<std::size_t>(bytes * slots)));
    }
  } catch (const std::bad_alloc&) {
    return Status::error(StatusCode::kOutOfMemory, "there is not enough memory");
  }
  return Status::ok();
}

std::size_t GenerationState::bytes() const noexcept {
  std::size_t total = 0;
  for (const Part& part : parts_) total += part.k.size() + part.v.size() + part.k_scale.size() + part.v_scale.size();
  return total;
}

bool GenerationState::has_cache(std::int64_t number, std::int64_t heads, std::int64_t head_dim) const noexcept {
  if (number < 0 || number >= static_cast<std::int64_t>(parts_.size())) return false;
  const Part& part = parts_[static_cast<std::size_t>(number)];
  return part.is_cache && part.heads == heads && part.head_dim == head_dim;
}

bool GenerationState::has_tensor(std::int64_t number, std::int64_t position_bytes) const noexcept {
  if (number < 0 || number >= static_cast<std::int64_t>(parts_.size())) return false;
  const Part& part = parts_[static_cast<std::size_t>(number)];
  return !part.is_cache && part.position_bytes == position_bytes;
}

KvCache GenerationState::cache(std::int64_t number, std::int64_t slot, std::int64_t count) const noexcept {
  const Part& part = parts_[static_cast<std::size_t>(number)];
  KvCache cache = {type_, 1, part.heads, capacity_, part.head_dim, nullptr, nullptr, nullptr, nullptr};
  const KvBytes one = kv_bytes(cache);
  cache.batch = count;
  cache.k = part.k.data() + slot * one.k;
  cache.v = part.v.data() + slot * one.v;
  if (type_ == KvType::s8) {
    cache.k_scale = reinterpret_cast<float*>(part.k_scale.data() + slot * one.scale);
    cache.v_scale = reinterpret_cast<float*>(part.v_scale.data() + slot * one.scale);
  }
  return cache;
}

std::uint8_t* GenerationState::tensor(std::int64_t number, std::int64_t slot) const noexcept {
  const Part& part = parts_[static_cast<std::size_t>(number)];
  return part.k.data() + slot * part.position_bytes * capacity_;
}

}  // namespace sqc
