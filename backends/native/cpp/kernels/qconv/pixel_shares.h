// How a convolution with pixels in the lanes of registers (kernels/qconv/pixels.h) is split over threads.

#ifndef SQC_KERNELS_QCONV_PIXEL_SHARES_H_
#define SQC_KERNELS_QCONV_PIXEL_SHARES_H_

#include "base/work_shares.h"
#include "kernels/qconv/qconv.h"

namespace sqc {

// Calls run(row_begin, row_end, panel_begin, panel_end, scratch) until all output pixels of all panels are done;
// `bytes` of scratch are each thread's own.
template <class F>
Status run_pixels(ThreadPool& pool, std::int64_t rows, std::int64_t panels, std::uint8_t* scratch, std::int64_t bytes,
                  F run) noexcept {
  const int threads = pool.threads();
  if (threads == 1 || rows * panels <= 16) {
    run(std::int64_t{0}, rows, std::int64_t{0}, panels, scratch);
    return Status::ok();
  }
  // Pixels are brought in order by every thread that needs them: so pixels are split, if there are enough to fill
  // tiles, and outputs only once.
  if (rows < kQconvRows * threads && panels >= 2 * threads) {
    return pool.run([&](int thread) {
      const Range range = split_evenly(panels, 1, threads, thread);
      if (range.begin < range.end) run(std::int64_t{0}, rows, range.begin, range.end, scratch + thread * bytes);
    });
  }
  return run_shared(
      pool, rows, 16, kQconvRows,
      [&](int thread, Range part) { run(part.begin, part.end, std::int64_t{0}, panels, scratch + thread * bytes); },
      kQconvRows);
}

}  // namespace sqc

#endif  // SQC_KERNELS_QCONV_PIXEL_SHARES_H_
