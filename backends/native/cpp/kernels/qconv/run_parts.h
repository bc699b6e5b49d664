// How the families of kernels/qconv/parts.h check their parameters and split over threads.

#ifndef SQC_KERNELS_QCONV_RUN_PARTS_H_
#define SQC_KERNELS_QCONV_RUN_PARTS_H_

#include "base/work_shares.h"
#include "kernels/qconv/parts.h"

namespace sqc {

// Calls run(params, row_begin, row_end, panel_begin, panel_end, scratch) until all output pixels of all panels are done.
template <class Params, class Function>
Status run_parts(const char* family, ThreadPool& pool, Function run, const Params& s, std::uint8_t* scratch) noexcept {
  const QconvParams& p = s.dense;
  SQC_RETURN_IF_ERROR(check_qconv(p));
  if (p.in_channels < 1) return Status::error(StatusCode::kInvalidArgument, "%s: there are no inputs", family);
  if (p.groups != 1) return Status::error(StatusCode::kInvalidArgument, "%s: there is one group", family);
  if (s.chunk < 1 || s.chunk > kQconvPartMaxChunk) {
    return Status::error(StatusCode::kInvalidArgument, "%s: chunk is not 1 to %d", family,
                         static_cast<int>(kQconvPartMaxChunk));
  }
  const std::int64_t rows = p.window.rows(), panels = (p.out_channels + 15) / 16;
  if (rows == 0 || panels == 0) return Status::ok();
  const int threads = pool.threads();
  if (threads == 1 || rows * panels <= 16) {
    run(s, 0, rows, 0, panels, scratch);
    return Status::ok();
  }
  const std::int64_t bytes = qconv_parts_scratch_bytes(p);
  // Pixels are brought in order by every thread that needs them: so pixels are split, if there are enough to fill
  // tiles, and outputs only once.
  if (rows < kQconvPartPixels * threads && panels >= 2 * threads) {
    return pool.run([&](int thread) {
      const Range range = split_evenly(panels, 1, threads, thread);
      if (range.begin < range.end) run(s, 0, rows, range.begin, range.end, scratch + thread * bytes);
    });
  }
  return run_shared(
      pool, rows, 16, kQconvPartPixels,
      [&](int thread, Range part) { run(s, part.begin, part.end, 0, panels, scratch + thread * bytes); },
      kQconvPartPixels);
}

}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_RUN_PARTS_H_
