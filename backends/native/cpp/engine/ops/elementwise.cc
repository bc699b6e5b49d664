// Operators that compute each element from those at the same place, with broadcasting.
//
// Integers wrap; floats are IEEE single precision. Functions without a kernel are the C library's, whose last
// bit is its own; everything else is the same on every machine.

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "engine/kernels.h"
#include "engine/operators.h"
#include "engine/ops/iterate.h"

namespace sqc {
namespace {

template <typename T>
T wrap(std::make_unsigned_t<T> x) noexcept {
  return static_cast<T>(x);
}

// Signed integers by way of unsigned ones, where overflow is defined.
template <typename T, class F>
T arithmetic(T a, T b, F f) noexcept {
  if constexpr (std::is_floating_point_v<T>) {
    return f(a, b);
  } else {
    using U = std::make_unsigned_t<T>;
    return wrap<T>(static_cast<U>(f(static_cast<U>(a), static_cast<U>(b))));
  }
}

struct Neg {
  template <typename T>
  static T apply(T x) noexcept {
    return arithmetic(T{0}, x, [](auto a, auto b) { return std::is_floating_point_v<T> ? -b : a - b; });
  }
};
struct Abs {
  template <typename T>
  static T apply(T x) noexcept {
    if constexpr (std::is_floating_point_v<T>) return std::fabs(x);
    return x < 0 ? Neg::apply(x) : x;
  }
};

#define SQC_FLOAT_FUNCTION(name, expression)     \
  struct name {                                  \
    static float apply(float x) noexcept { return expression; } \
  }
SQC_FLOAT_FUNCTION(Log, std::log(x));
SQC_FLOAT_FUNCTION(Sqrt, std::sqrt(x));
SQC_FLOAT_FUNCTION(Rsqrt, 1.0f / std::sqrt(x));
SQC_FLOAT_FUNCTION(Sin, std::sin(x));
SQC_FLOAT_FUNCTION(Cos, std::cos(x));
SQC_FLOAT_FUNCTION(Erf, std::erf(x));
SQC_FLOAT_FUNCTION(Floor, std::floor(x));
SQC_FLOAT_FUNCTION(Ceil, std::ceil(x));
SQC_FLOAT_FUNCTION(Round, std::nearbyint(x));  // half to even
#undef SQC_FLOAT_FUNCTION

struct Add {
  template <typename T>
  static T apply(T x, T y) noexcept {
    return arithmetic(x, y, [](auto a, auto b) { return a + b; });
  }
};
struct Sub {
  template <typename T>
  static T apply(T x, T y) noexcept {
    return arithmetic(x, y, [](auto a, auto b) { return a - b; });
  }
};
struct Mul {
  template <typename T>
  static T apply(T x, T y) noexcept {
    return arithmetic(x, y, [](auto a, auto b) { return a * b; });
  }
};
struct Div {
  static float apply(float a, float b) noexcept { return a / b; }
};
struct Pow {
  static float apply(float a, float b) noexcept { return std::pow(a, b); }
};
// A NaN on either side stays one, as in PyTorch.
struct Minimum {
  template <typename T>
  static T apply(T a, T b) noexcept {
    return a != a || a < b ? a : b;
  }
};
struct Maximum {
  template <typename T>
  static T apply(T a, T b) noexcept {
    return a != a || a > b ? a : b;
  }
};
struct Equal {
  template <typename T>
  static bool apply(T a, T b) noexcept {
    return a == b;
  }
};
struct NotEqual {
  template <typename T>
  static bool apply(T a, T b) noexcept {
    return a != b;
  }
};
struct Less {
  template <typename T>
  static bool apply(T a, T b) noexcept {
    return a < b;
  }
};
struct LessEqual {
  template <typename T>
  static bool apply(T a, T b) noexcept {
    return a <= b;
  }
};
struct And {
  template <typename T>
  static T apply(T a, T b) noexcept {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  static T apply(T a, T b) noexcept {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  static T apply(T a, T b) noexcept {
    return static_cast<T>(a ^ b);
  }
};

template <class F, typename In, typename Out>
Status unary(RunContext& c) noexcept {
  return Iteration<2>({&c.out(), &c.in(0)}).run(c.pool, [](std::int64_t n, std::uint8_t* const* data, const std::int64_t* s) {
    if (s[0] == sizeof(Out) && s[1] == sizeof(In)) {
      auto* out = reinterpret_cast<Out*>(data[0]);
      const auto* x = reinterpret_cast<const In*>(data[1]);
      for (std::int64_t i = 0; i < n; ++i) out[i] = F::apply(x[i]);
      return;
    }
    for (std::int64_t i = 0; i < n; ++i) {
      *reinterpret_cast<Out*>(data[0] + i * s[0]) = F::apply(*reinterpret_cast<const In*>(data[1] + i * s[1]));
    }
  });
}

template <class F, typename In, typename Out>
Status binary(RunContext& c) noexcept {
  return Iteration<3>({&c.out(), &c.in(0), &c.in(1)})
      .run(c.pool, [](std::int64_t n, std::uint8_t* const* data, const std::int64_t* s) {
        auto* out = reinterpret_cast<Out*>(data[0]);
        const auto* x = reinterpret_cast<const In*>(data[1]);
        const auto* y = reinterpret_cast<const In*>(data[2]);
        if (s[0] == sizeof(Out) && s[1] == sizeof(In) && s[2] == sizeof(In)) {
          for (std::int64_t i = 0; i < n; ++i) out[i] = F::apply(x[i], y[i]);
        } else if (s[0] == sizeof(Out) && s[1] == sizeof(In) && s[2] == 0) {
          const In b = *y;
          for (std::int64_t i = 0; i < n; ++i) out[i] = F::apply(x[i], b);
        } else if (s[0] == sizeof(Out) && s[1] == 0 && s[2] == sizeof(In)) {
          const In a = *x;
          for (std::int64_t i = 0; i < n; ++i) out[i] = F::apply(a, y[i]);
        } else {
          for (std::int64_t i = 0; i < n; ++i) {
            *reinterpret_cast<Out*>(data[0] + i * s[0]) = F::apply(*reinterpret_cast<const In*>(data[1] + i * s[1]),
                                                                   *reinterpret_cast<const In*>(data[2] + i * s[2]));
          }
        }
      });
}

// Functions that have a kernel. It takes rows; those of a tensor that is not contiguous are copied first.
Status activate(RunContext& c, Activation function) noexcept {
  const Tensor& out = c.out();
  const float* x = c.in(0).as<float>();
  if (!c.in(0).is_contiguous()) {
    SQC_RETURN_IF_ERROR(copy_elements(c.pool, out, c.in(0)));
    x = out.as<float>();
  }
  ActivationParams params = {};
  params.function = function;
  params.m = out.rows();
  params.k = params.x_stride = params.y_stride = out.columns();
  params.x = x;
  params.y = out.as<float>();
  return activation(c.pool, c.kernels.activation, params, nullptr);
}

template <class F>
Status number_unary(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return unary<F, float, float>(c);
    case DType::i64: return unary<F, std::int64_t, std::int64_t>(c);
    default: return unary<F, std::int32_t, std::int32_t>(c);
  }
}

template <class F>
Status number_binary(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return binary<F, float, float>(c);
    case DType::i64: return binary<F, std::int64_t, std::int64_t>(c);
    default: return binary<F, std::int32_t, std::int32_t>(c);
  }
}

template <class F>
Status compare(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return binary<F, float, bool>(c);
    case DType::i64: return binary<F, std::int64_t, bool>(c);
    case DType::i32: return binary<F, std::int32_t, bool>(c);
    default: return binary<F, std::uint8_t, bool>(c);
  }
}

template <class F>
Status bitwise(RunContext& c) noexcept {
  if (c.in(0).dtype == DType::i64) return binary<F, std::int64_t, std::int64_t>(c);
  return binary<F, std::uint8_t, std::uint8_t>(c);
}

bool is_number(DType dtype) noexcept {
  return dtype == DType::f32 || dtype == DType::i64 || dtype == DType::i32;
}

// Both operands of one type, broadcast to the output's shape.
Status check_binary(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.in(1).dtype);
  SQC_REQUIRE(broadcasts_to(c.in(0), c.out()) && broadcasts_to(c.in(1), c.out()));
  return Status::ok();
}

// Float to integer as x86 does it: what does not fit, and NaN, become the lowest number.
template <typename In, typename Out>
Out convert(In x) noexcept {
  if constexpr (std::is_same_v<Out, bool>) {
    return x != In{0};
  } else if constexpr (std::is_floating_point_v<In> && std::is_integral_v<Out>) {
    using Wide = std::conditional_t<(sizeof(Out) < 8), std::int32_t, std::int64_t>;
    constexpr In limit = static_cast<In>(std::uint64_t{1} << (8 * sizeof(Wide) - 1));
    const Wide wide = x >= -limit && x < limit ? static_cast<Wide>(x) : std::numeric_limits<Wide>::min();
    return static_cast<Out>(wide);
  } else {
    return static_cast<Out>(x);
  }
}

template <typename In, typename Out>
struct Convert {
  static Out apply(In x) noexcept { return convert<In, Out>(x); }
};

// A bfloat16 is the upper half of a float.
struct Widen {
  static float apply(std::uint16_t x) noexcept {
    const std::uint32_t word = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
};

template <typename In>
Status cast_from(RunContext& c) noexcept {
  switch (c.out().dtype) {
    case DType::f32: return unary<Convert<In, float>, In, float>(c);
    case DType::i64: return unary<Convert<In, std::int64_t>, In, std::int64_t>(c);
    case DType::i32: return unary<Convert<In, std::int32_t>, In, std::int32_t>(c);
    case DType::i8: return unary<Convert<In, std::int8_t>, In, std::int8_t>(c);
    case DType::u8: return unary<Convert<In, std::uint8_t>, In, std::uint8_t>(c);
    default: return unary<Convert<In, bool>, In, bool>(c);
  }
}

// A boolean is one byte, true where it is not zero: files and callers may hold any.
template <typename Out>
struct Truth {
  static Out apply(std::uint8_t x) noexcept { return static_cast<Out>(x != 0); }
};
struct Not {
  static bool apply(std::uint8_t x) noexcept { return x == 0; }
};

Status cast_from_boolean(RunContext& c) noexcept {
  switch (c.out().dtype) {
    case DType::f32: return unary<Truth<float>, std::uint8_t, float>(c);
    case DType::i64: return unary<Truth<std::int64_t>, std::uint8_t, std::int64_t>(c);
    case DType::i32: return unary<Truth<std::int32_t>, std::uint8_t, std::int32_t>(c);
    default: return unary<Truth<std::uint8_t>, std::uint8_t, std::uint8_t>(c);
  }
}

template <typename T>
Status select(RunContext& c) noexcept {
  return Iteration<4>({&c.out(), &c.in(0), &c.in(1), &c.in(2)})
      .run(c.pool, [](std::int64_t n, std::uint8_t* const* data, const std::int64_t* s) {
        for (std::int64_t i = 0; i < n; ++i) {
          const std::uint8_t* from = data[1][i * s[1]] != 0 ? data[2] + i * s[2] : data[3] + i * s[3];
          std::memcpy(data[0] + i * s[0], from, sizeof(T));
        }
      });
}

}  // namespace

Status prepare_unary(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype && c.in(0).same_shape(c.out()));
  SQC_REQUIRE(is_number(c.in(0).dtype));
  return Status::ok();
}

Status prepare_float_unary(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.out().dtype == DType::f32 && c.in(0).same_shape(c.out()));
  return Status::ok();
}

Status prepare_logical_not(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::boolean && c.out().dtype == DType::boolean && c.in(0).same_shape(c.out()));
  return Status::ok();
}

Status prepare_cast(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).same_shape(c.out()));
  if (c.in(0).dtype == DType::bf16) {
    SQC_REQUIRE(c.out().dtype == DType::f32);
    return Status::ok();
  }
  SQC_REQUIRE(c.in(0).dtype < DType::f16 && c.out().dtype < DType::f16);
  return Status::ok();
}

// Two 4-bit codes a byte, the first one in the low half: u8 [.., ceil(n / 2)] -> u8 [.., n].
Status prepare_unpack_nibbles(PrepareContext& c) noexcept {
  const Tensor &in = c.in(0), &out = c.out();
  SQC_REQUIRE(in.dtype == DType::u8 && out.dtype == DType::u8 && in.rank == out.rank && in.rank >= 1);
  SQC_REQUIRE(in.is_contiguous() && in.columns() == out.columns() / 2 + out.columns() % 2);
  for (int d = 0; d + 1 < in.rank; ++d) SQC_REQUIRE(in.shape[d] == out.shape[d]);
  return Status::ok();
}

Status run_unpack_nibbles(RunContext& c) noexcept {
  const std::int64_t n = c.out().columns(), bytes = c.in(0).columns();
  return for_rows(c.pool, c.out().rows(), c.out().count(), [&](std::int64_t row) {
    const std::uint8_t* in = c.in(0).data + row * bytes;
    std::uint8_t* out = c.out().data + row * n;
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<std::uint8_t>(i % 2 == 0 ? in[i / 2] & 15 : in[i / 2] >> 4);
  });
}

Status prepare_binary(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype && is_number(c.out().dtype));
  return check_binary(c);
}

Status prepare_float_binary(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::f32 && c.out().dtype == DType::f32);
  return check_binary(c);
}

Status prepare_compare(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.out().dtype == DType::boolean);
  SQC_REQUIRE(is_number(c.in(0).dtype) || c.in(0).dtype == DType::boolean || c.in(0).dtype == DType::u8);
  return check_binary(c);
}

Status prepare_bitwise(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == c.out().dtype);
  SQC_REQUIRE(c.out().dtype == DType::boolean || c.out().dtype == DType::i64 || c.out().dtype == DType::u8);
  return check_binary(c);
}

Status prepare_where(PrepareContext& c) noexcept {
  SQC_REQUIRE(c.in(0).dtype == DType::boolean && c.in(1).dtype == c.out().dtype && c.in(2).dtype == c.out().dtype);
  SQC_REQUIRE(broadcasts_to(c.in(0), c.out()) && broadcasts_to(c.in(1), c.out()) && broadcasts_to(c.in(2), c.out()));
  return Status::ok();
}

Status run_neg(RunContext& c) noexcept { return number_unary<Neg>(c); }
Status run_abs(RunContext& c) noexcept { return number_unary<Abs>(c); }
Status run_exp(RunContext& c) noexcept { return activate(c, Activation::exp); }
Status run_log(RunContext& c) noexcept { return unary<Log, float, float>(c); }
Status run_sqrt(RunContext& c) noexcept { return unary<Sqrt, float, float>(c); }
Status run_rsqrt(RunContext& c) noexcept { return unary<Rsqrt, float, float>(c); }
Status run_sin(RunContext& c) noexcept { return unary<Sin, float, float>(c); }
Status run_cos(RunContext& c) noexcept { return unary<Cos, float, float>(c); }
Status run_tanh(RunContext& c) noexcept { return activate(c, Activation::tanh); }
Status run_sigmoid(RunContext& c) noexcept { return activate(c, Activation::sigmoid); }
Status run_silu(RunContext& c) noexcept { return activate(c, Activation::silu); }
Status run_gelu(RunContext& c) noexcept { return activate(c, Activation::gelu); }
Status run_gelu_tanh(RunContext& c) noexcept { return activate(c, Activation::gelu_tanh); }
Status run_erf(RunContext& c) noexcept { return unary<Erf, float, float>(c); }
Status run_floor(RunContext& c) noexcept { return unary<Floor, float, float>(c); }
Status run_ceil(RunContext& c) noexcept { return unary<Ceil, float, float>(c); }
Status run_round(RunContext& c) noexcept { return unary<Round, float, float>(c); }
Status run_logical_not(RunContext& c) noexcept { return unary<Not, std::uint8_t, bool>(c); }

Status run_cast(RunContext& c) noexcept {
  switch (c.in(0).dtype) {
    case DType::f32: return cast_from<float>(c);
    case DType::i64: return cast_from<std::int64_t>(c);
    case DType::i32: return cast_from<std::int32_t>(c);
    case DType::i8: return cast_from<std::int8_t>(c);
    case DType::u8: return cast_from<std::uint8_t>(c);
    case DType::bf16: return unary<Widen, std::uint16_t, float>(c);
    default: return cast_from_boolean(c);
  }
}

Status run_add(RunContext& c) noexcept { return number_binary<Add>(c); }
Status run_sub(RunContext& c) noexcept { return number_binary<Sub>(c); }
Status run_mul(RunContext& c) noexcept { return number_binary<Mul>(c); }
Status run_minimum(RunContext& c) noexcept { return number_binary<Minimum>(c); }
Status run_maximum(RunContext& c) noexcept { return number_binary<Maximum>(c); }
Status run_div(RunContext& c) noexcept { return binary<Div, float, float>(c); }
Status run_pow(RunContext& c) noexcept { return binary<Pow, float, float>(c); }
Status run_eq(RunContext& c) noexcept { return compare<Equal>(c); }
Status run_ne(RunContext& c) noexcept { return compare<NotEqual>(c); }
Status run_lt(RunContext& c) noexcept { return compare<Less>(c); }
Status run_le(RunContext& c) noexcept { return compare<LessEqual>(c); }
Status run_bit_and(RunContext& c) noexcept { return bitwise<And>(c); }
Status run_bit_or(RunContext& c) noexcept { return bitwise<Or>(c); }
Status run_bit_xor(RunContext& c) noexcept { return bitwise<Xor>(c); }

Status run_where(RunContext& c) noexcept {
  switch (dtype_bytes(c.out().dtype)) {
    case 1: return select<std::uint8_t>(c);
    case 2: return select<std::uint16_t>(c);
    case 4: return select<std::uint32_t>(c);
    default: return select<std::uint64_t>(c);
  }
}

}  // namespace sqc
