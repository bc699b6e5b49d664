#include "kernels/machine/generic.h"
#include "kernels/simd/x86_avx2.h"

namespace sqc {

void machine_avx2(const MachineParams& params, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  machine_generic<avx2::Simd, 3>(params, begin, end, sum);
}

}  // namespace sqc
