#include "kernels/q4sparse/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void q4sparse_neon_dotprod(const Q4sparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4sparse_generic<neon_dotprod::Simd, 4, 3, 1>(params, begin, end, scratch);
}

}  // namespace sqc
