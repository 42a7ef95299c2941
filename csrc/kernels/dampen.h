// Selective dampening (Foster, Schoepf & Brintrup, AAAI 2024):
//   theta <- clamp((lambda * full / forget)^exponent, beta_min, beta_max) * theta   where  forget > alpha * full
#pragma once

#include <cmath>
#include <limits>

#include "core/lists.h"

namespace unlearn_ext {

// An importance pair made ready for comparison with any threshold, see exceeds().
template <class A>
struct Comparable {
  A full, forget;
};

// forget > alpha * full is decided exactly: the product is never rounded, so every CPU and GPU selects alike. A fused
// multiply-add rounds once, which keeps the sign of alpha * full - forget unless the difference underflows; pairs with
// a tiny `forget` are therefore scaled up first. kTiny leaves room for the digits of the product above the smallest
// number; a `full` that overflows then is too large for any positive alpha, and so is the largest number in its place.
// Non-finite importances become a pair that no threshold selects.
template <class A>
UNLEARN_HD Comparable<A> comparable(A full, A forget) {
  constexpr bool kDouble = std::is_same_v<A, double>;
  constexpr A kTiny = kDouble ? A(0x1p-950) : A(0x1p-100f), kBoost = kDouble ? A(0x1p110) : A(0x1p50f);
  constexpr A kLargest = std::numeric_limits<A>::max();
  const bool finite_full = is_finite(full), finite_forget = is_finite(forget), finite = finite_full & finite_forget;
  const A scale = forget < kTiny ? kBoost : A(1);
  const A scaled = full * scale < kLargest ? full * scale : kLargest;
  return {finite ? scaled : A(0), finite ? forget * scale : A(-1)};
}

template <class A>
UNLEARN_HD bool exceeds(A alpha, const Comparable<A>& pair) {
#if !defined(__CUDA_ARCH__) && !defined(__FMA__) && !defined(__aarch64__)
  // Without the instruction: a double holds the product of two floats.
  if constexpr (std::is_same_v<A, float>)
    return static_cast<double>(pair.forget) > static_cast<double>(alpha) * static_cast<double>(pair.full);
#endif
  return fused_multiply_add(-alpha, pair.full, pair.forget) > A(0);
}

template <class A>
struct Dampening {
  A alpha, lambda, exponent, beta_min, beta_max;
};

template <class A, bool kPower>
struct SelectiveDampen {
  using acc_type = A;
  static constexpr int writes = 1;
  Dampening<A> constants;

  // False where theta keeps its bits.
  UNLEARN_HD bool operator()(A& theta, A full, A forget) const {
    const bool selected = exceeds(constants.alpha, comparable(full, forget));
    // The quotient is only read where forget > alpha * full >= 0; a divisor of 1 elsewhere keeps it finite.
    A beta = constants.lambda * full / (selected ? forget : A(1));
    if constexpr (kPower) beta = std::pow(beta, constants.exponent);
    beta = beta < constants.beta_max ? beta : constants.beta_max;
    beta = beta > constants.beta_min ? beta : constants.beta_min;
    theta *= beta;
    return selected;
  }
};

// slices: params of `dtype`, importance_full, importance_forget (float, or double with double parameters).
template <Backend B>
int selective_dampen(DType dtype, const Slice<3>* slices, int64_t count, const Dampening<double>& constants,
                     const Exec& exec);

}  // namespace unlearn_ext
