#include "kernels/qgemm/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qgemm_avx512vnni(const QgemmParams& params, std::int64_t begin, std::int64_t end) {
  qgemm_generic<avx512vnni::Simd, 4, 4, 6, 4>(params, begin, end);
}

}  // namespace sqc
