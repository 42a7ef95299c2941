// Optimizer steps and gradients restricted to a mask: scalars whose bit is clear, and their state, keep their bits.
#pragma once

#include "core/lists.h"

namespace unlearn_ext {

// torch.optim.SGD (Sutskever et al., ICML 2013):
//   g <- +-g + weight_decay * p;  b <- momentum * b + (1 - dampening) * g;  g <- nesterov ? g + momentum * b : b
//   p <- p - lr * g
struct SgdConstants {
  double lr, momentum, dampening, weight_decay;
  bool nesterov, maximize;
};

template <class A, bool kMomentum>
struct MaskedSgd {
  using acc_type = A;
  static constexpr int writes = kMomentum ? 2 : 1;
  A lr, momentum, rest, weight_decay;  // rest = 1 - dampening
  A nesterov;                          // 0 or 1: GCC has no vector form of a choice by a bool that does not vary
  A sign;

  UNLEARN_HD explicit MaskedSgd(const SgdConstants& c)
      : lr(static_cast<A>(c.lr)),
        momentum(static_cast<A>(c.momentum)),
        rest(static_cast<A>(1 - c.dampening)),
        weight_decay(static_cast<A>(c.weight_decay)),
        nesterov(c.nesterov ? A(1) : A(0)),
        sign(c.maximize ? A(-1) : A(1)) {}

  UNLEARN_HD void operator()(A& param, A& buffer, A grad) const {
    const A g = decayed(param, grad);
    buffer = multiply_add(rest, g, momentum * buffer);
    param = multiply_add(-lr, nesterov != A(0) ? multiply_add(momentum, buffer, g) : buffer, param);
  }
  UNLEARN_HD void operator()(A& param, A grad) const { param = multiply_add(-lr, decayed(param, grad), param); }

 private:
  // No decay leaves the gradient alone even where the parameter is infinite.
  UNLEARN_HD A decayed(A param, A grad) const {
    const A g = sign * grad;
    return weight_decay == A(0) ? g : multiply_add(weight_decay, param, g);
  }
};

// slices: params of `dtype`, momentum_buffers (float or double), grads of `dtype`, mask bits.
template <Backend B>
int masked_sgd(DType dtype, const Slice<4>* slices, int64_t count, const SgdConstants& constants, const Exec& exec);

// The same without momentum; slices: params, grads, mask bits.
template <Backend B>
int masked_sgd(DType dtype, const Slice<3>* slices, int64_t count, const SgdConstants& constants, const Exec& exec);

// torch.optim.AdamW (Loshchilov & Hutter, ICLR 2019):
//   p <- p - lr * weight_decay * p;  m <- m + (1 - beta1) * (g - m);  v <- beta2 * v + (1 - beta2) * g^2
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
struct AdamwConstants {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// What depends on the step t: computed on the host, or on the device where t lives there.
struct AdamwCorrections {
  double step_size;   // lr / (1 - beta1^t)
  double root_scale;  // sqrt(1 - beta2^t)
};

UNLEARN_HD AdamwCorrections adamw_corrections(const AdamwConstants& c, double step) {
  return {c.lr / (1 - pow(c.beta1, step)), sqrt(1 - pow(c.beta2, step))};
}

template <class A>
struct MaskedAdamw {
  using acc_type = A;
  static constexpr int writes = 3;
  A kept, rest1, beta2, rest2, eps, sign;  // kept = 1 - lr * weight_decay, rest = 1 - beta
  A step_size, root_scale;
  const AdamwCorrections* corrections;  // on the device, or null

  UNLEARN_HD MaskedAdamw(const AdamwConstants& c, const AdamwCorrections& host, const AdamwCorrections* device)
      : kept(static_cast<A>(1 - c.lr * c.weight_decay)),
        rest1(static_cast<A>(1 - c.beta1)),
        beta2(static_cast<A>(c.beta2)),
        rest2(static_cast<A>(1 - c.beta2)),
        eps(static_cast<A>(c.eps)),
        sign(c.maximize ? A(-1) : A(1)),
        step_size(static_cast<A>(host.step_size)),
        root_scale(static_cast<A>(host.root_scale)),
        corrections(device) {}

  UNLEARN_HD void load_constants() {
    if (corrections == nullptr) return;
    step_size = static_cast<A>(corrections->step_size);
    root_scale = static_cast<A>(corrections->root_scale);
  }

  UNLEARN_HD void operator()(A& param, A& average, A& square, A grad) const {
    const A g = sign * grad;
    // As torch.lerp: from the nearer end, exact for beta1 = 0.
    average = rest1 < A(0.5) ? multiply_add(rest1, g - average, average) : multiply_add(rest1 - A(1), g - average, g);
    square = multiply_add(rest2 * g, g, beta2 * square);
    param = multiply_add(-step_size, average / (square_root(square) / root_scale + eps), param * kept);
  }
};

// slices: params of `dtype`, exp_avgs and exp_avg_sqs (float or double), grads of `dtype`, mask bits.
// With device_step (one float or double of `step_dtype` on the device) the corrections are computed there into
// `scratch`; otherwise from `step`.
template <Backend B>
int masked_adamw(DType dtype, const Slice<5>* slices, int64_t count, const AdamwConstants& constants, double step,
                 const void* device_step, DType step_dtype, AdamwCorrections* scratch, const Exec& exec);

// Masked gradient: g <- m * g as a selection, so that a masked-out NaN becomes 0 too.
template <class A>
struct ClearMasked {
  using acc_type = A;
  static constexpr int writes = 1;
  static constexpr bool on_cleared = true, overwrites = true;
  UNLEARN_HD void operator()(A& grad) const { grad = A(0); }
};

// slices: grads of `dtype`, mask bits.
template <Backend B>
int apply_mask(DType dtype, const Slice<2>* slices, int64_t count, const Exec& exec);

}  // namespace unlearn_ext
