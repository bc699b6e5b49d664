// Runs the tests whose name contains one of the arguments, or all.

#include <cstdarg>
#include <cstdlib>
#include <set>
#include <string>

#include <sys/mman.h>
#include <unistd.h>

#include "tests/test.h"

namespace sqc_tests {
namespace {

int failures = 0;
std::set<std::string> tested, skipped;

}  // namespace

std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

bool register_test(const char* name, void (*run)()) {
  all_tests().push_back({name, run});
  return true;
}

void fail(const char* file, int line, const char* format, ...) {
  if (++failures > 20) return;
  std::fprintf(stderr, "%s:%d: ", file, line);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
}

void skip_kernel(const char* name) { skipped.insert(name); }
void count_kernel(const char* name) { tested.insert(name); }

Guarded::Guarded(std::size_t bytes) : bytes_(bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const std::size_t body = (bytes + page - 1) / page * page;
  mapped_bytes_ = body + page;
  void* memory = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("mmap");
    std::exit(2);
  }
  mapped_ = static_cast<std::uint8_t*>(memory);
  if (mprotect(mapped_ + body, page, PROT_NONE) != 0) {
    std::perror("mprotect");
    std::exit(2);
  }
  data_ = mapped_ + body - bytes;
}

Guarded::~Guarded() { munmap(mapped_, mapped_bytes_); }

std::uint16_t to_half(float x) {
  std::uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return static_cast<std::uint16_t>(((word >> 23) - 112) << 10 | ((word >> 13) & 0x3ff));
}

}  // namespace sqc_tests

int main(int argc, char** argv) {
  using namespace sqc_tests;
  int run = 0;
  for (const Test& test : all_tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strstr(test.name, argv[i]) != nullptr;
    if (!wanted) continue;
    const int before = failures;
    test.run();
    std::printf("%s %s\n", failures == before ? "ok  " : "FAIL", test.name);
    std::fflush(stdout);
    ++run;
  }
  std::printf("isa: %s\n", sqc::isa_name(sqc::best_isa()));
  for (const std::string& name : tested) std::printf("tested: %s\n", name.c_str());
  for (const std::string& name : skipped) std::printf("skipped, not on this CPU: %s\n", name.c_str());
  std::printf("%d tests, %d failures\n", run, failures);
  return failures == 0 && run > 0 ? 0 : 1;
}
