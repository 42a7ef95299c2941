// What every kernel of the Fisher products is told, and where columns and positions lie. Included by fisher_weight.cu
// only.
#pragma once

#include "kernels/fisher_loaders.cuh"
#include "kernels/fisher_plan.h"

namespace unlearn_ext {
namespace {

struct Task {
  LayerProduct layer;
  int samples, positions, outputs, columns;  // of the layer, the last two per group
  Divisor padded;                            // positions up to the end of the last step
  Divisor across, down;                      // positions along the last axis and the one before
  int run;                                   // samples of one block
  int tiles_m, tiles_n;
  int lane_groups, group_blocks;  // of the narrow kernel: groups side by side in a warp, warps for all of them
  bool channels_first;            // columns of a tile run over channels, then taps: the order of channels_last memory
  bool add;                       // to F; otherwise partial sums are stored, their columns in the order of the tiles
  bool chunks;                    // of F or of partial sums are aligned, and whole in every row
  Access grads, inputs;
};

// The column of F that column j of the tiles is.
__device__ __forceinline__ int64_t column_of_weight(const Task& task, int64_t j) {
  const Patches& p = task.layer.inputs;
  return task.channels_first ? j % p.channels * p.window() + j / p.channels : j;
}

template <class T>
__device__ __forceinline__ Column column_of(const Task& task, int64_t j) {
  if (j >= task.columns) return {0, {kNoColumn, 0, 0}, 0};
  const Patches& p = task.layer.inputs;
  const int64_t to = column_of_weight(task, j);
  int64_t offset = p.channel_of(to) * p.channel_stride;
  Column column{0, {}, static_cast<int>(task.add ? to : j)};
#pragma unroll
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    const int64_t shift = p.tap(axis, to) * p.dilation[axis];
    offset += shift * p.space_stride[axis];
    column.shift[axis] = static_cast<uint32_t>(shift);
  }
  column.offset = offset * static_cast<int64_t>(sizeof(T));
  return column;
}

template <class T>
__device__ __forceinline__ Position position_of(const Task& task, int sample, uint32_t t) {
  const Patches& p = task.layer.inputs;
  const Positions& g = task.layer.grads;
  const uint32_t line = task.across.quotient(t), plane = task.down.quotient(line);
  const uint32_t at[] = {plane, line - plane * task.down.value, t - line * task.across.value};
  int64_t grads = sample * g.sample_stride, inputs = sample * p.sample_stride;
  Position row{0, 1, {}, 0};
#pragma unroll
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    const int source =
        static_cast<int>(at[axis]) * static_cast<int>(p.stride[axis]) - static_cast<int>(p.padding[axis]);
    grads += at[axis] * g.space_stride[axis];
    inputs += source * p.space_stride[axis];
    row.at[axis] = static_cast<uint32_t>(source);
  }
  row.grads = grads * static_cast<int64_t>(sizeof(T)), row.inputs = inputs * static_cast<int64_t>(sizeof(T));
  return row;
}

}  // namespace
}  // namespace unlearn_ext
