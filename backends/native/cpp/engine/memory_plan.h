// Where tensors lie in one block of memory that they share: two may overlap only if they never live at the
// same time.

#ifndef SQC_ENGINE_MEMORY_PLAN_H_
#define SQC_ENGINE_MEMORY_PLAN_H_

#include <cstdint>
#include <vector>

namespace sqc {

struct Lifetime {
  std::int32_t first, last;  // steps, both included
  std::int64_t bytes;
  std::int64_t offset;       // the result, a multiple of 64
};

// Sets every offset and returns the bytes of the block. The largest are placed first, each at the lowest
// place that is free for as long as it lives (Pisarchyk and Lee 2020, "greedy by size").
std::int64_t plan_memory(std::vector<Lifetime>& lifetimes);

}  // namespace sqc

#endif  // SQC_ENGINE_MEMORY_PLAN_H_
