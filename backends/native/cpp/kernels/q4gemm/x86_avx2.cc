#include "kernels/q4gemm/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void q4gemm_avx2(const Q4gemmParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4gemm_generic<avx2::Simd, 2, 2, 1>(params, begin, end, scratch);
}

}  // namespace sqc
