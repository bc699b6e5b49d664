#include "kernels/q4sparse/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void q4sparse_avx2(const Q4sparseParams& params, std::int64_t begin, std::int64_t end, std::uint8_t* scratch) {
  q4sparse_generic<avx2::Simd, 2, 2, 1>(params, begin, end, scratch);
}

}  // namespace sqc
