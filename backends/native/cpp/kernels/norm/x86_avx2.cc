#include "kernels/norm/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void norm_avx2(const NormParams& params, std::int64_t begin, std::int64_t end, float* scratch) {
  norm_generic<avx2::Simd>(params, begin, end, scratch);
}

}  // namespace sqc
