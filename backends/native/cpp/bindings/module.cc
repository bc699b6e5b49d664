// Python's view of the native library. Translation only: no decision is made in this file.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/cpu.h"
#include "base/isa.h"
#include "base/thread_pool.h"
#include "bindings/common.h"
#include "bindings/engine.h"
#include "bindings/float_kernels.h"
#include "kernels/fconv/fconv.h"
#include "kernels/machine/machine.h"
#include "kernels/q4gemm/q4gemm.h"
#include "kernels/q4sparse/q4sparse.h"
#include "kernels/qbinary/qbinary.h"
#include "kernels/qblock/qblock.h"
#include "kernels/qconvblock/qconvblock.h"
#include "kernels/qconvsparse/qconvsparse.h"
#include "kernels/qdepthwise/qdepthwise.h"
#include "kernels/qgemm/qgemm.h"
#include "kernels/qimage/qimage.h"
#include "kernels/qsparse/qsparse.h"
#include "kernels/quantize/quantize.h"

static_assert(sqc::kQsparseValueSlack == sqc::kQ4sparseValueSlack, "VALUE_SLACK stands for both");

namespace {

using namespace sqc_python;
using sqc::ThreadPool;

nb::dict cpu_info() {
  const sqc::CpuInfo& info = sqc::cpu_info();

  nb::dict flags;
#define SQC_SET_FLAG(name) flags[#name] = info.flags.name;
  SQC_CPU_FLAGS(SQC_SET_FLAG)
#undef SQC_SET_FLAG

  nb::dict result;
  result["architecture"] = info.architecture;
  result["vendor"] = info.vendor;
  result["brand"] = info.brand;
  result["family"] = info.family;
  result["model"] = info.model;
  result["logical_cores"] = info.logical_cores;
  result["physical_cores"] = info.physical_cores;
  result["l1_bytes"] = info.l1_bytes;
  result["l2_bytes"] = info.l2_bytes;
  result["l3_bytes"] = info.l3_bytes;
  result["flags"] = flags;
  return result;
}

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (const Isa isa : sqc::isa_levels()) names.push_back(sqc::isa_name(isa));
  return names;
}

bool isa_available(const std::string& name) {
  Isa isa = Isa::scalar;
  const Status status = sqc::find_isa(name.c_str(), &isa);
  if (status.code() == StatusCode::kInvalidArgument) raise_unless_ok(status);
  return status.is_ok();
}

nb::dict kernels() {
  nb::dict result;
  result["machine"] = kernel_list(sqc::machine_kernels());
  result["quantize"] = kernel_list(sqc::quantize_kernels());
  result["qgemm"] = kernel_list(sqc::qgemm_kernels());
  result["q4gemm"] = kernel_list(sqc::q4gemm_kernels());
  result["qsparse"] = kernel_list(sqc::qsparse_kernels());
  result["q4sparse"] = kernel_list(sqc::q4sparse_kernels());
  result["qblock"] = kernel_list(sqc::qblock_kernels());
  result["qconv"] = kernel_list(sqc::qconv_kernels());
  result["qconvblock"] = kernel_list(sqc::qconvblock_kernels());
  result["qconvsparse"] = kernel_list(sqc::qconvsparse_kernels());
  result["qdepthwise"] = kernel_list(sqc::qdepthwise_kernels());
  result["fconv"] = kernel_list(sqc::fconv_kernels());
  result["qbinary"] = kernel_list(sqc::qbinary_kernels());
  result["qimage"] = kernel_list(sqc::qimage_kernels());
  list_float_kernels(result);
  return result;
}

std::unique_ptr<ThreadPool> make_pool(int threads) {
  std::unique_ptr<ThreadPool> pool;
  raise_unless_ok(ThreadPool::create(threads, &pool));
  return pool;
}

nb::ndarray<nb::numpy, std::uint8_t, nb::ndim<1>> allocate(std::size_t size_bytes) {
  auto buffer = std::make_unique<sqc::AlignedBuffer>();
  raise_unless_ok(buffer->allocate(size_bytes));
  std::uint8_t* data = buffer->data();
  const nb::capsule owner(buffer.get(), [](void* p) noexcept { delete static_cast<sqc::AlignedBuffer*>(p); });
  (void)buffer.release();
  return {data, {size_bytes}, owner};
}

std::string quantize(ThreadPool& pool, const std::optional<std::string>& isa, const std::string& mode, bool is_signed,
                     Matrix<const float> x, Matrix<std::uint8_t> codes, std::int64_t k_padded, std::int64_t scale_group,
                     std::int64_t sum_group, Vector<float> scale, std::optional<Vector<std::int32_t>> zero_point,
                     std::optional<Vector<std::int32_t>> sum) {
  const auto m = static_cast<std::int64_t>(x.shape(0)), k = static_cast<std::int64_t>(x.shape(1));
  const std::int64_t groups = sum_group > 0 ? (k + sum_group - 1) / sum_group : 1;
  sqc::QuantizeMode quantize_mode = sqc::QuantizeMode::static_scale;
  if (mode == "symmetric") quantize_mode = sqc::QuantizeMode::symmetric;
  if (mode == "affine") quantize_mode = sqc::QuantizeMode::affine;
  const bool is_static = quantize_mode == sqc::QuantizeMode::static_scale;
  require(!is_static || mode == "static", "mode is symmetric, affine or static");
  require(static_cast<std::int64_t>(codes.shape(0)) == m, "codes has another number of rows than x");
  require(size_of(scale) >= (is_static ? 1 : scale_group != 0 ? m * groups : m), "scale is too short");
  require(quantize_mode == sqc::QuantizeMode::symmetric ||
              (zero_point && size_of(*zero_point) >= (is_static ? 1 : m)),
          "zero_point is missing or too short");
  require(!sum || size_of(*sum) >= m * groups, "sum is too short");
  const sqc::QuantizeParams params = {quantize_mode,
                                      is_signed,
                                      m,
                                      k,
                                      x.data(),
                                      k,
                                      codes.data(),
                                      static_cast<std::int64_t>(codes.shape(1)),
                                      k_padded,
                                      scale_group,
                                      sum_group,
                                      scale.data(),
                                      data_or_null(zero_point),
                                      data_or_null(sum)};
  const auto& kernel = sqc::quantize_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::quantize(pool, kernel, params));
  return kernel.name;
}

void qgemm_pack(Matrix<const std::int8_t> b, Vector<std::int8_t> packed, Vector<std::int32_t> sum) {
  const auto n = static_cast<std::int64_t>(b.shape(0)), k = static_cast<std::int64_t>(b.shape(1));
  require(size_of(packed) >= sqc::qgemm_packed_bytes(n, k), "packed is too short");
  require(size_of(sum) >= (n + 15) / 16 * 16, "sum is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::qgemm_pack(n, k, b.data(), packed.data(), sum.data()));
}

// `repeat` runs a product several times: one call from Python takes longer than a small product.

// What the products over 8-bit weights share; b is left null.
sqc::QgemmParams qgemm_params(std::int64_t k, Matrix<const std::uint8_t> a, Vector<const float> a_scale,
                              Vector<const std::int32_t> a_zero, Vector<const std::int32_t> b_sum,
                              Vector<const float> b_scale, const std::optional<Vector<const float>>& bias, float low,
                              float high, Matrix<float> c) {
  const auto m = static_cast<std::int64_t>(c.shape(0)), n = static_cast<std::int64_t>(c.shape(1));
  const std::int64_t padded = (n + 15) / 16 * 16;
  require(static_cast<std::int64_t>(a.shape(0)) == m, "a and c have different numbers of rows");
  require(size_of(a_scale) == m || size_of(a_scale) == 1, "a_scale has neither one entry nor one a row");
  require(size_of(a_zero) == m || size_of(a_zero) == 1, "a_zero has neither one entry nor one a row");
  require(size_of(b_sum) >= padded && size_of(b_scale) >= padded, "b_sum or b_scale is too short");
  require(!bias || size_of(*bias) >= padded, "bias is too short");
  return {m,
          n,
          k,
          a.data(),
          static_cast<std::int64_t>(a.shape(1)),
          a_scale.data(),
          size_of(a_scale) == m ? 1 : 0,
          a_zero.data(),
          size_of(a_zero) == m ? 1 : 0,
          nullptr,
          b_sum.data(),
          b_scale.data(),
          data_or_null(bias),
          c.data(),
          n,
          low,
          high};
}

std::string qgemm(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t k, Matrix<const std::uint8_t> a,
                  Vector<const float> a_scale, Vector<const std::int32_t> a_zero, Vector<const std::int8_t> b,
                  Vector<const std::int32_t> b_sum, Vector<const float> b_scale, std::optional<Vector<const float>> bias,
                  float low, float high, Matrix<float> c, int repeat) {
  sqc::QgemmParams params = qgemm_params(k, a, a_scale, a_zero, b_sum, b_scale, bias, low, high, c);
  require(size_of(b) >= sqc::qgemm_packed_bytes(params.n, k), "b is too short");
  params.b = b.data();
  const auto& kernel = sqc::qgemm_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::qgemm(pool, kernel, params));
  return kernel.name;
}

void qsparse_pack(Matrix<const std::int8_t> b, Vector<std::uint64_t> masks, Vector<std::uint8_t> values,
                  Vector<std::uint64_t> value_start, Vector<std::int32_t> sum) {
  const auto n = static_cast<std::int64_t>(b.shape(0)), k = static_cast<std::int64_t>(b.shape(1));
  std::int64_t nonzero = 0;
  for (std::int64_t i = 0; i < n * k; ++i) nonzero += b.data()[i] != 0;
  require(size_of(masks) >= sqc::qsparse_mask_count(n, k), "masks is too short");
  require(size_of(values) >= nonzero + sqc::kQsparseValueSlack, "values is too short");
  require(size_of(value_start) >= (n + 15) / 16 + 1 && size_of(sum) >= (n + 15) / 16 * 16, "a result is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::qsparse_pack(n, k, b.data(), masks.data(), values.data(), value_start.data(), sum.data()));
}

std::string qsparse(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t k,
                    Matrix<const std::uint8_t> a, Vector<const float> a_scale, Vector<const std::int32_t> a_zero,
                    Vector<const std::uint64_t> masks, Vector<const std::uint8_t> values,
                    Vector<const std::uint64_t> value_start, Vector<const std::int32_t> b_sum,
                    Vector<const float> b_scale, std::optional<Vector<const float>> bias, float low, float high,
                    Matrix<float> c, Vector<std::uint8_t> scratch, int repeat) {
  const sqc::QsparseParams params = {qgemm_params(k, a, a_scale, a_zero, b_sum, b_scale, bias, low, high, c),
                                     masks.data(), values.data(), value_start.data()};
  const std::int64_t panels = (params.dense.n + 15) / 16;
  require(size_of(masks) >= sqc::qsparse_mask_count(params.dense.n, k), "masks is too short");
  require(size_of(value_start) >= panels + 1, "value_start is too short");
  require(static_cast<std::uint64_t>(size_of(values)) >= value_start.data()[panels] + sqc::kQsparseValueSlack,
          "values is too short");
  require(size_of(scratch) >= pool.threads() * sqc::qsparse_scratch_bytes(params.dense.m, k), "scratch is too short");
  const auto& kernel = sqc::qsparse_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::qsparse(pool, kernel, params, scratch.data()));
  return kernel.name;
}

void q4gemm_pack(Matrix<const std::uint8_t> codes, std::int64_t group, Vector<std::uint8_t> packed, int bits) {
  const auto n = static_cast<std::int64_t>(codes.shape(0)), k = static_cast<std::int64_t>(codes.shape(1));
  require(group > 0 && size_of(packed) >= sqc::q4gemm_packed_bytes(n, k, group, bits), "packed is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::q4gemm_pack(n, k, group, codes.data(), packed.data(), bits));
}

// What the products over 4-bit weights share; b and b_zero are left null. b_scale holds halves as uint16, or
// floats as pairs of them: its length says which.
sqc::Q4gemmParams q4gemm_params(const ThreadPool& pool, std::int64_t k, std::int64_t group, Matrix<const std::int8_t> a,
                                Matrix<const std::int32_t> a_sum, Vector<const float> a_scale,
                                Vector<const std::int8_t> table, Vector<const std::uint16_t> b_scale,
                                const std::optional<Vector<const float>>& bias, float low, float high, Matrix<float> c,
                                Vector<std::uint8_t> scratch) {
  const auto m = static_cast<std::int64_t>(c.shape(0)), n = static_cast<std::int64_t>(c.shape(1));
  require(k >= 0 && group > 0, "k is negative or group is not positive");
  const std::int64_t groups = (k + group - 1) / group, entries = (n + 15) / 16 * 16 * groups;
  require(static_cast<std::int64_t>(a.shape(0)) == m, "a and c have different numbers of rows");
  require(size_of(a_sum) >= m * groups, "a_sum is too short");
  require(size_of(a_scale) == m || size_of(a_scale) == m * groups, "a_scale has neither one entry a row nor a group");
  require(size_of(table) == 16, "table has not 16 entries");
  require(size_of(b_scale) == entries || size_of(b_scale) == 2 * entries, "b_scale has a wrong length");
  require(!bias || size_of(*bias) >= (n + 15) / 16 * 16, "bias is too short");
  require(size_of(scratch) >= pool.threads() * sqc::q4gemm_scratch_bytes(m, k, group), "scratch is too short");
  sqc::Q4gemmParams params = {m,
                              n,
                              k,
                              group,
                              a.data(),
                              static_cast<std::int64_t>(a.shape(1)),
                              a_sum.data(),
                              a_scale.data(),
                              size_of(a_scale) != m,
                              nullptr,
                              {},
                              b_scale.data(),
                              size_of(b_scale) == entries,
                              nullptr,
                              data_or_null(bias),
                              c.data(),
                              n,
                              low,
                              high};
  for (int i = 0; i < 16; ++i) params.table[i] = table.data()[i];
  return params;
}

std::string q4gemm(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t k, std::int64_t group,
                   Matrix<const std::int8_t> a, Matrix<const std::int32_t> a_sum, Vector<const float> a_scale,
                   Vector<const std::uint8_t> b, Vector<const std::int8_t> table, Vector<const std::uint16_t> b_scale,
                   std::optional<Vector<const std::int8_t>> b_zero, std::optional<Vector<const float>> bias, float low,
                   float high, Matrix<float> c, Vector<std::uint8_t> scratch, int repeat, int bits) {
  sqc::Q4gemmParams params =
      q4gemm_params(pool, k, group, a, a_sum, a_scale, table, b_scale, bias, low, high, c, scratch);
  const std::int64_t entries = (params.n + 15) / 16 * 16 * ((k + group - 1) / group);
  require((bits >= 2 && bits <= 4) || bits == 8, "codes have 2, 3, 4 or 8 bits");
  require(size_of(b) >= sqc::q4gemm_packed_bytes(params.n, k, group, bits), "b is too short");
  require(!b_zero || size_of(*b_zero) >= entries, "b_zero is too short");
  params.b = b.data();
  params.b_zero = data_or_null(b_zero);
  params.bits = bits;
  const auto& kernel = sqc::q4gemm_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::q4gemm(pool, kernel, params, scratch.data()));
  return kernel.name;
}

std::int64_t q4sparse_value_bytes(Matrix<const std::uint8_t> keep, std::int64_t group) {
  const auto n = static_cast<std::int64_t>(keep.shape(0)), k = static_cast<std::int64_t>(keep.shape(1));
  require(group > 0, "group is not positive");
  return sqc::q4sparse_value_bytes(n, k, group, keep.data());
}

void q4sparse_pack(Matrix<const std::uint8_t> codes, Matrix<const std::uint8_t> keep, std::int64_t group,
                   Vector<std::uint64_t> masks, Vector<std::uint8_t> values, Vector<std::uint64_t> value_start) {
  const auto n = static_cast<std::int64_t>(codes.shape(0)), k = static_cast<std::int64_t>(codes.shape(1));
  require(keep.shape(0) == codes.shape(0) && keep.shape(1) == codes.shape(1), "codes and keep have different shapes");
  require(size_of(values) >= q4sparse_value_bytes(keep, group) + sqc::kQ4sparseValueSlack, "values is too short");
  require(size_of(masks) >= sqc::q4sparse_mask_count(n, k, group), "masks is too short");
  require(size_of(value_start) >= (n + 15) / 16 + 1, "value_start is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(
      sqc::q4sparse_pack(n, k, group, codes.data(), keep.data(), masks.data(), values.data(), value_start.data()));
}

std::string q4sparse(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t k, std::int64_t group,
                     Matrix<const std::int8_t> a, Matrix<const std::int32_t> a_sum, Vector<const float> a_scale,
                     Vector<const std::uint64_t> masks, Vector<const std::uint8_t> values,
                     Vector<const std::uint64_t> value_start, Vector<const std::int8_t> table,
                     Vector<const std::uint16_t> b_scale, std::optional<Vector<const float>> bias, float low,
                     float high, Matrix<float> c, Vector<std::uint8_t> scratch, int repeat) {
  const sqc::Q4sparseParams params = {
      q4gemm_params(pool, k, group, a, a_sum, a_scale, table, b_scale, bias, low, high, c, scratch), masks.data(),
      values.data(), value_start.data()};
  const std::int64_t panels = (params.dense.n + 15) / 16;
  require(size_of(masks) >= sqc::q4sparse_mask_count(params.dense.n, k, group), "masks is too short");
  require(size_of(value_start) >= panels + 1, "value_start is too short");
  require(static_cast<std::uint64_t>(size_of(values)) >= value_start.data()[panels] + sqc::kQ4sparseValueSlack,
          "values is too short");
  const auto& kernel = sqc::q4sparse_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::q4sparse(pool, kernel, params, scratch.data()));
  return kernel.name;
}

std::int64_t qblock_count(Matrix<const std::int8_t> b, std::int64_t block_outputs) {
  require(block_outputs == 1 || block_outputs == 4 || block_outputs == 16, "a block has 1, 4 or 16 outputs");
  return sqc::qblock_count(static_cast<std::int64_t>(b.shape(0)), static_cast<std::int64_t>(b.shape(1)), block_outputs,
                           b.data());
}

void qblock_pack(Matrix<const std::int8_t> b, std::int64_t block_outputs, std::int64_t chunk,
                 Vector<std::uint8_t> index, Vector<std::int8_t> values, Vector<std::uint64_t> start,
                 Vector<std::uint64_t> blocks_before, Vector<std::int32_t> sum) {
  const auto n = static_cast<std::int64_t>(b.shape(0)), k = static_cast<std::int64_t>(b.shape(1));
  const std::int64_t count = qblock_count(b, block_outputs);
  require(chunk > 0 && size_of(start) >= sqc::qblock_start_count(n, k, block_outputs, chunk), "start is too short");
  require(size_of(index) >= count && size_of(values) >= count * block_outputs * 4, "index or values is too short");
  require(size_of(blocks_before) >= (n + 15) / 16 + 1, "blocks_before is too short");
  require(size_of(sum) >= (n + 15) / 16 * 16, "sum is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::qblock_pack(n, k, block_outputs, chunk, b.data(), index.data(), values.data(), start.data(),
                                   blocks_before.data(), sum.data()));
}

std::string qblock(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t k, Matrix<const std::uint8_t> a,
                   Vector<const float> a_scale, Vector<const std::int32_t> a_zero, std::int64_t block_outputs,
                   std::int64_t chunk, Vector<const std::uint8_t> index, Vector<const std::int8_t> values,
                   Vector<const std::uint64_t> start, Vector<const std::uint64_t> blocks_before,
                   Vector<const std::int32_t> b_sum, Vector<const float> b_scale,
                   std::optional<Vector<const float>> bias, float low, float high, Matrix<float> c,
                   Vector<std::uint8_t> interleaved, Vector<std::int32_t> sums) {
  const sqc::QblockParams params = {qgemm_params(k, a, a_scale, a_zero, b_sum, b_scale, bias, low, high, c),
                                    block_outputs,
                                    chunk,
                                    index.data(),
                                    values.data(),
                                    start.data(),
                                    blocks_before.data(),
                                    interleaved.data()};
  const std::int64_t n = params.dense.n;
  require(block_outputs > 0 && chunk > 0, "block_outputs or chunk is not positive");
  const std::int64_t starts = sqc::qblock_start_count(n, k, block_outputs, chunk);
  require(size_of(start) >= starts, "start is too short");
  const auto count = static_cast<std::int64_t>(start.data()[starts - 1]);
  require(size_of(index) >= count && size_of(values) >= count * block_outputs * 4, "index or values is too short");
  require(size_of(blocks_before) >= (n + 15) / 16 + 1, "blocks_before is too short");
  require(size_of(interleaved) >= sqc::qblock_interleaved_bytes(params.dense.m, k), "interleaved is too short");
  require(size_of(sums) >= pool.threads() * sqc::kQblockSumCount, "sums is too short");
  const auto& kernel = sqc::qblock_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::qblock(pool, kernel, params, sums.data()));
  return kernel.name;
}

std::string read_memory(ThreadPool& pool, const std::optional<std::string>& isa, Vector<const std::uint8_t> data) {
  const auto& kernel = sqc::machine_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::machine(pool, kernel, {sqc::MachineWork::read, data.data()}, size_of(data) / 512));
  return kernel.name;
}

std::int64_t multiply_registers(ThreadPool& pool, const std::optional<std::string>& isa, std::int64_t steps) {
  const std::uint8_t start[64] = {1, 2, 3};
  const auto& kernel = sqc::machine_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::machine(pool, kernel, {sqc::MachineWork::multiply, start}, steps));
  return steps * sqc::kMachineStepMacs * 2 * pool.threads();
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "C++ part of sqcompile.backends.native";
  m.def("cpu_info", &cpu_info, "What the CPU under this process can do, as a dict.");

  m.def("isa_levels", &isa_levels, "Instruction sets of this architecture, weakest first.");
  m.def("isa_available", &isa_available, nb::arg("name"));
  m.def("default_isa", [] { return std::string(sqc::isa_name(isa_called(std::nullopt))); },
        "What SQCOMPILE_ISA asks for, else the best available.");
  m.def("kernels", &kernels, "Family -> [(name, instruction set, available)], best first.");

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::new_(&make_pool), nb::arg("threads"))
      .def_prop_ro("threads", &ThreadPool::threads);
  m.def("allocate", &allocate, nb::arg("size_bytes"), "Zeros, aligned to 64 bytes, on huge pages if large.");

  m.def("quantize", &quantize, nb::arg("pool"), nb::arg("isa").none(), nb::arg("mode"), nb::arg("is_signed"),
        nb::arg("x"), nb::arg("codes"), nb::arg("k_padded"), nb::arg("scale_group"), nb::arg("sum_group"),
        nb::arg("scale"), nb::arg("zero_point").none(), nb::arg("sum").none());
  m.def("qgemm_packed_bytes", &sqc::qgemm_packed_bytes, nb::arg("n"), nb::arg("k"));
  m.def("qgemm_pack", &qgemm_pack, nb::arg("b"), nb::arg("packed"), nb::arg("sum"));
  m.def("qgemm", &qgemm, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("a"), nb::arg("a_scale"),
        nb::arg("a_zero"), nb::arg("b"), nb::arg("b_sum"), nb::arg("b_scale"), nb::arg("bias").none(), nb::arg("low"),
        nb::arg("high"), nb::arg("c"), nb::arg("repeat") = 1);
  m.def("q4gemm_packed_bytes", &sqc::q4gemm_packed_bytes, nb::arg("n"), nb::arg("k"), nb::arg("group"),
        nb::arg("bits") = 4);
  m.def("q4gemm_scratch_bytes", &sqc::q4gemm_scratch_bytes, nb::arg("m"), nb::arg("k"), nb::arg("group"));
  m.def("q4gemm_pack", &q4gemm_pack, nb::arg("codes"), nb::arg("group"), nb::arg("packed"),
        nb::arg("bits") = 4);
  m.def("q4gemm", &q4gemm, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("group"), nb::arg("a"),
        nb::arg("a_sum"), nb::arg("a_scale"), nb::arg("b"), nb::arg("table"), nb::arg("b_scale"),
        nb::arg("b_zero").none(), nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("c"),
        nb::arg("scratch"), nb::arg("repeat") = 1, nb::arg("bits") = 4);
  m.def("qsparse_mask_count", &sqc::qsparse_mask_count, nb::arg("n"), nb::arg("k"));
  m.def("qsparse_scratch_bytes", &sqc::qsparse_scratch_bytes, nb::arg("m"), nb::arg("k"));
  m.def("qsparse_pack", &qsparse_pack, nb::arg("b"), nb::arg("masks"), nb::arg("values"), nb::arg("value_start"),
        nb::arg("sum"));
  m.def("qsparse", &qsparse, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("a"), nb::arg("a_scale"),
        nb::arg("a_zero"), nb::arg("masks"), nb::arg("values"), nb::arg("value_start"), nb::arg("b_sum"),
        nb::arg("b_scale"), nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("c"), nb::arg("scratch"), nb::arg("repeat") = 1);
  m.def("q4sparse_mask_count", &sqc::q4sparse_mask_count, nb::arg("n"), nb::arg("k"), nb::arg("group"));
  m.def("q4sparse_value_bytes", &q4sparse_value_bytes, nb::arg("keep"), nb::arg("group"));
  m.def("q4sparse_pack", &q4sparse_pack, nb::arg("codes"), nb::arg("keep"), nb::arg("group"), nb::arg("masks"),
        nb::arg("values"), nb::arg("value_start"));
  m.def("q4sparse", &q4sparse, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("group"), nb::arg("a"),
        nb::arg("a_sum"), nb::arg("a_scale"), nb::arg("masks"), nb::arg("values"), nb::arg("value_start"),
        nb::arg("table"), nb::arg("b_scale"), nb::arg("bias").none(), nb::arg("low"), nb::arg("high"), nb::arg("c"),
        nb::arg("scratch"), nb::arg("repeat") = 1);
  m.attr("VALUE_SLACK") = sqc::kQsparseValueSlack;
  m.def("qblock_start_count", &sqc::qblock_start_count, nb::arg("n"), nb::arg("k"), nb::arg("block_outputs"),
        nb::arg("chunk"));
  m.def("qblock_interleaved_bytes", &sqc::qblock_interleaved_bytes, nb::arg("m"), nb::arg("k"));
  m.attr("QBLOCK_SUM_COUNT") = sqc::kQblockSumCount;
  m.def("qblock_count", &qblock_count, nb::arg("b"), nb::arg("block_outputs"));
  m.def("qblock_pack", &qblock_pack, nb::arg("b"), nb::arg("block_outputs"), nb::arg("chunk"), nb::arg("index"),
        nb::arg("values"), nb::arg("start"), nb::arg("blocks_before"), nb::arg("sum"));
  m.def("qblock", &qblock, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("a"), nb::arg("a_scale"),
        nb::arg("a_zero"), nb::arg("block_outputs"), nb::arg("chunk"), nb::arg("index"), nb::arg("values"),
        nb::arg("start"), nb::arg("blocks_before"), nb::arg("b_sum"), nb::arg("b_scale"), nb::arg("bias").none(),
        nb::arg("low"), nb::arg("high"), nb::arg("c"), nb::arg("interleaved"), nb::arg("sums"));
  bind_float_kernels(m);
  m.def("read_memory", &read_memory, nb::arg("pool"), nb::arg("isa").none(), nb::arg("data"),
        "Reads whole units of 512 bytes once; the name of the kernel.");
  m.def("multiply_registers", &multiply_registers, nb::arg("pool"), nb::arg("isa").none(), nb::arg("steps"),
        "Runs dot products on registers on every thread; the operations done, two a multiply-add.");
  sqc_python::bind_engine(m);
}
