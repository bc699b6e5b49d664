#include "kernels/qconv/generic.h"
#include "kernels/simd/x86_avx512vnni.h"

namespace sqc {

void qconv_avx512vnni(const QconvParams& params, std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin,
                      std::int64_t panel_end, std::uint8_t* scratch) {
  qconv_generic<avx512vnni::Simd, 6, 8, 12, 12>(params, row_begin, row_end, panel_begin, panel_end, scratch);
}

}  // namespace sqc
