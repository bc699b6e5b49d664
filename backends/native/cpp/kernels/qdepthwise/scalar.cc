#include "kernels/qdepthwise/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qdepthwise_scalar(const QdepthwiseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qdepthwise_generic<scalar::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
