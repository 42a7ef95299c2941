// A task owns a block of F, outputs x columns, and goes through the samples: panels of the gradients and of the inputs
// are packed for a stretch of positions, multiplied tile by tile, and each sample's product is squared into running
// totals that stay in the cache until the task ends. The products are those of vector registers
// (fisher_registers_cpu.h; of pairs of bfloat16: fisher_dots_cpu.h) or of the CPU's matrix unit
// (fisher_matrix_unit_cpu.h); convolutions of tiny groups take another way: see fisher_grouped_cpu.h.
//
// Flops: 2 N T O I, those of the plain weight gradient. Packing moves an input once per Cut::rows outputs, a gradient
// once per Cut::cells / Cut::rows columns, and F once.
#include "core/apply_cpu.h"
#include "core/shuffled.h"
#include "kernels/fisher_dots_cpu.h"
#include "kernels/fisher_grouped_cpu.h"
#include "kernels/fisher_matrix_unit_cpu.h"
#include "kernels/fisher_registers_cpu.h"

namespace unlearn_ext {
namespace {

template <class Way>
void accumulate(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  using A = typename Way::A;
  const int64_t runs = runs_of(layer);
  const Plan plan = Way::plan(layer, runs, exec);
  const Patches& p = layer.inputs;
  const int64_t blocks = plan.blocks(layer), outputs = layer.outputs();
  const int64_t scalars = layer.grads.channels * p.columns();
  const Shuffled order(std::max<int64_t>(1, blocks * runs));
  parallel_for(exec, blocks * runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = order[i], run = task / blocks, block = task % blocks;
      const int64_t group = block / (plan.row_blocks * plan.channel_blocks);
      const int64_t row = block / plan.channel_blocks % plan.row_blocks * plan.rows;
      const int64_t channel = block % plan.channel_blocks * plan.channels;
      Way work(layer, plan, group, group * outputs + row, std::min(plan.rows, outputs - row), channel,
               std::min(plan.channels, p.channels - channel));
      const PanelMemory memory(work.bytes());
      const bool whole = runs == 1;
      work.run(p.samples * run / runs, p.samples * (run + 1) / runs, memory,
               whole ? static_cast<A>(layer.weight) : A(1), whole,
               whole ? static_cast<A*>(fisher) : static_cast<A*>(partial) + run * scalars);
    }
  });
  if (runs == 1) return;
  parallel_for(exec, scalars, kGrain, [&](int64_t begin, int64_t end) {
    A* to = static_cast<A*>(fisher);
    const A* from = static_cast<const A*>(partial);
    for (int64_t i = begin; i < end; ++i) {
      A sum = from[i];
      for (int64_t run = 1; run < runs; ++run) sum += from[run * scalars + i];
      to[i] += static_cast<A>(layer.weight) * sum;
    }
  });
}

}  // namespace

template <>
int64_t fisher_weight_partials<kBackend>(const LayerProduct& layer) {
  const int64_t runs = has_tiny_groups(layer) ? 1 : runs_of(layer);
  return runs > 1 ? runs : 0;
}

template <>
int fisher_weight<kBackend>(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  if (layer.inputs.rows() == 0 || layer.grads.channels == 0 || layer.inputs.columns() == 0) return 0;
  visit(layer.inputs.dtype, [&]<class T>(Tag<T>) {
    if (has_tiny_groups(layer)) return accumulate_groups<T>(layer, fisher, exec);
#if defined(UNLEARN_MATRIX_UNIT)
    if constexpr (!std::is_same_v<T, double>)
      if (exec.matrix_unit && suits_pairs<T>(layer))
        return accumulate<PairsBlock<T, MatrixUnitProducts<T>>>(layer, fisher, partial, exec);
    if constexpr (std::is_same_v<T, BFloat16>)
      if (exec.bf16_dots && suits_pairs<T>(layer))
        return accumulate<PairsBlock<T, DotProducts>>(layer, fisher, partial, exec);
#endif
    if (layer.power == 1)
      accumulate<RegisterBlock<1, T>>(layer, fisher, partial, exec);
    else
      accumulate<RegisterBlock<2, T>>(layer, fisher, partial, exec);
  });
  return 0;
}

}  // namespace unlearn_ext
