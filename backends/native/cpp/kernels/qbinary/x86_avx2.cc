#include "kernels/qbinary/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qbinary_avx2(const QbinaryParams& params, std::int64_t begin, std::int64_t end) {
  qbinary_generic<avx2::Simd>(params, begin, end);
}

}  // namespace sqc
