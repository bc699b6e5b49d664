#include "kernels/fgemm/fgemm.h"

#include <cstring>

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<FgemmFunction> kKernels[] = {
#define SQC_FGEMM_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/fgemm/kernels.inc"
#undef SQC_FGEMM_KERNEL
};

Status invalid(const char* what) noexcept { return Status::error(StatusCode::kInvalidArgument, "fgemm: %s", what); }

std::uint16_t to_bf16(float value) noexcept {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(word >> 16 | 0x40u);  // a quiet NaN
  return static_cast<std::uint16_t>((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

// Sixteen k of a panel at a time, which both orders of b read from whole cache lines.
template <class T, class Convert>
void pack(std::int64_t n, std::int64_t k, const float* b, std::int64_t n_stride, std::int64_t k_stride, T* packed,
          Convert convert) noexcept {
  for (std::int64_t first = 0; first < n; first += 16) {
    const std::int64_t rows = n - first < 16 ? n - first : 16;
    for (std::int64_t i = 0; i < k; i += 16, packed += 256) {
      const std::int64_t steps = k - i < 16 ? k - i : 16;
      const float* from = b + first * n_stride + i * k_stride;
      if (rows < 16) std::memset(packed, 0, static_cast<std::size_t>(steps * 16) * sizeof(T));
      if (n_stride == 1) {
        for (std::int64_t step = 0; step < steps; ++step) {
          for (std::int64_t row = 0; row < rows; ++row) packed[step * 16 + row] = convert(from[step * k_stride + row]);
        }
      } else {
        for (std::int64_t row = 0; row < rows; ++row) {
          for (std::int64_t step = 0; step < steps; ++step) {
            packed[step * 16 + row] = convert(from[row * n_stride + step * k_stride]);
          }
        }
      }
      if (steps < 16) packed -= (16 - steps) * 16;  // the next panel follows without a gap
    }
  }
}

}  // namespace

Span<const Kernel<FgemmFunction>> fgemm_kernels() noexcept { return kKernels; }

const Kernel<FgemmFunction>& fgemm_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t fgemm_scratch_bytes(std::int64_t m, FgemmType b_type) noexcept {
  constexpr std::int64_t kBlock = 512, kWidestStrip = 64;  // steps of k, outputs
  return b_type == FgemmType::bf16 && m > 12 ? kBlock * kWidestStrip * 4 : 0;
}

Status fgemm(ThreadPool& pool, const Kernel<FgemmFunction>& kernel, const FgemmParams& p, void* scratch) noexcept {
  if (p.m < 0 || p.n < 0 || p.k < 0) return invalid("a size is negative");
  if (p.a_stride < p.k) return invalid("a_stride is less than k");
  if (p.c_stride < p.n) return invalid("c_stride is less than n");
  if (p.m == 0 || p.n == 0) return Status::ok();
  const std::int64_t panels = (p.n + 15) / 16, scratch_floats = fgemm_scratch_bytes(p.m, p.b_type) / 4;
  const int threads = pool.threads();
  auto* floats = static_cast<float*>(scratch);
  // A product of few multiplications is done before another thread is awake.
  if (p.m * p.n * p.k <= 32768) {
    kernel.run(p, 0, panels, floats);
    return Status::ok();
  }
  // Four panels are a strip of the widest kernel. Where there are fewer than the threads need, rows are split.
  if (panels < 8 * threads && p.m >= 12 * threads) {
    return pool.run([&](int thread) {
      const Range rows = split_evenly(p.m, 6, threads, thread);
      if (rows.begin >= rows.end) return;
      FgemmParams part = p;
      part.m = rows.end - rows.begin;
      part.a += rows.begin * p.a_stride;
      part.c += rows.begin * p.c_stride;
      kernel.run(part, 0, panels, floats + thread * scratch_floats);
    });
  }
  return run_shared(pool, panels, 4, 4, [&](int thread, Range part) {
    kernel.run(p, part.begin, part.end, floats + thread * scratch_floats);
  });
}

std::int64_t fgemm_packed_bytes(std::int64_t n, std::int64_t k, FgemmType type) noexcept {
  return (n + 15) / 16 * 16 * k * (type == FgemmType::f32 ? 4 : 2);
}

Status fgemm_pack(std::int64_t n, std::int64_t k, const float* b, std::int64_t n_stride, std::int64_t k_stride,
                  FgemmType type, void* packed) noexcept {
  if (n < 0 || k < 0) return invalid("a size is negative");
  if (type == FgemmType::f32) {
    pack(n, k, b, n_stride, k_stride, static_cast<float*>(packed), [](float value) { return value; });
  } else {
    pack(n, k, b, n_stride, k_stride, static_cast<std::uint16_t*>(packed), to_bf16);
  }
  return Status::ok();
}

}  // namespace sqc
