// Fisher-diagonal accumulation from gradients:  F <- decay * F + weight * |g|^power,  power 1 or 2.
#pragma once

#include "core/lists.h"

namespace unlearn_ext {

template <class A, int kPower>
struct FisherAccumulate {
  using acc_type = A;
  static constexpr int writes = 1;
  A weight, decay;

  UNLEARN_HD void operator()(A& fisher, A grad) const { fisher = decay * fisher + weight * raised<kPower>(grad); }
};

// slices: fisher (float, or double with double gradients), grads of `dtype`.
template <Backend B>
int fisher_accumulate(DType dtype, const Slice<2>* slices, int64_t count, double weight, double decay, int power,
                      const Exec& exec);

}  // namespace unlearn_ext
