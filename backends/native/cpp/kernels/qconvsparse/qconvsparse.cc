#include "kernels/qconvsparse/qconvsparse.h"

#include "kernels/qconv/pixel_shares.h"

namespace sqc {
namespace {

constexpr Kernel<QconvsparseFunction> kKernels[] = {
#define SQC_QCONVSPARSE_KERNEL(isa, name) {#name, Isa::isa, name},
#include "kernels/qconvsparse/kernels.inc"
#undef SQC_QCONVSPARSE_KERNEL
};

}  // namespace

static_assert(kQconvsparsePixels == kQconvRows, "pointers are looked up for a tile at once");

Span<const Kernel<QconvsparseFunction>> qconvsparse_kernels() noexcept { return kKernels; }

const Kernel<QconvsparseFunction>& qconvsparse_kernel(Isa isa) noexcept { return first_kernel(kKernels, isa); }

std::int64_t qconvsparse_scratch_bytes(const QconvParams& p) noexcept {
  const std::int64_t run = (p.in_channels + 3) / 4 * 4, taps = p.window.taps();
  return kQconvsparseStripPanels * 16 * kQconvsparsePixels * 4 + taps * run * kQconvsparsePixels + (run + 63) / 64 * 64 +
         taps * kQconvRows * static_cast<std::int64_t>(sizeof(void*));
}

Status qconvsparse(ThreadPool& pool, const Kernel<QconvsparseFunction>& kernel, const QconvsparseParams& s,
                   std::uint8_t* scratch) noexcept {
  const QconvParams& p = s.dense;
  SQC_RETURN_IF_ERROR(check_qconv(p));
  if (p.groups != 1) return Status::error(StatusCode::kInvalidArgument, "qconvsparse: there is one group");
  if (s.chunk < 1 || s.chunk > kQconvsparseMaxChunk) {
    return Status::error(StatusCode::kInvalidArgument, "qconvsparse: chunk is not 1 to 256");
  }
  const std::int64_t rows = p.window.rows(), panels = (p.out_channels + 15) / 16;
  if (rows == 0 || panels == 0) return Status::ok();
  const std::int64_t bytes = qconvsparse_scratch_bytes(p);
  return run_pixels(pool, rows, panels, scratch, bytes,
                    [&](std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin, std::int64_t panel_end,
                        std::uint8_t* own) { kernel.run(s, row_begin, row_end, panel_begin, panel_end, own); });
}

}  // namespace sqc
