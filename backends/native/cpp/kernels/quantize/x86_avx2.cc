#include "kernels/quantize/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void quantize_avx2(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  quantize_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
