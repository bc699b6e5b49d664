#include "kernels/machine/generic.h"
#include "kernels/simd/arm_neon_dotprod.h"

namespace sqc {

void machine_neon_dotprod(const MachineParams& params, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  machine_generic<neon_dotprod::Simd, 4>(params, begin, end, sum);
}

}  // namespace sqc
