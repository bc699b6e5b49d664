#include "kernels/qsparse/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qsparse_scalar(const QsparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  qsparse_generic<scalar::Simd, 1, 1, 1, 1>(params, begin, end, scratch);
}

}  // namespace sqc
