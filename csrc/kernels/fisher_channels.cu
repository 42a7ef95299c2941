#include <algorithm>

#include "kernels/fisher_layers.h"
#include "kernels/fisher_positions.cuh"

namespace unlearn_ext {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr unsigned kFull = 0xffffffffu;

struct Task {
  Positions grads, normalized;
  Axes axes;
  bool has_normalized;
  bool along_positions;  // a chunk is of neighbouring positions of a channel, not of neighbouring channels
  int lanes;             // threads along the channels of a block: 2 chunks are the 32 bytes that memory is read in
  int team;              // threads along the positions of a sample, a power of two
  int power;
  int64_t run;  // samples of a block
  bool add;     // to F; otherwise the sums of every run are stored
};

// A block owns a channel, or 32 bytes of neighbouring ones, and walks a run of samples, all of them where there are
// channels for all multiprocessors: as many at once as there are teams of threads for. A team's sums meet by shuffles
// and, if it is larger than a warp, in shared memory; those of the samples at the end, as a tree. Reads everything once
// and computes next to nothing: bound by memory.
template <class T, bool kVectors>
__global__ void __launch_bounds__(kThreads, 1)
    channels_kernel(const __grid_constant__ Task task, acc_t<T> weight, acc_t<T>* out) {
  using A = acc_t<T>;
  constexpr int V = kChunk<T>, kInFlight = kVectors ? 4 : 1;  // chunks of either tensor loaded at once
  SIMT_SHARED(A, parts, [2][kWarps][2 * V]);
  SIMT_SHARED(A, totals, [kThreads * V]);
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % task.lanes, row = thread / task.lanes, rows = kThreads / task.lanes;
  const int slot = row / task.team, slots = rows / task.team, member = row % task.team;
  const int width = task.along_positions ? 1 : task.lanes * V;  // channels of the block
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * width + (task.along_positions ? 0 : lane * V);
  const int64_t steps = task.along_positions ? (task.axes.positions + V - 1) / V : task.axes.positions;

  // A chunk of a sample, zero where there is nothing.
  const auto read = [&](const Positions& tensor, int which, int64_t sample, int64_t step) {
    const T* data =
        static_cast<const T*>(tensor.data) + sample * tensor.sample_stride + channel * tensor.channel_stride;
    Chunk<T> chunk = {};
    if constexpr (kVectors) {
      const int64_t offset = task.along_positions ? step * V : step * task.axes.stride[kMaxSpatial - 1][which];
      if (step < steps) chunk = *reinterpret_cast<const Chunk<T>*>(data + offset);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const int64_t position = task.along_positions ? step * V + i : step;
        const int64_t beside = task.along_positions ? 0 : i;
        if (position < task.axes.positions && channel + beside < tensor.channels)
          chunk.set(i, data[task.axes.offset(static_cast<uint32_t>(position), which) + beside * tensor.channel_stride]);
      }
    }
    return chunk;
  };

  const int64_t begin = blockIdx.y * task.run, end = min(begin + task.run, task.grads.samples);
  A total[V] = {};
  int buffer = 0;
  for (int64_t first = begin; first < end; first += slots, buffer ^= 1) {
    const int64_t sample = first + slot;
    A sum[V] = {};
    if (sample < end && (!kVectors || channel < task.grads.channels)) {
      for (int64_t step = member; step < steps; step += kInFlight * task.team) {
        Chunk<T> g[kInFlight], x[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          g[u] = read(task.grads, 0, sample, step + u * task.team);
          if (task.has_normalized) x[u] = read(task.normalized, 1, sample, step + u * task.team);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u)
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const A value = static_cast<A>(g[u][i]);
            sum[i] = task.has_normalized ? fused_multiply_add(value, static_cast<A>(x[u][i]), sum[i]) : sum[i] + value;
          }
      }
    }
    if (task.along_positions) {
#pragma unroll
      for (int i = 1; i < V; ++i) sum[0] += sum[i], sum[i] = 0;
    }
    const int in_warp = min(task.team * task.lanes, 32);
    for (int step = task.lanes; step < in_warp; step *= 2)
#pragma unroll
      for (int i = 0; i < V; ++i) sum[i] += __shfl_xor_sync(kFull, sum[i], step);
    if (task.team * task.lanes > 32) {
      if (thread % 32 < task.lanes)
#pragma unroll
        for (int i = 0; i < V; ++i) parts[buffer][thread / 32][lane * V + i] = sum[i];
      __syncthreads();
      if (member == 0)
        for (int warp = 1; warp < task.team * task.lanes / 32; ++warp)
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] += parts[buffer][thread / 32 + warp][lane * V + i];
    }
#pragma unroll
    for (int i = 0; i < V; ++i) total[i] += raised(sum[i], task.power);
  }

  if (member == 0)
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < width) totals[slot * width + lane * V + i] = total[i];
  for (int half = slots / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int i = thread; i < half * width; i += kThreads) totals[i] += totals[i + half * width];
  }
  __syncthreads();
  const int64_t own = static_cast<int64_t>(blockIdx.x) * width + thread;
  if (thread >= width || own >= task.grads.channels) return;
  A& to = out[blockIdx.y * task.grads.channels + own];
  to = task.add ? fused_multiply_add(weight, totals[thread], to) : totals[thread];
}

int64_t power_of_two_from(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

int64_t lanes_of(DType dtype) {
  return visit(dtype, []<class T>(Tag<T>) -> int64_t { return kChunk<T>; });
}

// What depends on shapes, strides and types alone; `run` is filled in by runs_of().
Task task_of(const Positions& grads, const Positions* normalized, int power) {
  Task task{grads,
            normalized != nullptr ? *normalized : grads,
            Axes(grads, normalized != nullptr ? *normalized : grads),
            normalized != nullptr,
            false,
            2,
            1,
            power,
            grads.samples,
            true};
  task.along_positions =
      grads.channel_stride != 1 && task.axes.stride[kMaxSpatial - 1][0] < grads.channel_stride && grads.positions() > 1;
  task.lanes = task.along_positions ? 1 : 2;
  return task;
}

int64_t blocks_of(const Task& task) {
  const int64_t width = task.along_positions ? 1 : task.lanes * lanes_of(task.grads.dtype);
  return (task.grads.channels + width - 1) / width;
}

// Runs that the samples are split into where there are fewer channels than multiprocessors, and more to read than one
// of these reads while the kernel that adds up is started.
int64_t runs_of(const Task& task) {
  const Positions& g = task.grads;
  const int64_t chunk = task.along_positions ? 16 / lanes_of(g.dtype) : 32;  // bytes of a position
  const int64_t bytes = g.samples * g.positions() * chunk * (task.has_normalized ? 2 : 1);
  if (static_cast<double>(bytes) < kBytesPerClock * kLaunchClocks) return 1;
  const int64_t most = std::min(g.samples, std::max<int64_t>(1, static_cast<int64_t>(kProcessors) / blocks_of(task)));
  const int64_t run = (g.samples + most - 1) / most;
  return (g.samples + run - 1) / run;
}

bool is_empty(const Positions& p) { return p.samples == 0 || p.positions() == 0 || p.channels == 0; }

}  // namespace

template <>
int64_t fisher_channels_partials<kBackend>(const Positions& grads, const Positions* normalized) {
  return is_empty(grads) ? 1 : runs_of(task_of(grads, normalized, 2));
}

template <>
int fisher_channels<kBackend>(const Positions& grads, const Positions* normalized, double weight, int power,
                              void* fisher, void* partial, const Exec& exec) {
  const int64_t positions = grads.positions();
  if (is_empty(grads)) return cudaSuccess;
  Task task = task_of(grads, normalized, power);
  const int64_t runs = runs_of(task);
  task.run = (grads.samples + runs - 1) / runs;
  task.add = runs == 1;
  return visit(grads.dtype, [&]<class T>(Tag<T>) -> cudaError_t {
    using A = acc_t<T>;
    constexpr int64_t V = kChunk<T>;
    const auto chunks_of_positions = [&](const Positions& p) {
      return positions % V == 0 && p.sample_stride % V == 0 && p.channel_stride % V == 0 &&
             reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
    };
    const auto& along = task.axes.stride[kMaxSpatial - 1];
    const bool vectors =
        task.axes.single() &&
        (task.along_positions
             ? along[0] == 1 && along[1] == 1 && chunks_of_positions(grads) && chunks_of_positions(task.normalized)
             : chunks_of_channels(grads, V) && chunks_of_channels(task.normalized, V));
    // All threads busy with few samples; no more of them than a sample has chunks, and along positions at least a
    // line of memory.
    const int64_t rows = kThreads / task.lanes;
    const int64_t most = power_of_two_from(task.along_positions ? (positions + V - 1) / V : positions);
    const int64_t wanted =
        std::max<int64_t>(power_of_two_from((rows + task.run - 1) / task.run), task.along_positions ? 8 : 1);
    task.team = static_cast<int>(std::min({wanted, most, rows}));
    const int64_t blocks = blocks_of(task);
    if (blocks > INT32_MAX || positions > INT32_MAX) return cudaErrorInvalidValue;
    const auto launch = [&](auto kernel) {
      return simt::launch(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(runs)), dim3(kThreads), 0,
                          static_cast<cudaStream_t>(exec.stream), task, static_cast<A>(weight),
                          static_cast<A*>(task.add ? fisher : partial));
    };
    if (const cudaError_t error = vectors ? launch(channels_kernel<T, true>) : launch(channels_kernel<T, false>))
      return error;
    return task.add ? cudaSuccess
                    : add_partials<A>(static_cast<const A*>(partial), runs, grads.channels, weight,
                                      static_cast<A*>(fisher), exec);
  });
}

}  // namespace unlearn_ext
