#include "kernels/qsparse/generic.h"
#include "kernels/simd/x86_avx512vbmi.h"

namespace sqc {

void qsparse_avx512vbmi(const QsparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qsparse_generic<avx512vbmi::Simd, 4, 4, 6, 4>(params, begin, end, scratch);
}

}  // namespace sqc
