#include "kernels/q4gemm/generic.h"
#include "kernels/simd/x86_avx512vbmi.h"

namespace sqc {

void q4gemm_avx512vbmi(const Q4gemmParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4gemm_generic<avx512vbmi::Simd, 4, 6, 2>(params, begin, end, scratch);
}

}  // namespace sqc
