#include "kernels/fgemm/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void fgemm_avx2(const FgemmParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  fgemm_generic<avx2::Simd, 6, 1>(params, begin, end, scratch);
}

}  // namespace sqc
