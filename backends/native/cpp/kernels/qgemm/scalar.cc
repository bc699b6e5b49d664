#include "kernels/qgemm/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qgemm_scalar(const QgemmParams& params, std::int64_t begin, std::int64_t end) {
  qgemm_generic<scalar::Simd, 1, 1, 1, 1>(params, begin, end);
}

}  // namespace sqc
