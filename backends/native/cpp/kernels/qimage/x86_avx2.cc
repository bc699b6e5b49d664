#include "kernels/qimage/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qimage_avx2(const QimageParams& params, std::int64_t begin, std::int64_t end) {
  qimage_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
