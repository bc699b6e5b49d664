#include "kernels/quantize/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void quantize_avx512vnni(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  quantize_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
