#include "kernels/machine/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void machine_avx512vnni(const MachineParams& params, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  machine_generic<avx512vnni::Simd, 12>(params, begin, end, sum);
}

}  // namespace sqc
