#include "kernels/q4sparse/generic.h"
#include "kernels/simd/x86_avx512vbmi.h"

namespace sqc {

void q4sparse_avx512vbmi(const Q4sparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4sparse_generic<avx512vbmi::Simd, 4, 6, 2>(params, begin, end, scratch);
}

}  // namespace sqc
