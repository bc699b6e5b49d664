#include "kernels/q4gemm/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void q4gemm_neon_dotprod(const Q4gemmParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4gemm_generic<neon_dotprod::Simd, 4, 3, 1>(params, begin, end, scratch);
}

}  // namespace sqc
