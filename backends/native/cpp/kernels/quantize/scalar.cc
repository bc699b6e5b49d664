#include "kernels/quantize/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void quantize_scalar(const QuantizeParams& params, std::int64_t begin, std::int64_t end) {
  quantize_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
