#include "tools/npy.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace sqrun {
namespace {

struct TypeName {
  sqc_dtype dtype;
  const char* descr;
  std::size_t bytes;
};
constexpr TypeName kTypes[] = {{SQC_F32, "<f4", 4}, {SQC_I64, "<i8", 8}, {SQC_I32, "<i4", 4},
                               {SQC_I8, "|i1", 1},  {SQC_U8, "|u1", 1},  {SQC_BOOL, "|b1", 1}};
constexpr std::size_t kLargestHeader = 65536;

using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

bool fail(std::string* error, const std::string& path, const char* why) {
  *error = path + ": " + why;
  return false;
}

// What follows 'key': in the header's dictionary, or null.
const char* find_value(const std::string& header, const char* key) {
  const std::string quoted = std::string("'") + key + "':";
  const std::size_t at = header.find(quoted);
  if (at == std::string::npos) return nullptr;
  const char* value = header.c_str() + at + quoted.size();
  while (*value == ' ') ++value;
  return value;
}

bool parse_shape(const char* text, sqc_tensor* tensor) {
  if (text == nullptr || *text++ != '(') return false;
  for (;;) {
    while (*text == ' ' || *text == ',') ++text;
    if (*text == ')') return true;
    char* end = nullptr;
    const long long size = std::strtoll(text, &end, 10);
    if (end == text || size < 0 || tensor->rank == SQC_MAX_RANK) return false;
    tensor->shape[tensor->rank++] = size;
    text = end;
  }
}

}  // namespace

bool read_npy(const std::string& path, Array* array, std::string* error) {
  const File file(std::fopen(path.c_str(), "rb"), &std::fclose);
  if (file == nullptr) return fail(error, path, "cannot be opened");
  unsigned char start[12] = {};
  if (std::fread(start, 1, 10, file.get()) != 10 || std::memcmp(start, "\x93NUMPY", 6) != 0) {
    return fail(error, path, "is no .npy file");
  }
  std::size_t length = start[8] | static_cast<std::size_t>(start[9]) << 8;
  if (start[6] >= 2) {  // later versions have four bytes for the length
    if (std::fread(start + 10, 1, 2, file.get()) != 2) return fail(error, path, "is cut off");
    length |= static_cast<std::size_t>(start[10]) << 16 | static_cast<std::size_t>(start[11]) << 24;
  }
  if (length > kLargestHeader) return fail(error, path, "has a header that is too long");
  std::string header(length, '\0');
  if (std::fread(&header[0], 1, length, file.get()) != length) return fail(error, path, "is cut off");
  const char* descr = find_value(header, "descr");
  const char* order = find_value(header, "fortran_order");
  array->tensor = {};
  if (descr == nullptr || order == nullptr || !parse_shape(find_value(header, "shape"), &array->tensor)) {
    return fail(error, path, "has a header that cannot be read");
  }
  if (std::strncmp(order, "False", 5) != 0) return fail(error, path, "is in column-major order");
  for (const TypeName& type : kTypes) {
    if (std::strncmp(descr + 1, type.descr, 3) != 0) continue;
    array->tensor.dtype = type.dtype;
    std::size_t bytes = type.bytes;
    for (int d = 0; d < array->tensor.rank; ++d) {
      if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(array->tensor.shape[d]), &bytes) || bytes >> 40 != 0) {
        return fail(error, path, "is too large");
      }
    }
    array->bytes.resize(bytes);
    if (std::fread(array->bytes.data(), 1, bytes, file.get()) != bytes) return fail(error, path, "is cut off");
    array->tensor.data = array->bytes.data();
    return true;
  }
  return fail(error, path, "has a type that no model takes");
}

bool write_npy(const std::string& path, const sqc_tensor& tensor, std::string* error) {
  const TypeName* type = nullptr;
  for (const TypeName& candidate : kTypes) {
    if (candidate.dtype == tensor.dtype) type = &candidate;
  }
  if (type == nullptr) return fail(error, path, "has a type that .npy files do not hold");
  std::string shape;
  std::size_t bytes = type->bytes;
  for (int d = 0; d < tensor.rank; ++d) {
    shape += std::to_string(tensor.shape[d]) + (d + 1 < tensor.rank ? ", " : tensor.rank == 1 ? "," : "");
    bytes *= static_cast<std::size_t>(tensor.shape[d]);
  }
  std::string header = std::string("{'descr': '") + type->descr + "', 'fortran_order': False, 'shape': (" + shape + "), }";
  // The data begins on a multiple of 64.
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  const File file(std::fopen(path.c_str(), "wb"), &std::fclose);
  if (file == nullptr) return fail(error, path, "cannot be written");
  const unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<unsigned char>(header.size() & 0xff),
                                   static_cast<unsigned char>(header.size() >> 8)};
  const bool written = std::fwrite(start, 1, 10, file.get()) == 10 &&
                       std::fwrite(header.data(), 1, header.size(), file.get()) == header.size() &&
                       std::fwrite(tensor.data, 1, bytes, file.get()) == bytes && std::fflush(file.get()) == 0;
  return written || fail(error, path, "cannot be written");
}

}  // namespace sqrun
