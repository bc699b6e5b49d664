// Reading and multiplying over the types of kernels/simd.

#ifndef SQC_KERNELS_MACHINE_GENERIC_H_
#define SQC_KERNELS_MACHINE_GENERIC_H_

#include "kernels/machine/machine.h"
#include "kernels/simd/simd.h"

namespace sqc {
namespace {

template <class S>
static void read_units(const std::uint8_t* data, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  typename S::I32 total[8];
  SQC_UNROLL for (int i = 0; i < 8; ++i) total[i] = S::set_i(0);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const auto* p = reinterpret_cast<const std::int32_t*>(data + unit * 512);
    SQC_UNROLL for (int i = 0; i < 8; ++i) total[i] = S::add_i(total[i], S::load_i(p + 16 * i));
  }
  SQC_UNROLL for (int i = 1; i < 8; ++i) total[0] = S::add_i(total[0], total[i]);
  S::store_i(sum, total[0]);
}

// Twelve products a step, in `Chains` independent sums: as many as the registers hold. Each has activations
// of its own, or the compiler would compute one of them.
template <class S, int Chains>
static void multiply_steps(const std::uint8_t* data, std::int64_t steps, std::int32_t* sum) {
  static_assert(12 % Chains == 0, "a step has twelve products");
  const auto* bytes = reinterpret_cast<const std::int8_t*>(data);
  const typename S::TileT tile = S::load_tile_t(bytes);
  typename S::ActS act[Chains];
  typename S::AccT acc[Chains];
  SQC_UNROLL for (int i = 0; i < Chains; ++i) act[i] = S::load_act_s8(bytes + i * 4), acc[i] = S::zero_t();
  for (std::int64_t step = 0; step < steps * (12 / Chains); ++step) {
    SQC_UNROLL for (int i = 0; i < Chains; ++i) acc[i] = S::dot_table(acc[i], tile, act[i]);
  }
  SQC_UNROLL for (int i = 1; i < Chains; ++i) acc[0] = S::add_t(acc[0], acc[i]);
  S::store_i(sum, S::reduce_t(acc[0]));
}

template <class S, int Chains>
static void machine_generic(const MachineParams& p, std::int64_t begin, std::int64_t end, std::int32_t* sum) {
  if (p.work == MachineWork::read) {
    read_units<S>(p.data, begin, end, sum);
  } else {
    multiply_steps<S, Chains>(p.data, end - begin, sum);
  }
}

}  // namespace
}  // namespace sqc

#endif  // SQC_KERNELS_MACHINE_GENERIC_H_
