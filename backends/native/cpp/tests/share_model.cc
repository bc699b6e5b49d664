// Sessions and generators of one mapped model, each in a thread of its own, with threads of their own: for the
// thread sanitizer. All have to find what one alone finds, to the bit.
//
//   sqc_share MODEL.sqm ROUNDS      a language model: one input i64 [batch, sequence]
//
// Before that, one alone shows that sizes seen before take no memory: every allocation of C++ is counted.

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "engine/generator.h"
#include "engine/model.h"
#include "engine/session.h"

namespace {

std::atomic<std::int64_t> allocations{0};

}  // namespace

void* operator new(std::size_t bytes) {
  ++allocations;
  void* memory = std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  ++allocations;
  const auto unit = static_cast<std::size_t>(alignment);
  void* memory = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

constexpr int kUsers = 3;

// What one user of a model gets from it.
struct Found {
  sqc::Status status = sqc::Status::ok();
  std::vector<std::int64_t> tokens;
  std::vector<float> numbers;

  bool is(const Found& other) const {
    return status.is_ok() && other.status.is_ok() && tokens == other.tokens && numbers.size() == other.numbers.size() &&
           std::memcmp(numbers.data(), other.numbers.data(), numbers.size() * sizeof(float)) == 0;
  }
};

sqc::Status generate(const std::shared_ptr<const sqc::Model>& model, int threads, sqc::KvType type, Found* found) {
  std::unique_ptr<sqc::Generator> generator;
  SQC_RETURN_IF_ERROR(sqc::Generator::create(model, threads, sqc::best_isa(), 2, 16, type, &generator));
  const std::int64_t tokens[] = {3, 4, 5, 6, 1};
  const sqc::RowTokens texts[] = {{0, tokens, 5}, {1, tokens + 2, 2}};
  sqc::GenerateOptions options;
  options.max_new_tokens = 8;
  const auto keep = [](void* user, std::int64_t row, std::int64_t token) {
    static_cast<Found*>(user)->tokens.push_back(100 * row + token);
    return true;
  };
  SQC_RETURN_IF_ERROR(generator->generate({texts, 2}, options, keep, found));
  SQC_RETURN_IF_ERROR(generator->rewind(0, 5));
  SQC_RETURN_IF_ERROR(generator->feed({texts + 1, 1}));
  const float* logits = generator->logits(1);
  found->numbers.insert(found->numbers.end(), logits, logits + generator->outputs());
  return sqc::Status::ok();
}

sqc::Status run(const std::shared_ptr<const sqc::Model>& model, int threads, Found* found) {
  std::unique_ptr<sqc::Session> session;
  SQC_RETURN_IF_ERROR(sqc::Session::create(model, threads, sqc::best_isa(), &session));
  const std::int64_t tokens[] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (const std::int64_t batch : {2, 1, 4}) {
    const std::int64_t shape[] = {batch, 8 / batch};
    const sqc::InputView input = {sqc::DType::i64, 2, shape, tokens};
    SQC_RETURN_IF_ERROR(session->run({&input, 1}));
    const sqc::Tensor& output = session->output(0);
    const auto* numbers = output.as<float>();
    found->numbers.insert(found->numbers.end(), numbers, numbers + output.count());
  }
  return sqc::Status::ok();
}

Found use(const std::shared_ptr<const sqc::Model>& model, int threads) {
  Found found;
  for (const sqc::KvType type : {sqc::KvType::f32, sqc::KvType::s8}) {
    found.status = generate(model, threads, type, &found);
    if (!found.status.is_ok()) return found;
  }
  found.status = run(model, threads, &found);
  return found;
}

// Counts what a run of known sizes allocates, and a token behind a text; -1: something failed.
std::int64_t allocations_of_known_sizes(const std::shared_ptr<const sqc::Model>& model) {
  std::unique_ptr<sqc::Session> session;
  std::unique_ptr<sqc::Generator> generator;
  if (!sqc::Session::create(model, 2, sqc::best_isa(), &session).is_ok()) return -1;
  if (!sqc::Generator::create(model, 2, sqc::best_isa(), 1, 16, sqc::KvType::f32, &generator).is_ok()) return -1;
  const std::int64_t tokens[] = {1, 2, 3, 4};
  const std::int64_t shape[] = {2, 2};
  const sqc::InputView input = {sqc::DType::i64, 2, shape, tokens};
  const sqc::RowTokens token = {0, tokens, 1};
  std::int64_t before = 0;
  for (int turn = 0; turn < 4; ++turn) {
    if (turn == 2) before = allocations;
    if (!session->run({&input, 1}).is_ok() || !generator->feed({&token, 1}).is_ok()) return -1;
  }
  return allocations - before;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::shared_ptr<const sqc::Model> model;
  const sqc::Status opened = sqc::Model::open(argv[1], &model);
  if (!opened.is_ok()) {
    std::fprintf(stderr, "%s\n", opened.message());
    return 1;
  }
  const std::int64_t known = allocations_of_known_sizes(model);
  if (known != 0) {
    std::fprintf(stderr, "known sizes: %lld allocations\n", static_cast<long long>(known));
    return 1;
  }
  const Found alone = use(model, 1);
  if (!alone.status.is_ok()) {
    std::fprintf(stderr, "%s\n", alone.status.message());
    return 1;
  }
  const long rounds = std::atol(argv[2]);
  for (long round = 0; round < rounds; ++round) {
    Found found[kUsers];
    std::vector<std::thread> users;
    for (int i = 0; i < kUsers; ++i) users.emplace_back([&, i] { found[i] = use(model, 1 + i % 2); });
    for (std::thread& user : users) user.join();
    for (int i = 0; i < kUsers; ++i) {
      if (found[i].is(alone)) continue;
      std::fprintf(stderr, "user %d of round %ld found something else: %s\n", i, round, found[i].status.message());
      return 1;
    }
  }
  std::printf("%d users agree in %ld rounds, on %zu tokens and %zu numbers\n", kUsers, rounds, alone.tokens.size(),
              alone.numbers.size());
  return 0;
}
