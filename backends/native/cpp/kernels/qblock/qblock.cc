#include "kernels/qblock/qblock.h"

#include <cstring>

#include "base/work_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QblockFunction> kKernels[] = {
#define SQC_QBLOCK_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qblock/kernels.inc"
#undef SQC_QBLOCK_KERNEL
};

Status check_format(std::int64_t block_outputs, std::int64_t chunk) noexcept {
  if (block_outputs != 1 && block_outputs != 4 && block_outputs != 16) {
    return Status::error(StatusCode::kInvalidArgument, "qblock: a block has 1, 4 or 16 outputs");
  }
  if (chunk < 1 || chunk > 256) return Status::error(StatusCode::kInvalidArgument, "qblock: chunk is not 1 to 256");
  return Status::ok();
}

// The bytes of a block, zero outside the matrix; whether one is not zero.
bool load_block(std::int64_t n, std::int64_t k, const std::int8_t* b, std::int64_t row, std::int64_t outputs,
                std::int64_t unit, std::int8_t* block) noexcept {
  bool any = false;
  for (std::int64_t o = 0; o < outputs; ++o) {
    for (std::int64_t i = 0; i < 4; ++i) {
      const std::int64_t output = row * outputs + o, column = unit * 4 + i;
      const std::int8_t weight = output < n && column < k ? b[output * k + column] : std::int8_t{0};
      block[o * 4 + i] = weight;
      any = any || weight != 0;
    }
  }
  return any;
}

}  // namespace

Span<const Kernel<QblockFunction>> qblock_kernels() noexcept { return kKernels; }

const Kernel<QblockFunction>& qblock_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qblock_interleaved_bytes(std::int64_t m, std::int64_t k) noexcept {
  return (m + 15) / 16 * 16 * ((k + 3) / 4) * 4;
}

Status qblock(ThreadPool& pool, const Kernel<QblockFunction>& kernel, const QblockParams& params,
              std::int32_t* sums) noexcept {
  const QgemmParams& p = params.dense;
  SQC_RETURN_IF_ERROR(qgemm_check(p));
  SQC_RETURN_IF_ERROR(check_format(params.block_outputs, params.chunk));
  if (p.m == 0 || p.n == 0) return Status::ok();
  const std::int64_t tiles = (p.m + kQblockTileRows - 1) / kQblockTileRows, panels = (p.n + 15) / 16;
  SQC_RETURN_IF_ERROR(pool.run([&](int thread) {
    const Range range = split_evenly(tiles, 1, pool.threads(), thread);
    if (range.begin < range.end) kernel.run(params, QblockPhase::interleave, range.begin, range.end, nullptr);
  }));
  // A panel without blocks still takes the time of its outputs. Tile after tile: where there are as many as threads,
  // each finds the rows that it interleaved in its own cache, and leaves its results there to what works on rows next.
  return run_shared_by_cost(
      pool, {params.blocks_before, static_cast<std::size_t>(panels) + 1}, 8, 1, 1,
      [&](int thread, Range part) {
        kernel.run(params, QblockPhase::multiply, part.begin, part.end, sums + thread * kQblockSumCount);
      },
      tiles);
}

std::int64_t qblock_start_count(std::int64_t n, std::int64_t k, std::int64_t block_outputs, std::int64_t chunk) noexcept {
  const std::int64_t chunks = ((k + 3) / 4 + chunk - 1) / chunk;
  return chunks * ((n + 15) / 16 * 16 / block_outputs) + 1;
}

std::int64_t qblock_count(std::int64_t n, std::int64_t k, std::int64_t block_outputs, const std::int8_t* b) noexcept {
  std::int64_t count = 0;
  std::int8_t block[64];
  for (std::int64_t row = 0; row < (n + 15) / 16 * 16 / block_outputs; ++row) {
    for (std::int64_t unit = 0; unit < (k + 3) / 4; ++unit) count += load_block(n, k, b, row, block_outputs, unit, block);
  }
  return count;
}

Status qblock_pack(std::int64_t n, std::int64_t k, std::int64_t block_outputs, std::int64_t chunk, const std::int8_t* b,
                   std::uint8_t* index, std::int8_t* values, std::uint64_t* start, std::uint64_t* blocks_before,
                   std::int32_t* sum) noexcept {
  SQC_RETURN_IF_ERROR(qgemm_check_sizes(n, k));
  SQC_RETURN_IF_ERROR(check_format(block_outputs, chunk));
  const std::int64_t units = (k + 3) / 4, panels = (n + 15) / 16, rows = panels * 16 / block_outputs;
  const std::int64_t chunks = (units + chunk - 1) / chunk, block_bytes = block_outputs * 4;
  for (std::int64_t i = 0; i <= panels; ++i) blocks_before[i] = 0;
  for (std::int64_t i = 0; i < panels * 16; ++i) sum[i] = 0;
  std::uint64_t count = 0;
  for (std::int64_t c = 0; c < chunks; ++c) {
    for (std::int64_t row = 0; row < rows; ++row) {
      start[c * rows + row] = count;
      for (std::int64_t unit = c * chunk; unit < units && unit < (c + 1) * chunk; ++unit) {
        std::int8_t block[64];
        if (!load_block(n, k, b, row, block_outputs, unit, block)) continue;
        index[count] = static_cast<std::uint8_t>(unit - c * chunk);
        std::memcpy(values + static_cast<std::int64_t>(count) * block_bytes, block, static_cast<std::size_t>(block_bytes));
        for (std::int64_t i = 0; i < block_bytes; ++i) sum[row * block_outputs + i / 4] += block[i];
        ++blocks_before[row * block_outputs / 16 + 1];
        ++count;
      }
    }
  }
  start[chunks * rows] = count;
  for (std::int64_t i = 0; i < panels; ++i) blocks_before[i + 1] += blocks_before[i];
  return Status::ok();
}

}  // namespace sqc
