#include "kernels/qbinary/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void qbinary_scalar(const QbinaryParams& params, std::int64_t begin, std::int64_t end) {
  qbinary_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
