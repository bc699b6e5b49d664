// Reading reads everything: the sums tell.

#include "kernels/machine/machine.h"
#include "tests/test.h"

using namespace sqc;
using sqc_tests::Array;

SQC_TEST(machine_reads_every_byte) {
  constexpr std::int64_t kUnits = 9;
  Array<std::int32_t> data(kUnits * 128);
  std::int32_t expected[16] = {};
  for (std::int64_t i = 0; i < data.size(); ++i) expected[i % 16] += data[i] = static_cast<std::int32_t>(i * i);
  for (const auto& kernel : machine_kernels()) {
    if (!isa_available(kernel.isa)) {
      sqc_tests::skip_kernel(kernel.name);
      continue;
    }
    sqc_tests::count_kernel(kernel.name);
    std::int32_t sum[16];
    kernel.run({MachineWork::read, reinterpret_cast<const std::uint8_t*>(data.data())}, 0, kUnits, sum);
    SQC_CHECK(std::memcmp(sum, expected, sizeof sum) == 0);
    std::int32_t once[16], thrice[16];
    const MachineParams multiply = {MachineWork::multiply, reinterpret_cast<const std::uint8_t*>(data.data())};
    kernel.run(multiply, 0, 1, once);
    kernel.run(multiply, 0, 3, thrice);
    for (int i = 0; i < 16; ++i) SQC_CHECK(thrice[i] == 3 * once[i]);
  }
}
