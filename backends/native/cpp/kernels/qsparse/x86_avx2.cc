#include "kernels/qsparse/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void qsparse_avx2(const QsparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qsparse_generic<avx2::Simd, 2, 2, 2, 1>(params, begin, end, scratch);
}

}  // namespace sqc
