#include "kernels/dampen.h"

#include "core/apply.h"

namespace unlearn_ext {

template <>
int selective_dampen<kBackend>(DType dtype, const Slice<3>* slices, int64_t count, const Dampening<double>& constants,
                               const Exec& exec) {
  return visit(dtype, [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    const Dampening<A> c{static_cast<A>(constants.alpha), static_cast<A>(constants.lambda),
                         static_cast<A>(constants.exponent), static_cast<A>(constants.beta_min),
                         static_cast<A>(constants.beta_max)};
    return c.exponent == A(1) ? apply<Row<T, A, A>>(SelectiveDampen<A, false>{c}, slices, count, exec)
                              : apply<Row<T, A, A>>(SelectiveDampen<A, true>{c}, slices, count, exec);
  });
}

}  // namespace unlearn_ext
