#include "kernels/fgemm/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void fgemm_avx512vnni(const FgemmParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  fgemm_generic<avx512vnni::Simd, 6, 4>(params, begin, end, scratch);
}

}  // namespace sqc
