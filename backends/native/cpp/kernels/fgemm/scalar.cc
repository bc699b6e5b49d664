#include "kernels/fgemm/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void fgemm_scalar(const FgemmParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  fgemm_generic<scalar::Simd, 6, 1>(params, begin, end, scratch);
}

}  // namespace sqc
