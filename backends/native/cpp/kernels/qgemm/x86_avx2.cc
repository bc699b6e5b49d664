#include "kernels/qgemm/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qgemm_avx2(const QgemmParams& params, std::int64_t begin, std::int64_t end) {
  qgemm_generic<avx2::Simd, 2, 2, 2, 1>(params, begin, end);
}

}  // namespace sqc
