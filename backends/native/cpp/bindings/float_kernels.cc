#include "bindings/float_kernels.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <limits>

#include "base/thread_pool.h"
#include "bindings/common.h"
#include "kernels/activation/activation.h"
#include "kernels/attention/attention.h"
#include "kernels/fgemm/fgemm.h"
#include "kernels/kvcache/kvcache.h"
#include "kernels/norm/norm.h"
#include "kernels/rope/rope.h"
#include "kernels/softmax/softmax.h"

namespace sqc_python {
namespace {

using sqc::ThreadPool;

std::string norm(ThreadPool& pool, const std::optional<std::string>& isa, const std::string& kind, Matrix<const float> x,
                 std::optional<Vector<const float>> weight, std::optional<Vector<const float>> bias, float epsilon,
                 Matrix<float> y, int repeat) {
  const auto m = static_cast<std::int64_t>(x.shape(0)), k = static_cast<std::int64_t>(x.shape(1));
  require(kind == "rms" || kind == "layer", "kind is rms or layer");
  require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y have different shapes");
  require((!weight || size_of(*weight) == k) && (!bias || size_of(*bias) == k), "weight or bias has a wrong length");
  const sqc::NormParams params = {kind == "rms" ? sqc::NormKind::rms : sqc::NormKind::layer,
                                  m,
                                  k,
                                  x.data(),
                                  k,
                                  nullptr,
                                  0,
                                  nullptr,
                                  0,
                                  data_or_null(weight),
                                  data_or_null(bias),
                                  epsilon,
                                  y.data(),
                                  k,
                                  nullptr};
  const auto& kernel = sqc::norm_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::norm(pool, kernel, params, nullptr));
  return kernel.name;
}

sqc::FgemmType fgemm_type(bool bf16) { return bf16 ? sqc::FgemmType::bf16 : sqc::FgemmType::f32; }

std::int64_t fgemm_packed_bytes(std::int64_t n, std::int64_t k, bool bf16) {
  return sqc::fgemm_packed_bytes(n, k, fgemm_type(bf16));
}

std::int64_t fgemm_scratch_bytes(std::int64_t m, bool bf16) { return sqc::fgemm_scratch_bytes(m, fgemm_type(bf16)); }

void fgemm_pack(Matrix<const float> b, bool bf16, Vector<std::uint8_t> packed) {
  const auto n = static_cast<std::int64_t>(b.shape(0)), k = static_cast<std::int64_t>(b.shape(1));
  require(size_of(packed) >= fgemm_packed_bytes(n, k, bf16), "packed is too short");
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::fgemm_pack(n, k, b.data(), k, 1, fgemm_type(bf16), packed.data()));
}

std::string fgemm(ThreadPool& pool, const std::optional<std::string>& isa, Matrix<const float> a,
                  Vector<const std::uint8_t> b, bool bf16, std::optional<Vector<const float>> bias, Matrix<float> c,
                  Vector<std::uint8_t> scratch, int repeat) {
  const auto m = static_cast<std::int64_t>(a.shape(0)), k = static_cast<std::int64_t>(a.shape(1));
  const auto n = static_cast<std::int64_t>(c.shape(1));
  require(static_cast<std::int64_t>(c.shape(0)) == m, "a and c have different numbers of rows");
  require(size_of(b) >= fgemm_packed_bytes(n, k, bf16), "b is too short");
  require(!bias || size_of(*bias) >= (n + 15) / 16 * 16, "bias is too short");
  require(size_of(scratch) >= pool.threads() * fgemm_scratch_bytes(m, bf16), "scratch is too short");
  const float infinity = std::numeric_limits<float>::infinity();
  const sqc::FgemmParams params = {m, n, k, a.data(), k, fgemm_type(bf16), b.data(), data_or_null(bias), c.data(), n,
                                   -infinity, infinity};
  const auto& kernel = sqc::fgemm_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::fgemm(pool, kernel, params, scratch.data()));
  return kernel.name;
}

// A cache over arrays of bytes; `scale` is [2][batch][heads][capacity], keys first, and empty for floats.
sqc::KvCache kv_cache(std::int64_t batch, std::int64_t heads, std::int64_t capacity, std::int64_t head_dim,
                      const Vector<std::uint8_t>& k, const Vector<std::uint8_t>& v, const Vector<float>& scale) {
  sqc::KvCache cache = {size_of(scale) > 0 ? sqc::KvType::s8 : sqc::KvType::f32,
                        batch, heads, capacity, head_dim, k.data(), v.data(), nullptr, nullptr};
  const sqc::KvBytes bytes = sqc::kv_bytes(cache);
  require(size_of(k) >= bytes.k && size_of(v) >= bytes.v && size_of(scale) * 4 >= 2 * bytes.scale,
          "the cache's arrays are too short");
  if (cache.type == sqc::KvType::s8) cache.k_scale = scale.data(), cache.v_scale = scale.data() + bytes.scale / 4;
  return cache;
}

nb::tuple kv_bytes(std::int64_t batch, std::int64_t heads, std::int64_t capacity, std::int64_t head_dim, bool quantized) {
  const sqc::KvType type = quantized ? sqc::KvType::s8 : sqc::KvType::f32;
  const sqc::KvBytes bytes = sqc::kv_bytes({type, batch, heads, capacity, head_dim, nullptr, nullptr, nullptr, nullptr});
  return nb::make_tuple(bytes.k, bytes.v, bytes.scale);
}

// k and v are [batch, heads, tokens, head_dim].
std::string kvcache(ThreadPool& pool, const std::optional<std::string>& isa, Array<const float, 4> k,
                    Array<const float, 4> v, std::int64_t position, std::int64_t capacity, Vector<std::uint8_t> cache_k,
                    Vector<std::uint8_t> cache_v, Vector<float> scale) {
  const auto size = [&](int i) { return static_cast<std::int64_t>(k.shape(static_cast<std::size_t>(i))); };
  for (std::size_t i = 0; i < 4; ++i) require(k.shape(i) == v.shape(i), "k and v have different shapes");
  const std::int64_t token = size(3), head = token * size(2), batch = head * size(1);
  const sqc::KvcacheParams params = {kv_cache(size(0), size(1), capacity, size(3), cache_k, cache_v, scale),
                                     size(2), &position, 0, k.data(), batch, head, token, v.data(), batch, head, token};
  const auto& kernel = sqc::kvcache_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  raise_unless_ok(sqc::kvcache(pool, kernel, params));
  return kernel.name;
}

// q and out are [batch, heads, queries, head_dim]; a mask is [batch, queries, length], of bytes or floats.
std::string attention(ThreadPool& pool, const std::optional<std::string>& isa, Array<const float, 4> q,
                      std::int64_t kv_heads, std::int64_t length, std::int64_t position, bool causal, float scale,
                      std::optional<Array<const std::uint8_t, 3>> allowed, std::optional<Array<const float, 3>> added,
                      std::int64_t capacity, Vector<std::uint8_t> cache_k, Vector<std::uint8_t> cache_v,
                      Vector<float> cache_scale, Array<float, 4> out, Vector<float> scratch, int repeat) {
  const auto size = [&](int i) { return static_cast<std::int64_t>(q.shape(static_cast<std::size_t>(i))); };
  for (std::size_t i = 0; i < 4; ++i) require(q.shape(i) == out.shape(i), "q and out have different shapes");
  require(size_of(scratch) >= pool.threads() * sqc::attention_scratch_count(size(3)), "scratch is too short");
  require(!(allowed && added), "there is one mask");
  const auto mask_fits = [&](const auto& mask) {
    return !mask || (static_cast<std::int64_t>(mask->shape(0)) == size(0) &&
                     static_cast<std::int64_t>(mask->shape(1)) == size(2) &&
                     static_cast<std::int64_t>(mask->shape(2)) == length);
  };
  require(mask_fits(allowed) && mask_fits(added), "the mask is not [batch, queries, length]");
  sqc::AttentionParams params = {};
  params.cache = kv_cache(size(0), kv_heads, capacity, size(3), cache_k, cache_v, cache_scale);
  params.heads = size(1);
  params.queries = size(2);
  params.q = q.data();
  params.out = out.data();
  params.q_token_stride = params.out_token_stride = size(3);
  params.q_head_stride = params.out_head_stride = size(3) * size(2);
  params.q_batch_stride = params.out_batch_stride = size(3) * size(2) * size(1);
  params.length = &length;
  params.position = &position;
  params.causal = causal;
  params.scale = scale;
  params.mask_kind = allowed ? sqc::AttentionMask::boolean : added ? sqc::AttentionMask::additive : sqc::AttentionMask::none;
  if (allowed) params.mask = allowed->data();
  if (added) params.mask = added->data();
  params.mask_batch_stride = size(2) * length;
  params.mask_query_stride = length;
  const auto& kernel = sqc::attention_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::attention(pool, kernel, params, scratch.data()));
  return kernel.name;
}

std::string activation(ThreadPool& pool, const std::optional<std::string>& isa, int function, Matrix<const float> x,
                       std::optional<Matrix<const float>> factor, Matrix<float> y, int repeat) {
  const auto m = static_cast<std::int64_t>(x.shape(0)), k = static_cast<std::int64_t>(x.shape(1));
  require(function >= 0 && function <= static_cast<int>(sqc::Activation::exp), "there is no such function");
  require(y.shape(0) == x.shape(0) && y.shape(1) == x.shape(1), "x and y have different shapes");
  require(!factor || (factor->shape(0) == x.shape(0) && factor->shape(1) == x.shape(1)),
          "x and factor have different shapes");
  const sqc::ActivationParams params = {static_cast<sqc::Activation>(function), m, k, x.data(), k, data_or_null(factor),
                                        k, y.data(), k, nullptr};
  const auto& kernel = sqc::activation_kernel(isa_called(isa));
  const nb::gil_scoped_release release;
  for (int i = 0; i < repeat; ++i) raise_unless_ok(sqc::activation(pool, kernel, params, nullptr));
  return kernel.name;
}

}  // namespace

void list_float_kernels(nb::dict& families) {
  families["norm"] = kernel_list(sqc::norm_kernels());
  families["kvcache"] = kernel_list(sqc::kvcache_kernels());
  families["attention"] = kernel_list(sqc::attention_kernels());
  families["fgemm"] = kernel_list(sqc::fgemm_kernels());
  families["activation"] = kernel_list(sqc::activation_kernels());
  families["softmax"] = kernel_list(sqc::softmax_kernels());
  families["rope"] = kernel_list(sqc::rope_kernels());
}

void bind_float_kernels(nb::module_& m) {
  m.def("norm", &norm, nb::arg("pool"), nb::arg("isa").none(), nb::arg("kind"), nb::arg("x"), nb::arg("weight").none(),
        nb::arg("bias").none(), nb::arg("epsilon"), nb::arg("y"), nb::arg("repeat") = 1);
  m.def("fgemm_packed_bytes", &fgemm_packed_bytes, nb::arg("n"), nb::arg("k"), nb::arg("bf16"));
  m.def("fgemm_scratch_bytes", &fgemm_scratch_bytes, nb::arg("m"), nb::arg("bf16"));
  m.def("fgemm_pack", &fgemm_pack, nb::arg("b"), nb::arg("bf16"), nb::arg("packed"));
  m.def("fgemm", &fgemm, nb::arg("pool"), nb::arg("isa").none(), nb::arg("a"), nb::arg("b"), nb::arg("bf16"),
        nb::arg("bias").none(), nb::arg("c"), nb::arg("scratch"), nb::arg("repeat") = 1);
  m.def("kv_bytes", &kv_bytes, nb::arg("batch"), nb::arg("heads"), nb::arg("capacity"), nb::arg("head_dim"),
        nb::arg("quantized"), "Bytes of the keys, of the values, and of the scales of either.");
  m.def("kvcache", &kvcache, nb::arg("pool"), nb::arg("isa").none(), nb::arg("k"), nb::arg("v"), nb::arg("position"),
        nb::arg("capacity"), nb::arg("cache_k"), nb::arg("cache_v"), nb::arg("scale"));
  m.def("attention_scratch_count", &sqc::attention_scratch_count, nb::arg("head_dim"));
  m.def("attention", &attention, nb::arg("pool"), nb::arg("isa").none(), nb::arg("q"), nb::arg("kv_heads"),
        nb::arg("length"), nb::arg("position"), nb::arg("causal"), nb::arg("scale"), nb::arg("allowed").none(),
        nb::arg("added").none(), nb::arg("capacity"), nb::arg("cache_k"), nb::arg("cache_v"), nb::arg("cache_scale"),
        nb::arg("out"), nb::arg("scratch"), nb::arg("repeat") = 1);
  m.def("activation", &activation, nb::arg("pool"), nb::arg("isa").none(), nb::arg("function"), nb::arg("x"),
        nb::arg("factor").none(), nb::arg("y"), nb::arg("repeat") = 1);
}

}  // namespace sqc_python
