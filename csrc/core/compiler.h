// What C++20 has no words for, in the words of each compiler. Included by CPU files only, each built once per
// instruction set: the unnamed namespace keeps every build's copy to itself.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

// On functions and on lambdas.
#define UNLEARN_ALWAYS_INLINE __attribute__((always_inline))

// Before a loop of at most 16 turns whose arrays have to become registers.
#if defined(__clang__)
#define UNLEARN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNLEARN_UNROLL _Pragma("GCC unroll 16")
#endif

// Before a loop none of whose turns reads what another writes. What clang has for it would also let it change the order
// of sums, so there it is left to compare the addresses at run time.
#if defined(__clang__)
#define UNLEARN_INDEPENDENT
#else
#define UNLEARN_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace unlearn_ext {
namespace {

// A vector register of kBytes / sizeof(A) lanes, which may be read from and written to any array of A.
template <class A, int kBytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(kBytes), aligned(alignof(A)), may_alias));
};

// Lane i of the result is lane from(i) of a, or of b for from(i) - lanes of a. `from` is a lambda that captures
// nothing.
template <class A, int kBytes, class From>
UNLEARN_ALWAYS_INLINE inline auto shuffle(typename VectorOf<A, kBytes>::type a, typename VectorOf<A, kBytes>::type b,
                                          From) {
  constexpr From from;
  constexpr int kCount = kBytes / static_cast<int>(sizeof(A));
#if defined(__clang__)
  return [&]<int... kLane>(std::integer_sequence<int, kLane...>) UNLEARN_ALWAYS_INLINE {
    return __builtin_shufflevector(a, b, from(kLane)...);
  }(std::make_integer_sequence<int, kCount>{});
#else
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Index __attribute__((vector_size(kBytes)));
  Index lanes;
  for (int lane = 0; lane < kCount; ++lane) lanes[lane] = from(lane);
  return __builtin_shuffle(a, b, lanes);
#endif
}

}  // namespace
}  // namespace unlearn_ext
