#include "kernels/qimage/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qimage_avx512vnni(const QimageParams& params, std::int64_t begin, std::int64_t end) {
  qimage_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
