// Fisher products of few outputs per group on a GPU. Included by fisher_weight.cu only.
#pragma once

#include "kernels/fisher_task.cuh"

namespace unlearn_ext {
namespace {

// A warp owns up to kOutputs x 9 elements of each of its groups: 8 neighbouring ones where channels lie side by
// side, so that lanes share the 32 bytes a load brings, and one otherwise, with all lanes along the positions. The taps
// of a position meet in the first-level cache. An input is found and loaded once per tap, about a dozen instructions
// for kOutputs multiplications, and these are what limits: an estimated 2 Tflop/s on an H100 for one output per group,
// 7 for four, where all but a few per cent of a tile's multiplications would be with zeros.
template <class T, int kOutputs>
__global__ void __launch_bounds__(32 * kNarrowWarps, 2)
    narrow_kernel(const __grid_constant__ Task task, acc_t<T> weight, acc_t<T>* out) {
  using A = acc_t<T>;
  SIMT_SHARED(Column, columns, [kNarrowColumns]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, lane_groups = task.lane_groups;
  const int64_t first_n = static_cast<int64_t>(blockIdx.x % static_cast<unsigned>(task.tiles_n)) * kNarrowColumns;
  if (thread < kNarrowColumns) columns[thread] = column_of<T>(task, first_n + thread);
  __syncthreads();
  // The warps of a block have the columns in common and differ in the outputs, the groups or the samples.
  int64_t rest = static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(task.tiles_n)) * kNarrowWarps + thread / 32;
  const int64_t first_m = rest % task.tiles_m * kOutputs;
  rest /= task.tiles_m;
  const int64_t group = rest % task.group_blocks * lane_groups + lane % lane_groups;
  const int64_t split = rest / task.group_blocks, first = split * task.run;
  const int64_t last = min(int64_t{task.samples}, first + task.run);
  if (first >= last) return;
  const int outputs = group < task.layer.groups ? static_cast<int>(min(task.outputs - first_m, int64_t{kOutputs})) : 0;

  const Patches& p = task.layer.inputs;
  const Grads<T> grads{
      static_cast<const T*>(task.layer.grads.data) + (group * task.outputs + first_m) * task.layer.grads.channel_stride,
      task.layer.grads.channel_stride, outputs};
  const Inputs<T> inputs{
      static_cast<const T*>(p.data) + group * task.layer.group_stride,
      columns,
      {static_cast<uint32_t>(p.in[0]), static_cast<uint32_t>(p.in[1]), static_cast<uint32_t>(p.in[2])}};
  A total[kOutputs][kNarrowColumns] = {};
  for (int sample = static_cast<int>(first); sample < last; ++sample) {
    A product[kOutputs][kNarrowColumns] = {};
    for (int t = outputs > 0 ? lane / lane_groups : task.positions; t < task.positions; t += 32 / lane_groups) {
      const Position row = position_of<T>(task, sample, static_cast<uint32_t>(t));
      const void* from;
      A g[kOutputs];
#pragma unroll
      for (int o = 0; o < kOutputs; ++o)
        g[o] = grads.column(o).find(row, from) ? static_cast<A>(*static_cast<const T*>(from)) : A(0);
#pragma unroll
      for (int j = 0; j < kNarrowColumns; ++j) {
        const A a = inputs.column(j).find(row, from) ? static_cast<A>(*static_cast<const T*>(from)) : A(0);
#pragma unroll
        for (int o = 0; o < kOutputs; ++o) product[o][j] = fused_multiply_add(g[o], a, product[o][j]);
      }
    }
#pragma unroll
    for (int o = 0; o < kOutputs; ++o)
#pragma unroll
      for (int j = 0; j < kNarrowColumns; ++j) {
        A sum = product[o][j];
        for (int step = 16; step >= lane_groups; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        total[o][j] += raised(sum, task.layer.power);
      }
  }
  if (lane >= lane_groups) return;
  A* to = out + ((split * task.layer.groups + group) * task.outputs + first_m) * task.columns;
#pragma unroll
  for (int o = 0; o < kOutputs; ++o)
#pragma unroll
    for (int j = 0; j < kNarrowColumns; ++j)
      if (o < outputs && first_n + j < task.columns) {
        A& f = to[o * task.columns + columns[j].to];
        f = task.add ? fused_multiply_add(weight, total[o][j], f) : total[o][j];
      }
}

}  // namespace
}  // namespace unlearn_ext
