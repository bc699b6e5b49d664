#include "kernels/qbinary/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qbinary_avx512vnni(const QbinaryParams& params, std::int64_t begin, std::int64_t end) {
  qbinary_generic<avx512vnni::Simd>(params, begin, end);
}

}  // namespace sqc
