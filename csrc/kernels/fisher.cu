#include "kernels/fisher.h"

#include "core/apply.h"

namespace unlearn_ext {

template <>
int fisher_accumulate<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, double weight, double decay,
                                int power, const Exec& exec) {
  return visit(dtype, [&]<class G>(Tag<G>) {
    using A = acc_t<G>;
    const A w = static_cast<A>(weight), d = static_cast<A>(decay);
    return power == 2 ? apply<Row<A, G>>(FisherAccumulate<A, 2>{w, d}, slices, count, exec)
                      : apply<Row<A, G>>(FisherAccumulate<A, 1>{w, d}, slices, count, exec);
  });
}

}  // namespace unlearn_ext
