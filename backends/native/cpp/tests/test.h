// A test program in one header: no Python, no framework, so that it also runs under sanitizers and, cross
// compiled, under an emulator.

#ifndef SQC_TESTS_TEST_H_
#define SQC_TESTS_TEST_H_

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "base/isa.h"

namespace sqc_tests {

struct Test {
  const char* name;
  void (*run)();
};
std::vector<Test>& all_tests();
bool register_test(const char* name, void (*run)());

// Reports a failure of the running test; only the first ones are printed.
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
void fail(const char* file, int line, const char* format, ...);

// Says that a kernel cannot run on this CPU. Each is printed once, so that silence means tested.
void skip_kernel(const char* name);
void count_kernel(const char* name);  // printed at the end: what has been tested

#define SQC_TEST(name)                                                             \
  static void name();                                                              \
  static const bool name##_registered = ::sqc_tests::register_test(#name, &name);  \
  static void name()

#define SQC_CHECK(...)                                                      \
  do {                                                                      \
    if (!(__VA_ARGS__)) ::sqc_tests::fail(__FILE__, __LINE__, "%s", #__VA_ARGS__); \
  } while (false)

// Memory that ends at a page without access: reading or writing one byte behind it is a crash. (Before it
// lie up to a page of other bytes.) Sanitizers see the heap only; vector loads in a packed file reach
// across allocations that they do not know.
class Guarded {
 public:
  explicit Guarded(std::size_t bytes);
  ~Guarded();
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  std::size_t size() const { return bytes_; }

 private:
  std::uint8_t* data_ = nullptr;
  std::uint8_t* mapped_ = nullptr;
  std::size_t bytes_ = 0, mapped_bytes_ = 0;
};

// An array of T in guarded memory.
template <typename T>
class Array {
 public:
  explicit Array(std::int64_t count) : memory_(static_cast<std::size_t>(count) * sizeof(T)), count_(count) {}
  T* data() const { return memory_.as<T>(); }
  std::int64_t size() const { return count_; }
  T& operator[](std::int64_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }

 private:
  Guarded memory_;
  std::int64_t count_;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  std::int64_t integer(std::int64_t low, std::int64_t high) {  // both included
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  float real(float low, float high) {
    return low + (high - low) * static_cast<float>(engine_() >> 40) * 0x1p-24f;
  }
  bool chance(double p) { return static_cast<double>(engine_() >> 11) * 0x1p-53 < p; }

 private:
  std::mt19937_64 engine_;
};

// Whether the two arrays hold the same bits.
template <typename T>
bool same_bits(const Array<T>& a, const Array<T>& b) {
  return a.size() == b.size() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.size()) * sizeof(T)) == 0);
}

// The float with these 16 bits, read as IEEE half precision; and a half for a positive number >= 2^-14.
std::uint16_t to_half(float x);

}  // namespace sqc_tests

#endif  // SQC_TESTS_TEST_H_
