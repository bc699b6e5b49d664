#include "kernels/q4gemm/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void q4gemm_scalar(const Q4gemmParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4gemm_generic<scalar::Simd, 1, 1, 1>(params, begin, end, scratch);
}

}  // namespace sqc
