#include "bindings/engine.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "bindings/common.h"
#include "engine/generator.h"
#include "engine/model.h"
#include "engine/operators.h"
#include "engine/session.h"

namespace sqc_python {
namespace {

using sqc::DType;
using sqc::Model;
using sqc::Session;

using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

// Types that cross between Python and a model.
#define SQC_BOUND_DTYPES(X) \
  X(f32, float) X(i64, std::int64_t) X(i32, std::int32_t) X(i8, std::int8_t) X(u8, std::uint8_t) X(boolean, bool)

DType dtype_of(const AnyArray& array) {
#define SQC_FROM_PYTHON(name, type) \
  if (array.dtype() == nb::dtype<type>()) return DType::name;
  SQC_BOUND_DTYPES(SQC_FROM_PYTHON)
#undef SQC_FROM_PYTHON
  throw nb::value_error("an input has a type that no model takes");
}

nb::dlpack::dtype to_python(DType dtype) {
  switch (dtype) {
#define SQC_TO_PYTHON(name, type) \
  case DType::name: return nb::dtype<type>();
    SQC_BOUND_DTYPES(SQC_TO_PYTHON)
#undef SQC_TO_PYTHON
    default: return nb::dtype<std::uint8_t>();
  }
}

// A session that may be called from several threads: they take turns.
class SharedSession {
 public:
  explicit SharedSession(std::unique_ptr<Session> session) : session_(std::move(session)) {}

  std::vector<nb::ndarray<nb::numpy>> run(const std::vector<AnyArray>& inputs) {
    const std::vector<sqc::InputView> views = views_of(inputs);
    std::vector<std::unique_ptr<std::uint8_t[]>> copies;
    std::vector<sqc::Tensor> outputs;
    {
      const nb::gil_scoped_release release;
      const std::lock_guard<std::mutex> turn(mutex_);
      raise_unless_ok(session_->run({views.data(), views.size()}));
      for (std::size_t i = 0; i < session_->plan().outputs.size(); ++i) {
        const sqc::Tensor& output = session_->output(i);
        const auto bytes = static_cast<std::size_t>(output.bytes());
        copies.emplace_back(new std::uint8_t[bytes > 0 ? bytes : 1]);
        if (bytes > 0) std::memcpy(copies.back().get(), output.data, bytes);
        outputs.push_back(output);
      }
    }
    std::vector<nb::ndarray<nb::numpy>> results;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      std::uint8_t* data = copies[i].release();
      const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<std::uint8_t*>(p); });
      std::vector<std::size_t> shape(outputs[i].shape, outputs[i].shape + outputs[i].rank);
      results.emplace_back(data, shape.size(), shape.data(), owner, nullptr, to_python(outputs[i].dtype));
    }
    return results;
  }

  // Nanoseconds of each step of one run.
  std::vector<std::int64_t> profile(const std::vector<AnyArray>& inputs) {
    const std::vector<sqc::InputView> views = views_of(inputs);
    std::vector<std::int64_t> times_ns;
    const nb::gil_scoped_release release;
    const std::lock_guard<std::mutex> turn(mutex_);
    raise_unless_ok(session_->profile({views.data(), views.size()}, &times_ns));
    return times_ns;
  }

  int threads() const { return session_->threads(); }
  const char* isa() const { return sqc::isa_name(session_->isa()); }
  std::size_t memory_bytes() const { return session_->memory_bytes(); }

 private:
  static std::vector<sqc::InputView> views_of(const std::vector<AnyArray>& inputs) {
    std::vector<sqc::InputView> views;
    for (const AnyArray& input : inputs) {
      views.push_back({dtype_of(input), static_cast<int>(input.ndim()), input.shape_ptr(), input.data()});
    }
    return views;
  }

  std::mutex mutex_;
  std::unique_ptr<Session> session_;
};

using Tokens = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A generator that may be called from several threads: they take turns.
class SharedGenerator {
 public:
  explicit SharedGenerator(std::unique_ptr<sqc::Generator> generator) : generator_(std::move(generator)) {}

  void feed(const std::vector<std::pair<std::int64_t, Tokens>>& texts) {
    const std::vector<sqc::RowTokens> rows = rows_of(texts);
    const nb::gil_scoped_release release;
    const std::lock_guard<std::recursive_mutex> turn(mutex_);
    raise_unless_ok(generator_->feed({rows.data(), rows.size()}));
  }

  // A copy of a row's logits.
  nb::ndarray<nb::numpy> logits(std::int64_t row) {
    const std::lock_guard<std::recursive_mutex> turn(mutex_);
    if (row < 0 || row >= generator_->rows()) throw nb::index_error("there is no such row");
    if (!generator_->has_logits(row)) throw nb::value_error("the row has no logits: it is empty, or was taken back");
    const auto count = static_cast<std::size_t>(generator_->outputs());
    auto* copy = new float[count];
    std::memcpy(copy, generator_->logits(row), count * sizeof(float));
    const nb::capsule owner(copy, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    return nb::ndarray<nb::numpy>(copy, 1, &count, owner, nullptr, nb::dtype<float>());
  }

  std::int64_t length(std::int64_t row) {
    if (row < 0 || row >= generator_->rows()) throw nb::index_error("there is no such row");
    return generator_->length(row);
  }

  void rewind(std::int64_t row, std::int64_t length) {
    const std::lock_guard<std::recursive_mutex> turn(mutex_);
    raise_unless_ok(generator_->rewind(row, length));
  }

  void generate(const std::vector<std::pair<std::int64_t, Tokens>>& prompts, std::int64_t max_new_tokens,
                float temperature, std::int64_t top_k, float top_p, std::uint64_t seed,
                const std::vector<std::int64_t>& stop, const nb::callable& callback) {
    const std::vector<sqc::RowTokens> rows = rows_of(prompts);
    const sqc::GenerateOptions options = {max_new_tokens, {temperature, top_k, top_p, seed}, {stop.data(), stop.size()}};
    Caller caller = {callback, nullptr};
    {
      const nb::gil_scoped_release release;
      const std::lock_guard<std::recursive_mutex> turn(mutex_);
      raise_unless_ok(generator_->generate({rows.data(), rows.size()}, options, &Caller::call, &caller));
    }
    if (caller.error) std::rethrow_exception(caller.error);
  }

  void measure(bool on) {
    const std::lock_guard<std::recursive_mutex> turn(mutex_);
    generator_->measure(on);
  }
  std::vector<std::int64_t> times_ns() const { return generator_->times_ns(); }

  const sqc::Generator& generator() const { return *generator_; }

 private:
  // Calls Python for each token. What it raises ends the generation, and is raised again when the engine is left.
  struct Caller {
    const nb::callable& callback;
    std::exception_ptr error;

    static bool call(void* user, std::int64_t row, std::int64_t token) {
      auto* caller = static_cast<Caller*>(user);
      const nb::gil_scoped_acquire acquire;
      try {
        return nb::cast<bool>(caller->callback(row, token));
      } catch (...) {
        caller->error = std::current_exception();
        return false;
      }
    }
  };

  static std::vector<sqc::RowTokens> rows_of(const std::vector<std::pair<std::int64_t, Tokens>>& texts) {
    std::vector<sqc::RowTokens> rows;
    for (const auto& [row, tokens] : texts) rows.push_back({row, tokens.data(), static_cast<std::int64_t>(tokens.size())});
    return rows;
  }

  // A callback may ask for the logits.
  std::recursive_mutex mutex_;
  std::unique_ptr<sqc::Generator> generator_;
};

std::unique_ptr<SharedGenerator> make_generator(const std::shared_ptr<const Model>& model, int threads,
                                                const std::optional<std::string>& isa, std::int64_t rows,
                                                std::int64_t capacity, bool quantized) {
  std::unique_ptr<sqc::Generator> generator;
  raise_unless_ok(sqc::Generator::create(model, threads, isa_called(isa), rows, capacity,
                                         quantized ? sqc::KvType::s8 : sqc::KvType::f32, &generator));
  return std::make_unique<SharedGenerator>(std::move(generator));
}

std::shared_ptr<const Model> open_model(const char* path) {
  std::shared_ptr<const Model> model;
  const nb::gil_scoped_release release;
  raise_unless_ok(Model::open(path, &model));
  return model;
}

std::shared_ptr<const Model> model_from_bytes(const nb::bytes& bytes) {
  std::shared_ptr<const Model> model;
  raise_unless_ok(Model::from_bytes({static_cast<const std::uint8_t*>(bytes.data()), bytes.size()}, &model));
  return model;
}

std::unique_ptr<SharedSession> make_session(const std::shared_ptr<const Model>& model, int threads,
                                            const std::optional<std::string>& isa) {
  std::unique_ptr<Session> session;
  raise_unless_ok(Session::create(model, threads, isa_called(isa), &session));
  return std::make_unique<SharedSession>(std::move(session));
}

nb::str text(sqc::Span<const char> span) { return nb::str(span.data(), span.size()); }

nb::list operators() {
  nb::list list;
  for (const sqc::OperatorInfo& info : sqc::all_operators()) list.append(nb::make_tuple(info.name, info.id));
  return list;
}

// Names of the operators of a file, in order: what a report counts.
nb::list steps_of(const sqc::Plan& plan) {
  nb::list list;
  for (const sqc::format::Operator& step : plan.operators) {
    list.append(nb::make_tuple(sqc::find_operator(step.kind)->name, text(plan.name(step.name_offset, step.name_bytes))));
  }
  return list;
}

}  // namespace

void bind_engine(nb::module_& m) {
  m.def("operators", &operators, "(name, number) of each operator that a plan may hold.");
#define SQC_DTYPE_NUMBER(name, number, bytes) dtypes[#name] = number;
  nb::dict dtypes;
  SQC_DTYPES(SQC_DTYPE_NUMBER)
#undef SQC_DTYPE_NUMBER
  m.attr("DTYPES") = dtypes;
#define SQC_LAYOUT_NUMBER(name, number) layouts[#name] = number;
  nb::dict layouts;
  SQC_LAYOUTS(SQC_LAYOUT_NUMBER)
#undef SQC_LAYOUT_NUMBER
  m.attr("LAYOUTS") = layouts;
  m.attr("FORMAT_VERSION") = sqc::format::kVersion;
  m.attr("FORMAT_VERSION_WITH_GENERATION") = sqc::format::kVersionWithGeneration;

  nb::class_<Model>(m, "Model", "A checked .sqm file in memory.")
      .def_static("open", &open_model, nb::arg("path"))
      .def_static("from_bytes", &model_from_bytes, nb::arg("data"))
      .def_prop_ro("metadata", [](const Model& model) { return text(model.plan().metadata); })
      .def_prop_ro("steps", [](const Model& model) { return steps_of(model.plan()); },
                   "(operator, where it came from), in order.")
      .def_prop_ro("generation_steps",
                   [](const Model& model) { return model.generation() ? steps_of(*model.generation()) : nb::list(); },
                   "The same of the plan that continues texts; empty without one.")
      .def_prop_ro("generates", [](const Model& model) { return model.generation() != nullptr; })
      .def_prop_ro("limit", [](const Model& model) { return model.generation_settings().limit; },
                   "Tokens that a row may have when texts are continued.")
      .def_prop_ro("vocabulary", [](const Model& model) { return model.generation_settings().vocabulary; },
                   "Tokens that can be looked up; 0 where that is not known.");
  nb::class_<SharedSession>(m, "Session", "A model with threads and memory of its own.")
      .def(nb::new_(&make_session), nb::arg("model"), nb::arg("threads"), nb::arg("isa").none())
      .def("run", &SharedSession::run, nb::arg("inputs"), "Outputs for contiguous arrays, one for each input.")
      .def("profile", &SharedSession::profile, nb::arg("inputs"), "Nanoseconds of each step of one run.")
      .def_prop_ro("threads", &SharedSession::threads)
      .def_prop_ro("isa", &SharedSession::isa)
      .def_prop_ro("memory_bytes", &SharedSession::memory_bytes, "Bytes of memory for tensors by now.");
  nb::class_<SharedGenerator>(m, "Generator", "Texts that a model continues: rows of tokens, and what they left behind.")
      .def(nb::new_(&make_generator), nb::arg("model"), nb::arg("threads"), nb::arg("isa").none(), nb::arg("rows"),
           nb::arg("capacity"), nb::arg("quantized"))
      .def("feed", &SharedGenerator::feed, nb::arg("texts"), "Appends (row, tokens) to their rows.")
      .def("logits", &SharedGenerator::logits, nb::arg("row"), "Logits behind a row's last token.")
      .def("length", &SharedGenerator::length, nb::arg("row"))
      .def("rewind", &SharedGenerator::rewind, nb::arg("row"), nb::arg("length"))
      .def("generate", &SharedGenerator::generate, nb::arg("prompts"), nb::arg("max_new_tokens"), nb::arg("temperature"),
           nb::arg("top_k"), nb::arg("top_p"), nb::arg("seed"), nb::arg("stop"), nb::arg("callback"),
           "Feeds prompts (row, tokens) and continues them; calls back with (row, token) until that is False.")
      .def("measure", &SharedGenerator::measure, nb::arg("on"), "Begins to add up the time of each step, or ends it.")
      .def_prop_ro("times_ns", &SharedGenerator::times_ns, "Nanoseconds of each step since `measure(True)`.")
      .def_prop_ro("threads", [](const SharedGenerator& g) { return g.generator().threads(); })
      .def_prop_ro("isa", [](const SharedGenerator& g) { return sqc::isa_name(g.generator().isa()); })
      .def_prop_ro("rows", [](const SharedGenerator& g) { return g.generator().rows(); })
      .def_prop_ro("capacity", [](const SharedGenerator& g) { return g.generator().capacity(); })
      .def_prop_ro("cache_bytes", [](const SharedGenerator& g) { return g.generator().cache_bytes(); },
                   "Bytes of keys, values and other tensors of earlier positions.")
      .def_prop_ro("memory_bytes", [](const SharedGenerator& g) { return g.generator().memory_bytes(); },
                   "Bytes of memory for tensors by now.");
}

}  // namespace sqc_python
