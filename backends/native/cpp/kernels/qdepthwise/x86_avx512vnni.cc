#include "kernels/qdepthwise/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qdepthwise_avx512vnni(const QdepthwiseParams& params, std::int64_t begin, std::int64_t end,
                           std::uint8_t* scratch) {
  qdepthwise_generic<avx512vnni::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
