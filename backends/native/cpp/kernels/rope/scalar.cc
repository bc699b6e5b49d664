#include "kernels/rope/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void rope_scalar(const RopeParams& params, std::int64_t begin, std::int64_t end) {
  rope_generic<scalar::Simd>(params, begin, end);
}

}  // namespace sqc
