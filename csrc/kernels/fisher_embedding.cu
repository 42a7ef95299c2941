#include <algorithm>

#include "kernels/fisher_layers.h"
#include "kernels/fisher_positions.cuh"

namespace unlearn_ext {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int64_t kLong = 64;  // lookups of an index from which a whole block shares them
constexpr int kInFlight = 4;   // rows of the gradients a warp loads at once

struct Task {
  Positions grads;
  Axes axes;
  const int64_t *indices, *order;
  int64_t lookups, rows, padding;
  int power;
};

// Sum over the samples among sorted lookups [begin, end), all of one index and with all lookups of a sample or none, of
// the powers of their sums; for the lane's channels.
template <class T, bool kVectors>
__device__ __forceinline__ void add_run(const Task& task, int64_t begin, int64_t end, int64_t channel,
                                        acc_t<T> (&total)[kChunk<T>]) {
  using A = acc_t<T>;
  constexpr int V = kChunk<T>;
  const uint32_t positions = static_cast<uint32_t>(task.axes.positions);
  const int64_t left = task.grads.channels - channel;
  const T* data = static_cast<const T*>(task.grads.data) + channel * task.grads.channel_stride;
  uint32_t sample = 0;
  A sum[V] = {};
  for (int64_t i = begin; i < end; i += kInFlight) {
    uint32_t of[kInFlight];
    Chunk<T> row[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const uint32_t lookup = static_cast<uint32_t>(task.order[min(i + u, end - 1)]);
      of[u] = lookup / positions;
      const uint32_t position = lookup - of[u] * positions;
      const int64_t offset = kVectors ? position * task.axes.stride[kMaxSpatial - 1][0] : task.axes.offset(position, 0);
      const T* from = data + of[u] * task.grads.sample_stride + offset;
      row[u] = {};
      if constexpr (kVectors) {
        if (left > 0) row[u] = *reinterpret_cast<const Chunk<T>*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j)
          if (j < left) row[u].set(j, from[j * task.grads.channel_stride]);
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (i + u >= end) break;
      if (of[u] != sample) {
#pragma unroll
        for (int j = 0; j < V; ++j) total[j] += raised(sum[j], task.power), sum[j] = 0;
        sample = of[u];
      }
#pragma unroll
      for (int j = 0; j < V; ++j) sum[j] += static_cast<A>(row[u][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) total[j] += raised(sum[j], task.power);
}

// The first of sorted[begin, end) that is at least `value`.
__device__ __forceinline__ int64_t lower_bound(const int64_t* sorted, int64_t begin, int64_t end, int64_t value) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (sorted[middle] < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// A warp for every sorted lookup, which owns the row of F if it is the first of its index; lanes along the channels. A
// frequent index is shared by the warps of the block, whole samples to each: one sample's lookups of one index are read
// by one warp, which bounds the speed only where nearly all lookups of a very long sample are the same. Reads every
// gradient once: bound by memory.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    embedding_kernel(const __grid_constant__ Task task, acc_t<T> weight, acc_t<T>* fisher) {
  using A = acc_t<T>;
  constexpr int V = kChunk<T>;
  SIMT_SHARED(int64_t, shared_run, [kWarps]);
  SIMT_SHARED(A, totals, [kWarps][32 * V]);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t channel = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * V;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const auto add = [&](int64_t index, const A(&total)[V]) {
    A* row = fisher + index * task.grads.channels + channel;
#pragma unroll
    for (int j = 0; j < V; ++j)
      if (channel + j < task.grads.channels) row[j] = fused_multiply_add(weight, total[j], row[j]);
  };

  const int64_t index = own < task.lookups ? task.indices[own] : -1;
  const bool head =
      index >= 0 && index < task.rows && index != task.padding && (own == 0 || task.indices[own - 1] != index);
  const bool is_long = head && own + kLong < task.lookups && task.indices[own + kLong] == index;
  if (lane == 0) shared_run[warp] = is_long ? own : -1;
  if (head && !is_long) {
    int64_t end = own + 1;
    for (int64_t at = own + 1 + lane; at < own + 1 + kLong; at += 32)
      end += __popc(__ballot_sync(0xffffffffu, at < task.lookups && task.indices[at] == index));
    A total[V] = {};
    add_run<T, kVectors>(task, own, end, channel, total);
    add(index, total);
  }
  __syncthreads();
  // The lookups of the block hold the head of at most one such run.
  static_assert(kLong >= kWarps);
  int64_t begin = -1;
  for (int other = 0; other < kWarps; ++other) begin = max(begin, shared_run[other]);
  if (begin < 0) return;
  const int64_t shared_index = task.indices[begin];
  const int64_t end = lower_bound(task.indices, begin + kLong, task.lookups, shared_index + 1);
  // A share ends where a sample does.
  const auto border = [&](int share) {
    const int64_t at = begin + (end - begin) * share / kWarps;
    if (share == 0 || share == kWarps) return at;
    return lower_bound(task.order, at, end, (task.order[at - 1] / task.axes.positions + 1) * task.axes.positions);
  };
  A total[V] = {};
  add_run<T, kVectors>(task, border(warp), border(warp + 1), channel, total);
#pragma unroll
  for (int j = 0; j < V; ++j) totals[warp][lane * V + j] = total[j];
  __syncthreads();
  if (warp > 0) return;
  for (int other = 1; other < kWarps; ++other)
#pragma unroll
    for (int j = 0; j < V; ++j) total[j] += totals[other][lane * V + j];
  add(shared_index, total);
}

}  // namespace

template <>
int fisher_embedding<kBackend>(const Positions& grads, const int64_t* indices, const int64_t* order, int64_t rows,
                               int64_t padding, double weight, int power, void* fisher, const Exec& exec) {
  const int64_t lookups = grads.samples * grads.positions();
  if (lookups == 0 || grads.channels == 0) return cudaSuccess;
  const Task task{grads, Axes(grads, grads), indices, order, lookups, rows, padding, power};
  return visit(grads.dtype, [&]<class T>(Tag<T>) -> cudaError_t {
    constexpr int64_t kWidth = 32 * kChunk<T>;
    const int64_t across = (grads.channels + kWidth - 1) / kWidth;
    if (lookups > INT32_MAX || across > 65535) return cudaErrorInvalidValue;
    const auto launch = [&](auto kernel) {
      return simt::launch(kernel,
                          dim3(static_cast<unsigned>((lookups + kWarps - 1) / kWarps), static_cast<unsigned>(across)),
                          dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream), task,
                          static_cast<acc_t<T>>(weight), static_cast<acc_t<T>*>(fisher));
    };
    return task.axes.single() && chunks_of_channels(grads, kChunk<T>) ? launch(embedding_kernel<T, true>)
                                                                      : launch(embedding_kernel<T, false>);
  });
}

}  // namespace unlearn_ext
