#include "kernels/qbinary/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qbinary_neon_dotprod(const QbinaryParams& params, std::int64_t begin, std::int64_t end) {
  qbinary_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
