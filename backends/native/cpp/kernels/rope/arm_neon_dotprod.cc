#include "kernels/rope/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void rope_neon_dotprod(const RopeParams& params, std::int64_t begin, std::int64_t end) {
  rope_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
