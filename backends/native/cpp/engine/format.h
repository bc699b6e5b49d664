// The bytes of a `.sqm` file: docs/file_format.md, as structs. All numbers are little-endian.
//
// A file is a header, a table of sections, and the sections: flat tables of the records below, which refer
// to each other by index. Nothing in it is an address, so it is used where it is mapped.

#ifndef SQC_ENGINE_FORMAT_H_
#define SQC_ENGINE_FORMAT_H_

#include <cstdint>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "A .sqm file is little-endian and is used in place."
#endif

namespace sqc::format {

// As PNG's: a byte above 127 and both kinds of line ends, which transfers as text would change.
constexpr unsigned char kMagic[8] = {0x89, 'S', 'Q', 'M', '\r', '\n', 0x1a, '\n'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint32_t kVersionWithGeneration = 2;  // has the sections from `generation` on

constexpr std::uint64_t kSectionAlignment = 64;
constexpr std::uint64_t kDataAlignment = 4096;
constexpr std::uint32_t kNone = 0xffffffff;  // an operand that is left out

constexpr int kMaxRank = 8;
constexpr int kMaxStack = 16;  // of an expression

struct Header {
  unsigned char magic[8];
  std::uint32_t version;
  std::uint32_t section_count;
  std::uint64_t file_bytes;
  std::uint32_t sections_crc;
  std::uint32_t header_crc;  // of the 28 bytes before it
  std::uint8_t reserved[32];
};
static_assert(sizeof(Header) == 64);

enum class SectionKind : std::uint32_t {
  strings,      // bytes of names, UTF-8
  symbols,      // Symbol: the sizes that a call decides
  code,         // Instruction
  sizes,        // Size: integers computed from symbols
  values,       // Value: every tensor of the plan
  lists,        // uint32: indices that other records refer to by ranges
  floats,       // double: numbers that operators take
  operators,    // Operator, in the order of execution
  inputs,       // Port
  outputs,      // Port
  tensors,      // Tensor: where each constant lies
  metadata,     // JSON text, for who wrote the file; the engine does not read it
  data,         // the bytes of the constants
  // The plan that continues texts; strings, tensors and data serve both.
  generation,   // one Generation
  generation_symbols,
  generation_code,
  generation_sizes,
  generation_values,
  generation_lists,
  generation_floats,
  generation_operators,
  generation_inputs,
  generation_outputs,
};
constexpr std::uint32_t kSectionCount = 13;  // a file has each once, in this order
constexpr std::uint32_t kSectionCountWithGeneration = 23;

struct Section {
  std::uint32_t kind;
  std::uint32_t crc;     // CRC-32 of the bytes; 0 for `data`, whose tensors have their own
  std::uint64_t offset;  // multiple of kSectionAlignment, `data` of kDataAlignment
  std::uint64_t bytes;
  std::uint64_t reserved;
};
static_assert(sizeof(Section) == 32);

struct Symbol {
  std::uint32_t name_offset, name_bytes;  // in `strings`
  std::int64_t low, high;                 // the sizes it may have, both included
};
static_assert(sizeof(Symbol) == 24);

// Postfix code on a stack of 64-bit integers; a Size is a run of it that leaves one number.
enum class Opcode : std::uint32_t { constant, symbol, add, sub, mul, floordiv, mod, min, max };
constexpr std::uint32_t kOpcodeCount = 9;

struct Instruction {
  std::uint32_t opcode;
  std::uint32_t reserved;
  std::int64_t argument;  // the constant, or the index of the symbol
};
static_assert(sizeof(Instruction) == 16);

struct Size {
  std::uint32_t first, count;  // in `code`
};
static_assert(sizeof(Size) == 8);

enum class ValueKind : std::uint8_t { input, constant, computed };

struct Value {
  std::uint8_t dtype;        // sqc::DType
  std::uint8_t rank;
  std::uint8_t kind;         // ValueKind
  std::uint8_t layout;       // sqc::Layout: how the bytes of a constant are arranged
  std::uint32_t first_size;  // in `lists`: `rank` indices of sizes
  std::uint32_t source;      // index of the input or tensor; 0 for computed values
  std::uint32_t reserved;
};
static_assert(sizeof(Value) == 16);

struct Operator {
  std::uint16_t kind;  // as in engine/operators.inc
  std::uint16_t inputs, outputs, ints, floats;
  std::uint16_t reserved;
  std::uint32_t first_list;  // in `lists`: input values, output values, then sizes
  std::uint32_t first_float;
  std::uint32_t name_offset, name_bytes;  // the layer or node it came from
  std::uint32_t reserved2;
};
static_assert(sizeof(Operator) == 32);

struct Port {
  std::uint32_t value;
  std::uint32_t name_offset, name_bytes;
  std::uint32_t reserved;
};
static_assert(sizeof(Port) == 16);

struct Generation {
  std::int64_t limit;       // tokens that a row may have
  std::int64_t vocabulary;  // tokens that can be looked up; 0: not known
  std::uint8_t reserved[16];
};
static_assert(sizeof(Generation) == 32);

struct Tensor {
  std::uint64_t offset;  // in the file; multiple of 64, from 16 KiB on of 4096
  std::uint64_t bytes;
  std::uint32_t crc;
  std::uint32_t reserved;
};
static_assert(sizeof(Tensor) == 24);
constexpr std::uint64_t kTensorAlignment = 64;
constexpr std::uint64_t kLargeTensor = 16384;

}  // namespace sqc::format

#endif  // SQC_ENGINE_FORMAT_H_
