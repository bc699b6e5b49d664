#include "kernels/qsparse/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qsparse_neon_dotprod(const QsparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qsparse_generic<neon_dotprod::Simd, 4, 4, 6, 1>(params, begin, end, scratch);
}

}  // namespace sqc
