#include "kernels/qdepthwise/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qdepthwise_avx2(const QdepthwiseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qdepthwise_generic<avx2::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
