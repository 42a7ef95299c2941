// Selective dampening (Foster, Schoepf & Brintrup, AAAI 2024):
//   theta <- clamp((lambda * full / forget)^exponent, beta_min, beta_max) * theta   where  forget > alpha * full
#pragma once

#include <cmath>

#include "core/lists.h"

namespace unlearn_ext {

// forget > alpha * full, decided exactly: the product is never rounded, so every CPU and GPU selects alike.
// A fused multiply-add rounds once, which keeps the sign of alpha * full - forget unless the difference underflows;
// tiny values are therefore scaled up first. (kTiny leaves room for the digits of the product above the smallest
// number; a `full` so large that it overflows then is too large to be exceeded.) Without the instruction a float pair
// is compared in double, which holds the product of two floats. Non-finite importances select nothing.
template <class A>
UNLEARN_HD bool selects(A alpha, A full, A forget) {
  const bool finite = is_finite(full) & is_finite(forget);
#if !defined(__CUDA_ARCH__) && !defined(__FMA__) && !defined(__aarch64__)
  if constexpr (std::is_same_v<A, float>)
    return finite & (static_cast<double>(forget) > static_cast<double>(alpha) * static_cast<double>(full));
#endif
  constexpr A kTiny = std::is_same_v<A, double> ? A(0x1p-950) : A(0x1p-100f);
  constexpr A kBoost = std::is_same_v<A, double> ? A(0x1p110) : A(0x1p50f);
  const A scale = forget < kTiny ? kBoost : A(1);
  const A excess = fused_multiply_add(-alpha, full * scale, forget * scale);
  return finite & ((excess > A(0)) | ((alpha == A(0)) & (forget > A(0))));
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
    const bool selected = selects(constants.alpha, full, forget);
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
