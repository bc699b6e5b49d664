#include "kernels/qconvblock/qconvblock.h"

#include "kernels/qconv/pixel_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QconvblockFunction> kKernels[] = {
#define SQC_QCONVBLOCK_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qconvblock/kernels.inc"
#undef SQC_QCONVBLOCK_KERNEL
};

}  // namespace

static_assert(kQconvblockPixels == kQconvRows, "pointers are looked up for a tile at once");

Span<const Kernel<QconvblockFunction>> qconvblock_kernels() noexcept { return kKernels; }

const Kernel<QconvblockFunction>& qconvblock_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qconvblock_scratch_bytes(const QconvParams& p) noexcept {
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps();
  return kQconvblockStripPanels * 16 * kQconvblockPixels * 4 + taps * run * kQconvblockPixels + (run + 63) / 64 * 64 +
         taps * kQconvRows * static_cast<std::int64_t>(sizeof(void*));
}

Status qconvblock(ThreadPool& pool, const Kernel<QconvblockFunction>& kernel, const QconvblockParams& s,
                  std::uint8_t* scratch) noexcept {
  const QconvParams& p = s.dense;
  SQC_RETURN_IF_ERROR(check_qconv(p));
  if (p.groups != 1) return Status::error(StatusCode::kInvalidArgument, "qconvblock: there is one group");
  if (s.chunk < 1 || s.chunk > kQconvblockMaxChunk) {
    return Status::error(StatusCode::kInvalidArgument, "qconvblock: chunk is not 1 to 256");
  }
  const std::int64_t rows = p.window.rows(), panels = (p.out_channels + 15) / 16;
  if (rows == 0 || panels == 0) return Status::ok();
  const std::int64_t bytes = qconvblock_scratch_bytes(p);
  return run_pixels(pool, rows, panels, scratch, bytes,
                    [&](std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin, std::int64_t panel_end,
                        std::uint8_t* own) { kernel.run(s, row_begin, row_end, panel_begin, panel_end, own); });
}

}  // namespace sqc
