#include "kernels/machine/generic.h"
#include "kernels/simd/scalar.h"

namespace sqc {

void machine_scalar(const MachineParams& params, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  machine_generic<scalar::Simd, 1>(params, begin, end, sum);
}

}  // namespace sqc
