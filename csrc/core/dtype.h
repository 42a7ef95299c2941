// Element types without torch: storage formats, their conversions to float, and dispatch over them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/backend.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace unlearn_ext {

enum class DType { f32, f64, f16, bf16 };

template <class To, class From>
UNLEARN_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// The bit formulas below are branch-free so that loops over half-precision lists vectorise on every CPU; GPUs have
// an instruction for each.
struct Half {
  uint16_t bits;

  UNLEARN_HD static Half from(float value) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(value))};
#else
    const uint32_t raw = bit_cast<uint32_t>(value), x = raw & 0x7fffffffu;
    const uint32_t normal = (x + 0xfffu + ((x >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 0.5 leaves the value in units of 2^-24, the spacing of subnormal halves, correctly rounded.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(x) + 0.5f) - 0x3f000000u;
    const uint32_t nan = 0x7e00u | ((x >> 13) & 0x3ffu);
    uint32_t h = x < 0x38800000u ? subnormal : normal;
    h = x >= 0x477ff000u ? 0x7c00u : h;
    h = x > 0x7f800000u ? nan : h;
    return {static_cast<uint16_t>(h | ((raw >> 16) & 0x8000u))};
#endif
  }

  UNLEARN_HD operator float() const {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t x = bits & 0x7fffu;
    const uint32_t normal = (x << 13) + (112u << 23);
    const uint32_t subnormal = bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(x)) * 0x1p-24f);
    const uint32_t special = (x << 13) | 0x7f800000u;
    uint32_t f = x < 0x400u ? subnormal : normal;
    f = x >= 0x7c00u ? special : f;
    return bit_cast<float>(f | (static_cast<uint32_t>(bits & 0x8000u) << 16));
#endif
  }
};

struct BFloat16 {
  uint16_t bits;

  UNLEARN_HD static BFloat16 from(float value) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
    const uint32_t x = bit_cast<uint32_t>(value);
    const uint32_t rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
    const uint32_t nan = (x >> 16) | 0x40u;
    return {static_cast<uint16_t>((x & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
#endif
  }

  UNLEARN_HD operator float() const { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// Type in which a formula is evaluated for a storage type.
template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
UNLEARN_HD T store_as(acc_t<T> value) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>)
    return T::from(value);
  else
    return value;
}

// x * y + z rounded once, in software where the target lacks the instruction.
template <class A>
UNLEARN_HD A fused_multiply_add(A x, A y, A z) {
  if constexpr (std::is_same_v<A, double>)
    return fma(x, y, z);
  else
    return fmaf(x, y, z);
}

// The same where the target has the instruction, otherwise rounded twice: said outright, so that every build of a
// target rounds alike whatever the compiler may contract.
template <class A>
UNLEARN_HD A multiply_add(A x, A y, A z) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  return fused_multiply_add(x, y, z);
#else
  return x * y + z;
#endif
}

// keep ? a : b on values, to the bit: a choice between addresses would keep loops from vectorising.
//
// LLVM before version 20 makes x * (keep ? y : 1) of keep ? x * y : x, also where the choice is written with the bits
// of an integer mask, and the product by 1 turns a signalling NaN into a quiet one. So the mask is made of bits of
// which the compiler does not know that they are set. GCC keeps the choice, and has an instruction for it. Source:
// https://github.com/llvm/llvm-project/issues/82726.
template <class T>
UNLEARN_HD T choose(bool keep, T a, T b) {
  if constexpr (std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
    return {static_cast<uint16_t>(keep ? a.bits : b.bits)};
  } else {
#if defined(__clang__) && !defined(__CUDA_ARCH__)
    using Bits = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
    Bits ones = ~Bits{0};
    asm("" : "+r"(ones));
    const Bits mask = keep ? ones : Bits{0};
    return bit_cast<T>((bit_cast<Bits>(a) & mask) | (bit_cast<Bits>(b) & ~mask));
#else
    return keep ? a : b;
#endif
  }
}

template <class A>
UNLEARN_HD A square_root(A x) {
  if constexpr (std::is_same_v<A, double>)
    return sqrt(x);
  else
    return sqrtf(x);
}

// |x|, lane by lane where V is one of the compiler's vector types.
template <class V>
UNLEARN_HD V magnitude(V x) {
  if constexpr (std::is_same_v<V, double>)
    return fabs(x);
  else if constexpr (std::is_same_v<V, float>)
    return fabsf(x);
  else
    return x < V{} ? -x : x;
}

// |x|^power, power 1 or 2: what a Fisher diagonal sums.
template <int kPower, class V>
UNLEARN_HD V raised(V x) {
  if constexpr (kPower == 2)
    return x * x;
  else
    return magnitude(x);
}

template <class A>
UNLEARN_HD A raised(A x, int power) {
  return power == 2 ? raised<2>(x) : raised<1>(x);
}

// sum + |x|^power, rounded once.
template <int kPower, class A>
UNLEARN_HD A plus_raised(A sum, A x) {
  if constexpr (kPower == 2)
    return fused_multiply_add(x, x, sum);
  else
    return sum + magnitude(x);
}

template <class T>
UNLEARN_HD bool is_finite(T x) {
  if constexpr (std::is_same_v<T, double>)
    return (bit_cast<uint64_t>(x) & 0x7ff0000000000000u) != 0x7ff0000000000000u;
  else
    return (bit_cast<uint32_t>(x) & 0x7f800000u) != 0x7f800000u;
}

template <class T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>{}) with the storage type of `dtype`.
template <class F>
auto visit(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f64:
      return f(Tag<double>{});
    case DType::f16:
      return f(Tag<Half>{});
    case DType::bf16:
      return f(Tag<BFloat16>{});
    default:
      return f(Tag<float>{});
  }
}

// The same for accumulators, which are float or double.
template <class F>
auto visit_accumulator(DType dtype, const F& f) {
  return dtype == DType::f64 ? f(Tag<double>{}) : f(Tag<float>{});
}

}  // namespace unlearn_ext
