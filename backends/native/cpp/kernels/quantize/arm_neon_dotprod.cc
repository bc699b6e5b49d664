#include "kernels/quantize/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void quantize_neon_dotprod(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  quantize_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
