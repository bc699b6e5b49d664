#include "kernels/q4sparse/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void q4sparse_scalar(const Q4sparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4sparse_generic<scalar::Simd, 1, 1, 1>(params, begin, end, scratch);
}

}  // namespace sqc
