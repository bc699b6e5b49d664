#include "kernels/qimage/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void qimage_neon_dotprod(const QimageParams& params, std::int64_t begin, std::int64_t end) {
  qimage_generic<neon_dotprod::Simd>(params, begin, end);
}

}  // namespace sqc
