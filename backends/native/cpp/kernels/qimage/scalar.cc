#include "kernels/qimage/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qimage_scalar(const QimageParams& params, std::int64_t begin, std::int64_t end) {
  qimage_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
