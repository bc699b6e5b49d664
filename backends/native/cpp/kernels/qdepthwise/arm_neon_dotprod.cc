#include "kernels/qdepthwise/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qdepthwise_neon_dotprod(const QdepthwiseParams& params, std::int64_t begin, std::int64_t end,
                             std::uint8_t* scratch) {
  qdepthwise_generic<neon_dotprod::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
