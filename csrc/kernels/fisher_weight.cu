#include <algorithm>

#include "kernels/fisher_narrow.cuh"
#include "kernels/fisher_permute.cuh"
#include "kernels/fisher_plan.h"
#include "kernels/fisher_task.cuh"
#include "kernels/fisher_tiles.cuh"

namespace unlearn_ext {
namespace {

// ---- Tiles

// Adds a tile to F, or stores it among the partial sums: `to` is the place of its first element. In the order of the
// tile, whose columns lie side by side, 16 bytes at a time; many loads at once: waiting for each chunk of F in turn
// would take longer than the products. For whole warps.
template <class Tile, class A>
__device__ __forceinline__ void hand_over(const Tile& tile, const Task& task, A weight, A* to, int rows_left,
                                          int columns_left) {
  constexpr int kPer = kChunk<A>, kChunks = Tile::kBatch / kPer;
#pragma unroll
  for (int b = 0; b < Tile::kBatches; ++b) {
    Chunk<A> sum[kChunks], before[kChunks];
    A* address[kChunks];
    int left[kChunks];  // elements of the chunk, and those behind it, that the row has
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      int m, n;
      tile.chunk(b, i * kPer, m, n, sum[i]);
      left[i] = m < rows_left ? columns_left - n : 0;
      address[i] = to + static_cast<int64_t>(m) * task.columns + n;
      if (task.add && left[i] > 0) load_row(address[i], left[i], task.chunks, before[i]);
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (left[i] <= 0) continue;
      if (task.add) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) sum[i].set(j, fused_multiply_add(weight, sum[i][j], before[i][j]));
      }
      store_row(address[i], left[i], task.chunks, sum[i]);
    }
  }
}

// The tile of a block, and its run of samples.
struct Place {
  int64_t group, split, first_m, first_n;
  int rows, columns;  // that the tile has within F
  int first, last;    // samples
};

template <class Tile>
__device__ __forceinline__ Place place_of(const Task& task) {
  // Tiles that share the longer operand run side by side.
  const unsigned tiles = static_cast<unsigned>(task.tiles_m) * static_cast<unsigned>(task.tiles_n);
  const unsigned index = blockIdx.x % tiles, rest = blockIdx.x / tiles;
  const unsigned groups = static_cast<unsigned>(task.layer.groups), shorter = min(task.tiles_m, task.tiles_n);
  const int in_short = static_cast<int>(index % shorter), in_long = static_cast<int>(index / shorter);
  const bool m_is_short = task.tiles_m <= task.tiles_n;
  Place at;
  at.group = rest % groups, at.split = rest / groups;
  at.first_m = static_cast<int64_t>(m_is_short ? in_short : in_long) * Tile::kM;
  at.first_n = static_cast<int64_t>(m_is_short ? in_long : in_short) * Tile::kN;
  at.rows = static_cast<int>(min(task.outputs - at.first_m, int64_t{Tile::kM}));
  at.columns = static_cast<int>(min(task.columns - at.first_n, int64_t{Tile::kN}));
  at.first = static_cast<int>(at.split) * task.run, at.last = min(task.samples, at.first + task.run);
  return at;
}

// The rows of a block, one sample's positions after the other's: every thread describes one of a batch, which serves
// kSlabs slabs of kDepth rows. Two batches, so that one can be described while the other is read.
template <class Tile>
struct Rows {
  static constexpr int kSlabs = Tile::kThreads / Tile::kDepth;
  static_assert((kSlabs & (kSlabs - 1)) == 0);
  using Batches = Position[2][Tile::kThreads];
  const Task& task;
  Batches& batches;
  int sample, last;  // the thread's next row is position t of `sample`
  uint32_t t;

  __device__ __forceinline__ Rows(const Task& task_, Batches& batches_, const Place& at)
      : task(task_), batches(batches_), sample(at.first), last(at.last), t(threadIdx.x) {}

  __device__ __forceinline__ void describe(int batch) {
    const uint32_t samples = task.padded.quotient(t);
    sample += static_cast<int>(samples);
    t -= samples * task.padded.value;
    batches[batch & 1][threadIdx.x] = sample < last && t < static_cast<uint32_t>(task.positions)
                                          ? position_of<typename Tile::Element>(task, sample, t)
                                          : Position{0, 0, {kNoRow, 0, 0}, 0};
    t += Tile::kThreads;
  }
  // The batch that begins behind a slab, if one does.
  __device__ __forceinline__ void describe_after(int slab) {
    if ((slab + 1) % kSlabs == 0) describe((slab + 1) / kSlabs);
  }
  __device__ __forceinline__ const Position* of(int slab) const {
    return &batches[slab / kSlabs & 1][slab % kSlabs * Tile::kDepth];
  }
};

// Multiplies steps, and ends samples where their last position was in one.
template <class Tile>
struct Samples {
  Tile& tile;
  int power;
  int parts, left;  // of kPadding positions: that a sample has, and that the present one still lacks

  __device__ __forceinline__ Samples(Tile& tile_, const Task& task)
      : tile(tile_),
        power(task.layer.power),
        parts(static_cast<int>(task.padded.value) / Tile::kPadding),
        left(parts) {}

  // `meanwhile` is what to start before the products: in each branch once more, so that it can find its way between
  // the multiplications.
  template <class F>
  __device__ __forceinline__ void step(const typename Tile::Fragments& f, const F& meanwhile) {
    constexpr int kParts = Tile::kStep / Tile::kPadding;
    if constexpr (!Tile::kBySample) {
      meanwhile();
      tile.template multiply<simt::Part::whole, false>(f);
      return;
    }
    if (kParts == 2 && left == 1) {
      meanwhile();
      half<simt::Part::lower>(f);
      half<simt::Part::upper>(f);
    } else if (Tile::kStartsAnew && left == parts) {
      meanwhile();
      tile.template multiply<simt::Part::whole, true>(f);
      advance(kParts);
    } else {
      meanwhile();
      tile.template multiply<simt::Part::whole, false>(f);
      advance(kParts);
    }
  }

 private:
  template <simt::Part kPart>
  __device__ __forceinline__ void half(const typename Tile::Fragments& f) {
    if (left == parts)
      tile.template multiply<kPart, true>(f);
    else
      tile.template multiply<kPart, false>(f);
    advance(1);
  }
  __device__ __forceinline__ void advance(int by) {
    left -= by;
    if (left != 0) return;
    tile.end_sample(power);
    left = parts;
  }
};

// A block owns a tile of F, or of one run's partial sums, and walks the positions of its samples, each sample padded to
// whole steps, or to half ones. Flops: 2 N T O I. Bytes from device memory: the operands once, as blocks walk the
// samples side by side and find them in the L2 cache, and F twice. Bytes from there: all inputs for every row of tiles,
// all gradients for every column. That limits halves read in chunks; for exact floats it is the multiplications (128
// per clock of a multiprocessor), and for halves read one by one the instructions of the loader, about ten per element.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    tile_kernel(const __grid_constant__ Task task, typename Tile::Acc weight, typename Tile::Acc* out) {
  using T = typename Tile::Element;
  using S = typename Tile::Shared;
  using Fragments = typename Tile::Fragments;
  constexpr int kDepth = Tile::kDepth, kStages = Tile::kStages, kSteps = kDepth / Tile::kStep;
  static_assert(!Tile::kReadsAhead || kSteps == 2);
  constexpr int kInputs = Tile::GradsLayout::kPitch * kDepth, kStage = kInputs + Tile::InputsLayout::kPitch * kDepth;
  SIMT_DYN_SHARED(S, stages);
  SIMT_SHARED(Position, batches, [2][Tile::kThreads]);
  SIMT_SHARED(Column, columns, [Tile::kN]);

  const Place at = place_of<Tile>(task);
  for (int n = static_cast<int>(threadIdx.x); n < Tile::kN; n += Tile::kThreads)
    columns[n] = column_of<T>(task, at.first_n + n);
  Rows<Tile> rows(task, batches, at);
  rows.describe(0);
  __syncthreads();

  const Positions& g = task.layer.grads;
  const Patches& p = task.layer.inputs;
  typename Tile::template Load<Grads<T>, typename Tile::GradsLayout> load_grads(
      {static_cast<const T*>(g.data) + (at.group * task.outputs + at.first_m) * g.channel_stride, g.channel_stride,
       at.rows});
  typename Tile::template Load<Inputs<T>, typename Tile::InputsLayout> load_inputs(
      {static_cast<const T*>(p.data) + at.group * task.layer.group_stride,
       columns,
       {static_cast<uint32_t>(p.in[0]), static_cast<uint32_t>(p.in[1]), static_cast<uint32_t>(p.in[2])}});
  Tile tile;
  Samples<Tile> samples(tile, task);
  const bool idle = tile.idle(at.rows, at.columns);
  // Of the slabs behind the last one all rows are outside: zeros, which nobody reads.
  const int64_t depth = int64_t{at.last - at.first} * task.padded.value;
  const int slabs = static_cast<int>((depth + kDepth - 1) / kDepth);
  const int steps = idle ? 0 : static_cast<int>((depth + Tile::kStep - 1) / Tile::kStep);
  const auto fetch = [&](int slab, S* stage) {
    load_grads.fetch(rows.of(slab), stage, task.grads, task.layer.power);
    load_inputs.fetch(rows.of(slab), stage + kInputs, task.inputs, task.layer.power);
    simt::cp_async_commit();
  };
  const auto deposit = [&](S* stage) {
    load_grads.deposit(stage, task.grads);
    load_inputs.deposit(stage + kInputs, task.inputs);
  };
  const auto read = [&](const S* stage, int step, Fragments& to) {
    tile.read(stage, stage + kInputs, step * Tile::kStep, to);
  };

  for (int slab = 0; slab < kStages; ++slab) {
    fetch(slab, stages + slab * kStage);
    deposit(stages + slab * kStage);
    rows.describe_after(slab);
  }
  simt::cp_async_wait<kStages - 1>();
  __syncthreads();
  Fragments now, after;
  S *here = stages, *last_here = nullptr;  // the stages of this slab and of the one before
  if (Tile::kReadsAhead && steps > 0) read(here, 0, now);
  for (int slab = 0; slab < slabs; ++slab) {
    if constexpr (Tile::kReadsAhead) {
      if (2 * slab < steps) samples.step(now, [&] { read(here, 1, after); });
    } else {
#pragma unroll(kSteps > 2 ? 1 : kSteps)
      for (int step = 0; step < kSteps; ++step) {
        if (slab * kSteps + step >= steps) break;
        read(here, step, now);
        samples.step(now, [] {});
      }
    }
    if (slab > 0) deposit(last_here);
    simt::cp_async_wait<kStages - 2>();
    __syncthreads();
    S* next = here == stages + (kStages - 1) * kStage ? stages : here + kStage;
    const auto fetch_next = [&] { fetch(slab + kStages, here); };
    if (Tile::kReadsAhead && 2 * slab + 1 < steps)
      samples.step(after, [&] { read(next, 0, now), fetch_next(); });
    else
      fetch_next();
    rows.describe_after(slab + kStages);
    last_here = here, here = next;
  }
  simt::cp_async_wait<0>();

  if (idle) return;
  const int64_t row = (at.split * task.layer.groups + at.group) * task.outputs + at.first_m;
  hand_over(tile, task, weight, out + row * task.columns + at.first_n, at.rows, at.columns);
}

// ---- Launchers

// Every stride a chunk of `lanes` elements is reached by keeps it aligned.
Access access_of(int64_t lanes, const void* data, int64_t channels, int64_t channel_stride, int64_t sample_stride,
                 const int64_t (&space_stride)[kMaxSpatial], const int64_t (&extent)[kMaxSpatial],
                 int64_t group_stride) {
  Access access{channel_stride == 1 && channels % lanes == 0 && sample_stride % lanes == 0 &&
                    group_stride % lanes == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0,
                channel_stride != 1};
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    access.vectors = access.vectors && (extent[axis] == 1 || space_stride[axis] % lanes == 0);
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis)
    if (extent[axis] > 1) {
      access.along_positions = space_stride[axis] < channel_stride;
      break;
    }
  return access;
}

// Whether samples end within steps. Loaders that gather have no tile for that.
bool halves(const Task& task, const Plan& plan) { return plan.halves && task.grads.vectors && task.inputs.vectors; }

Task task_of(const LayerProduct& layer, const Plan& plan) {
  const Patches& p = layer.inputs;
  const Positions& g = layer.grads;
  Task task{};
  task.layer = layer;
  task.samples = static_cast<int>(p.samples), task.positions = static_cast<int>(p.positions());
  task.outputs = static_cast<int>(layer.outputs()), task.columns = static_cast<int>(p.columns());
  task.across = Divisor(p.out[2]), task.down = Divisor(p.out[1]);
  task.run = static_cast<int>((p.samples + plan.splits - 1) / plan.splits);
  task.tiles_m = (task.outputs + plan.m - 1) / plan.m, task.tiles_n = (task.columns + plan.n - 1) / plan.n;
  task.channels_first = p.channel_stride == 1;
  task.lane_groups = task.channels_first && layer.groups >= kNarrowGroups ? kNarrowGroups : 1;
  task.group_blocks = static_cast<int>((layer.groups + task.lane_groups - 1) / task.lane_groups);
  task.add = partials_of(layer, plan) == 0;
  const int64_t lanes = p.dtype == DType::f64 ? 2 : p.dtype == DType::f32 ? 4 : 8;
  task.grads =
      access_of(lanes, g.data, layer.outputs(), g.channel_stride, g.sample_stride, g.space_stride, g.extent, 0);
  // Padding moves the place of a row by its stride even where an axis has one image position.
  int64_t moves[kMaxSpatial];
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    moves[axis] = p.in[axis] > 1 || p.padding[axis] != 0 || p.kernel[axis] > 1 ? 2 : 1;
  task.inputs = access_of(lanes, p.data, p.channels, p.channel_stride, p.sample_stride, p.space_stride, moves,
                          layer.groups > 1 ? layer.group_stride : 0);
  const int64_t padding = plan.step / (halves(task, plan) ? 2 : 1);
  task.padded = Divisor((p.positions() + padding - 1) / padding * padding);
  return task;
}

// Kernels count positions, columns and extents in 32 bits.
bool countable(const LayerProduct& layer) {
  const Patches& p = layer.inputs;
  bool fits = p.samples < INT32_MAX && p.positions() < kLargestExtent && p.columns() < kLargestExtent &&
              layer.outputs() < kLargestExtent && p.rows() < INT32_MAX;
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    fits = fits && p.in[axis] < kLargestExtent && p.padding[axis] < kLargestExtent && p.stride[axis] < kLargestExtent &&
           p.source(axis, p.out[axis], p.kernel[axis]) < kLargestExtent;
  return fits;
}

template <class Tile>
cudaError_t launch_tiles(const Task& task, int64_t splits, typename Tile::Acc* out, const Exec& exec) {
  const int64_t blocks = splits * task.layer.groups * task.tiles_m * task.tiles_n;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  constexpr size_t kShared = sizeof(typename Tile::Shared) * Tile::kStages * Tile::kDepth *
                             (Tile::GradsLayout::kPitch + Tile::InputsLayout::kPitch);
  return simt::launch_shared(tile_kernel<Tile>, dim3(static_cast<unsigned>(blocks)), dim3(Tile::kThreads), kShared,
                             static_cast<cudaStream_t>(exec.stream), task,
                             static_cast<typename Tile::Acc>(task.layer.weight), out);
}

template <class T, int kOutputs>
cudaError_t launch_narrow(const Task& task, int64_t splits, acc_t<T>* out, const Exec& exec) {
  const int64_t shares = splits * task.group_blocks * task.tiles_m;
  const int64_t blocks = (shares + kNarrowWarps - 1) / kNarrowWarps * task.tiles_n;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return simt::launch(narrow_kernel<T, kOutputs>, dim3(static_cast<unsigned>(blocks)), dim3(32 * kNarrowWarps), 0,
                      static_cast<cudaStream_t>(exec.stream), task, static_cast<acc_t<T>>(task.layer.weight), out);
}

// Two sizes: 8 warps of 64 x 32 for large layers, 4 of 32 x 32 for those that have at most 64 outputs or columns.
template <class T, bool kGathers, bool kHalves>
cudaError_t launch_mma(const Task& task, const Plan& plan, float* out, const Exec& exec) {
  if (plan.way == Way::large_mma)
    return launch_tiles<MmaTile<T, 2, 4, 4, 4, 1, kGathers, kHalves>>(task, plan.splits, out, exec);
  return launch_tiles<MmaTile<T, 2, 2, 2, 4, kGathers ? 2 : 3, kGathers, kHalves>>(task, plan.splits, out, exec);
}

template <class T>
cudaError_t launch(const Task& task, const Plan& plan, acc_t<T>* out, const Exec& exec) {
  constexpr bool kHalf = sizeof(T) == 2;
  switch (plan.way) {
    case Way::narrow:
      return plan.m == 1 ? launch_narrow<T, 1>(task, plan.splits, out, exec)
                         : launch_narrow<T, kNarrowOutputs>(task, plan.splits, out, exec);
    case Way::powers:
      return launch_tiles<FmaTile<T, 4, 4, 2, true>>(task, plan.splits, out, exec);
    case Way::fma:
      if constexpr (!kHalf)
        return launch_tiles<FmaTile<T, 4, sizeof(T) == 4 ? 8 : 4, 2, false>>(task, plan.splits, out, exec);
      break;
    default:
      if constexpr (sizeof(T) <= 4) {
        if (halves(task, plan)) return launch_mma<T, false, true>(task, plan, out, exec);
        return task.grads.vectors && task.inputs.vectors ? launch_mma<T, false, false>(task, plan, out, exec)
                                                         : launch_mma<T, true, false>(task, plan, out, exec);
      }
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <>
int64_t fisher_weight_partials<kBackend>(const LayerProduct& layer) {
  return partials_of(layer, plan_of(layer));
}

template <>
int fisher_weight<kBackend>(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  const int64_t elements = layer.groups * layer.outputs() * layer.inputs.columns();
  if (elements == 0 || layer.inputs.rows() == 0) return cudaSuccess;
  if (!countable(layer)) return cudaErrorInvalidValue;
  const Plan plan = plan_of(layer);
  Task task = task_of(layer, plan);
  return visit(layer.inputs.dtype, [&]<class T>(Tag<T>) -> cudaError_t {
    using A = acc_t<T>;
    void* out = task.add ? fisher : partial;
    task.chunks = task.columns % kChunk<A> == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Chunk<A>) == 0;
    if (const cudaError_t error = launch<T>(task, plan, static_cast<A*>(out), exec)) return error;
    if (task.add) return cudaSuccess;
    const auto* sums = static_cast<const A*>(partial);
    if (turned(layer)) return add_permuted<A>(sums, plan.splits, elements, task, static_cast<A*>(fisher), exec);
    return add_partials<A>(sums, plan.splits, elements, layer.weight, static_cast<A*>(fisher), exec);
  });
}

}  // namespace unlearn_ext
