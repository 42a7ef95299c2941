// Every row of F belongs to the thread that meets the first of its lookups; it adds up the lookups of each sample.
#include <vector>

#include "core/apply_cpu.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

template <class T>
void accumulate(const Positions& grads, const int64_t* indices, const int64_t* order, int64_t rows, int64_t padding,
                double weight, int power, void* fisher, const Exec& exec) {
  using A = acc_t<T>;
  const int64_t positions = grads.positions(), width = grads.channels, lookups = grads.samples * positions;
  const auto row_of = [&](int64_t lookup) {
    const int64_t t = lookup % positions;
    return static_cast<const T*>(grads.data) + lookup / positions * grads.sample_stride +
           t / grads.extent[2] / grads.extent[1] * grads.space_stride[0] +
           t / grads.extent[2] % grads.extent[1] * grads.space_stride[1] + t % grads.extent[2] * grads.space_stride[2];
  };
  parallel_for(exec, lookups, std::max<int64_t>(1, kGrain / 16 / std::max<int64_t>(1, width)),
               [&](int64_t begin, int64_t end) {
                 std::vector<A> sum(static_cast<size_t>(width)), total(static_cast<size_t>(width));
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t index = indices[i];
                   if ((i > 0 && indices[i - 1] == index) || index == padding || index < 0 || index >= rows) continue;
                   std::fill(total.begin(), total.end(), A(0));
                   for (int64_t j = i; j < lookups && indices[j] == index;) {
                     const int64_t sample = order[j] / positions;
                     std::fill(sum.begin(), sum.end(), A(0));
                     for (; j < lookups && indices[j] == index && order[j] / positions == sample; ++j) {
                       const T* row = row_of(order[j]);
                       if (grads.channel_stride == 1)
                         for (int64_t c = 0; c < width; ++c) sum[static_cast<size_t>(c)] += A(row[c]);
                       else
                         for (int64_t c = 0; c < width; ++c)
                           sum[static_cast<size_t>(c)] += A(row[c * grads.channel_stride]);
                     }
                     for (int64_t c = 0; c < width; ++c)
                       total[static_cast<size_t>(c)] += raised(sum[static_cast<size_t>(c)], power);
                   }
                   A* to = static_cast<A*>(fisher) + index * width;
                   for (int64_t c = 0; c < width; ++c) to[c] += static_cast<A>(weight) * total[static_cast<size_t>(c)];
                 }
               });
}

}  // namespace

template <>
int fisher_embedding<kBackend>(const Positions& grads, const int64_t* indices, const int64_t* order, int64_t rows,
                               int64_t padding, double weight, int power, void* fisher, const Exec& exec) {
  visit(grads.dtype,
        [&]<class T>(Tag<T>) { accumulate<T>(grads, indices, order, rows, padding, weight, power, fisher, exec); });
  return 0;
}

}  // namespace unlearn_ext
