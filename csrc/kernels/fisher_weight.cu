#include <algorithm>
#include <cmath>

#include "kernels/fisher_layers.h"
#include "kernels/fisher_tiles.cuh"

namespace unlearn_ext {
namespace {

// ---- What to launch: depends on the shapes and types alone

enum class Way { narrow, powers, fma, small_mma, large_mma };

struct Plan {
  Way way;
  int m, n;        // one block's tile of a group's part of F
  int step;        // samples are padded to a multiple of this many positions
  int64_t splits;  // runs of samples
};

// A warp's share of a group where groups are small, as those of depth-wise convolutions: all taps of a 3x3 kernel.
constexpr int kNarrowWarps = 4, kNarrowColumns = 9, kNarrowOutputs = 4, kNarrowGroups = 8;

// Runs of samples, whose partial sums are worth their traffic where there are fewer tiles than multiprocessors.
int64_t best_splits(int64_t tiles, int64_t samples, double sample_clocks, double tile_bytes, double fisher_bytes) {
  constexpr int64_t kMost = 64, kLargest = 64 << 20;
  int64_t best = 1;
  double best_clocks = 0;
  for (int64_t splits = 1; splits <= std::min(kMost, samples); ++splits) {
    if (splits > 1 && static_cast<double>(splits) * fisher_bytes > kLargest) break;
    const double rounds = std::ceil(static_cast<double>(tiles * splits) / kProcessors);
    const double run = std::ceil(static_cast<double>(samples) / static_cast<double>(splits));
    double clocks = rounds * (run * sample_clocks + tile_bytes * (splits > 1 ? 1 : 2) / kBytesPerClock);
    if (splits > 1)
      clocks += kLaunchClocks + static_cast<double>(splits + 2) * fisher_bytes / (kProcessors * kBytesPerClock);
    if (splits == 1 || clocks < best_clocks) best = splits, best_clocks = clocks;
  }
  const int64_t run = (samples + best - 1) / best;
  return (samples + run - 1) / run;  // none of them without samples
}

Plan plan_of(const LayerProduct& layer) {
  const DType dtype = layer.inputs.dtype;
  const int64_t samples = layer.inputs.samples, positions = layer.inputs.positions();
  const int64_t outputs = layer.outputs(), columns = layer.inputs.columns();
  const bool half = dtype == DType::f16 || dtype == DType::bf16, wide = dtype == DType::f64;
  if (samples == 0 || positions == 0 || outputs == 0 || columns == 0) return {Way::fma, 1, 1, 1, 1};

  Plan plan;
  double rate;  // multiplications per clock
  if (positions == 1)
    plan = {Way::powers, 64, 64, 1, 1}, rate = wide ? 32 : 64;
  else if (!half && (wide || !layer.tf32))
    plan = {Way::fma, 64, wide ? 64 : 128, 4, 1}, rate = wide ? 50 : 100;
  else if (outputs > 64 && columns > 64)
    plan = {Way::large_mma, 128, 128, half ? 16 : 8, 1}, rate = half ? 1000 : 500;
  else
    plan = {Way::small_mma, 64, 64, half ? 16 : 8, 1}, rate = half ? 600 : 300;
  const auto tiles = [&](int m, int n) { return layer.groups * ((outputs + m - 1) / m) * ((columns + n - 1) / n); };

  // A warp of the narrow kernel takes about 45 clocks for 32 positions of its share and as many to add up its lanes,
  // and longer where few groups have what a load brings in common.
  const double padded = static_cast<double>((positions + plan.step - 1) / plan.step * plan.step);
  const double sample_clocks = padded * plan.m * plan.n / rate;
  const int narrow = outputs == 1 ? 1 : kNarrowOutputs;
  const double narrow_clocks =
      (layer.groups < kNarrowGroups ? 135.0 : 45.0) * static_cast<double>((positions + 31) / 32 + 1);
  if (static_cast<double>(tiles(narrow, kNarrowColumns)) * narrow_clocks <
      static_cast<double>(tiles(plan.m, plan.n)) * sample_clocks) {
    const int64_t warps = tiles(narrow, kNarrowColumns), wanted = 132 * 32;
    const int64_t splits = std::min<int64_t>({(wanted + warps - 1) / warps, samples, 64});
    const int64_t run = (samples + splits - 1) / splits;
    return {Way::narrow, narrow, kNarrowColumns, 1, (samples + run - 1) / run};
  }
  const double size = wide ? 8 : 4;
  plan.splits = best_splits(tiles(plan.m, plan.n), samples, sample_clocks, plan.m * plan.n * size,
                            static_cast<double>(layer.groups * outputs * columns) * size);
  return plan;
}

// ---- What every kernel is told

// Division of numbers below 2^31 by one that is known in advance.
struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : value(static_cast<uint32_t>(by)), shift(31) {
    while (uint64_t{1} << (shift - 31) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

struct Task {
  LayerProduct layer;
  int samples, positions, outputs, columns;  // of the layer, the last two per group
  Divisor padded;                            // positions up to the end of the last step
  Divisor across, down;                      // positions along the last axis and the one before
  int run;                                   // samples of one block
  int tiles_m, tiles_n;
  int lane_groups, group_blocks;  // of the narrow kernel: groups side by side in a warp, warps for all of them
  bool channels_first;            // columns of a tile run over channels, then taps: the order of channels_last memory
  bool add;                       // to F; otherwise partial sums are stored
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
  Column column{0, {}, static_cast<int>(to)};
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

// ---- Tiles

// A block owns a tile of F, or of one run's partial sums, and walks the positions of its samples, each sample padded to
// whole steps. Flops: 2 N T O I. Bytes from device memory: the operands once, as blocks walk the samples side by side
// and find them in the L2 cache, and F twice. Bytes from there: all inputs for every row of tiles, all gradients for
// every column. That limits halves read in chunks; for exact floats it is the multiplications (128 per clock of a
// multiprocessor), and for halves read one by one the instructions of the loader, about ten per element.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    tile_kernel(const __grid_constant__ Task task, typename Tile::Acc weight, typename Tile::Acc* out) {
  using T = typename Tile::Element;
  using S = typename Tile::Shared;
  using A = typename Tile::Acc;
  constexpr int kDepth = Tile::kDepth, kStages = Tile::kStages, kSteps = kDepth / Tile::kStep;
  static_assert(!Tile::kReadsAhead || kSteps == 2);
  constexpr int kInputs = Tile::GradsLayout::kPitch * kDepth, kStage = kInputs + Tile::InputsLayout::kPitch * kDepth;
  constexpr int kSlabs = Tile::kThreads / kDepth;  // described at once
  static_assert((kSlabs & (kSlabs - 1)) == 0);
  SIMT_DYN_SHARED(S, stages);
  SIMT_SHARED(Position, rows, [2][Tile::kThreads]);
  SIMT_SHARED(Column, columns, [Tile::kN]);
  const int thread = static_cast<int>(threadIdx.x);

  // Tiles that share the longer operand run side by side.
  const unsigned tiles = static_cast<unsigned>(task.tiles_m) * static_cast<unsigned>(task.tiles_n);
  const unsigned tile_index = blockIdx.x % tiles, rest = blockIdx.x / tiles;
  const unsigned groups = static_cast<unsigned>(task.layer.groups), shorter = min(task.tiles_m, task.tiles_n);
  const int64_t group = rest % groups, split = rest / groups;
  const int in_short = static_cast<int>(tile_index % shorter), in_long = static_cast<int>(tile_index / shorter);
  const bool m_is_short = task.tiles_m <= task.tiles_n;
  const int64_t first_m = static_cast<int64_t>(m_is_short ? in_short : in_long) * Tile::kM,
                first_n = static_cast<int64_t>(m_is_short ? in_long : in_short) * Tile::kN;
  const int rows_left = static_cast<int>(min(task.outputs - first_m, int64_t{Tile::kM}));
  const int columns_left = static_cast<int>(min(task.columns - first_n, int64_t{Tile::kN}));
  const int first = static_cast<int>(split) * task.run, last = min(task.samples, first + task.run);

  const Grads<T> grads{
      static_cast<const T*>(task.layer.grads.data) + (group * task.outputs + first_m) * task.layer.grads.channel_stride,
      task.layer.grads.channel_stride, rows_left};
  const Patches& p = task.layer.inputs;
  const Inputs<T> inputs{
      static_cast<const T*>(p.data) + group * task.layer.group_stride,
      columns,
      {static_cast<uint32_t>(p.in[0]), static_cast<uint32_t>(p.in[1]), static_cast<uint32_t>(p.in[2])}};

  for (int n = thread; n < Tile::kN; n += Tile::kThreads) columns[n] = column_of<T>(task, first_n + n);
  // Every thread describes a row; a batch of them serves kSlabs slabs of kDepth rows.
  int sample = first;
  uint32_t t = static_cast<uint32_t>(thread);
  const auto describe_rows = [&](int batch) {
    const uint32_t samples = task.padded.quotient(t);
    sample += static_cast<int>(samples);
    t -= samples * task.padded.value;
    rows[batch & 1][thread] = sample < last && t < static_cast<uint32_t>(task.positions)
                                  ? position_of<T>(task, sample, t)
                                  : Position{0, 0, {kNoRow, 0, 0}, 0};
    t += Tile::kThreads;
  };
  describe_rows(0);
  __syncthreads();

  Tile tile;
  typename Tile::template Load<Grads<T>, typename Tile::GradsLayout> load_grads(grads);
  typename Tile::template Load<Inputs<T>, typename Tile::InputsLayout> load_inputs(inputs);
  const bool idle = tile.idle(rows_left, columns_left);
  const int steps = static_cast<int>(task.padded.value) / Tile::kStep;
  int steps_left = steps;
  const int slabs = static_cast<int>((int64_t{last - first} * task.padded.value + kDepth - 1) / kDepth);
  // Of the slabs behind the last one all rows are outside: zeros, which nobody reads.
  const auto fetch = [&](int slab, S* stage) {
    const Position* described = &rows[slab / kSlabs & 1][slab % kSlabs * kDepth];
    load_grads.fetch(described, stage, task.grads, task.layer.power);
    load_inputs.fetch(described, stage + kInputs, task.inputs, task.layer.power);
    simt::cp_async_commit();
  };
  const auto describe_after = [&](int slab) {
    if ((slab + 1) % kSlabs == 0) describe_rows((slab + 1) / kSlabs);
  };
  const auto deposit = [&](S* stage) {
    load_grads.deposit(stage, task.grads);
    load_inputs.deposit(stage + kInputs, task.inputs);
  };
  const auto read = [&](const S* stage, int step, typename Tile::Fragments& to) {
    tile.read(stage, stage + kInputs, step * Tile::kStep, to);
  };
  const auto end_step = [&] {
    if (!Tile::kBySample || --steps_left != 0) return;
    tile.end_sample(task.layer.power);
    steps_left = steps;
  };

  for (int slab = 0; slab < kStages; ++slab) {
    fetch(slab, stages + slab * kStage);
    deposit(stages + slab * kStage);
    describe_after(slab);
  }
  simt::cp_async_wait<kStages - 1>();
  __syncthreads();
  typename Tile::Fragments now, after;
  S *here = stages, *last_here = nullptr;  // the stages of this slab and of the one before
  if (Tile::kReadsAhead && !idle) read(here, 0, now);
  for (int slab = 0; slab < slabs; ++slab) {
    if constexpr (Tile::kReadsAhead) {
      if (!idle) {
        read(here, 1, after);
        tile.multiply(now);
        end_step();
      }
    } else if (!idle) {
#pragma unroll(kSteps > 2 ? 1 : kSteps)
      for (int step = 0; step < kSteps; ++step) {
        read(here, step, now);
        tile.multiply(now);
        end_step();
      }
    }
    if (slab > 0) deposit(last_here);
    simt::cp_async_wait<kStages - 2>();
    __syncthreads();
    S* next = here == stages + (kStages - 1) * kStage ? stages : here + kStage;
    if (Tile::kReadsAhead && !idle) {  // in one piece, so that the loads find their way between the multiplications
      read(next, 0, now);
      fetch(slab + kStages, here);
      tile.multiply(after);
      end_step();
    } else {
      fetch(slab + kStages, here);
    }
    describe_after(slab + kStages);
    last_here = here, here = next;
  }
  simt::cp_async_wait<0>();

  // Many loads at once: waiting for each element of F in turn would take longer than the products.
  if (idle) return;
  A* f = out + ((split * groups + group) * task.outputs + first_m) * task.columns;
#pragma unroll
  for (int b = 0; b < Tile::kBatches; ++b) {
    A* address[Tile::kBatch];
    A before[Tile::kBatch];
#pragma unroll
    for (int i = 0; i < Tile::kBatch; ++i) {
      const int m = tile.m(b, i), n = tile.n(b, i);
      const bool inside = m < rows_left && n < columns_left;
      address[i] = inside ? f + static_cast<int64_t>(m) * task.columns + columns[n].to : nullptr;
      before[i] = inside && task.add ? *address[i] : A(0);
    }
#pragma unroll
    for (int i = 0; i < Tile::kBatch; ++i) {
      const A value = tile.value(b, i);
      if (address[i] != nullptr) *address[i] = task.add ? fused_multiply_add(weight, value, before[i]) : value;
    }
  }
}

// ---- Few outputs per group

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

Task task_of(const LayerProduct& layer, const Plan& plan) {
  const Patches& p = layer.inputs;
  const Positions& g = layer.grads;
  Task task{};
  task.layer = layer;
  task.samples = static_cast<int>(p.samples), task.positions = static_cast<int>(p.positions());
  task.outputs = static_cast<int>(layer.outputs()), task.columns = static_cast<int>(p.columns());
  task.padded = Divisor((p.positions() + plan.step - 1) / plan.step * plan.step);
  task.across = Divisor(p.out[2]), task.down = Divisor(p.out[1]);
  task.run = static_cast<int>((p.samples + plan.splits - 1) / plan.splits);
  task.tiles_m = (task.outputs + plan.m - 1) / plan.m, task.tiles_n = (task.columns + plan.n - 1) / plan.n;
  task.channels_first = p.channel_stride == 1;
  task.lane_groups = task.channels_first && layer.groups >= kNarrowGroups ? kNarrowGroups : 1;
  task.group_blocks = static_cast<int>((layer.groups + task.lane_groups - 1) / task.lane_groups);
  task.add = plan.splits == 1;
  const int64_t lanes = p.dtype == DType::f64 ? 2 : p.dtype == DType::f32 ? 4 : 8;
  task.grads =
      access_of(lanes, g.data, layer.outputs(), g.channel_stride, g.sample_stride, g.space_stride, g.extent, 0);
  // Padding moves the place of a row by its stride even where an axis has one image position.
  int64_t moves[kMaxSpatial];
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    moves[axis] = p.in[axis] > 1 || p.padding[axis] != 0 || p.kernel[axis] > 1 ? 2 : 1;
  task.inputs = access_of(lanes, p.data, p.channels, p.channel_stride, p.sample_stride, p.space_stride, moves,
                          layer.groups > 1 ? layer.group_stride : 0);
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
template <class T, bool kGathers>
cudaError_t launch_mma(const Task& task, const Plan& plan, float* out, const Exec& exec) {
  if (plan.way == Way::large_mma)
    return launch_tiles<MmaTile<T, 2, 4, 4, 4, 1, kGathers>>(task, plan.splits, out, exec);
  return launch_tiles<MmaTile<T, 2, 2, 2, 4, kGathers ? 2 : 3, kGathers>>(task, plan.splits, out, exec);
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
      if constexpr (sizeof(T) <= 4)
        return task.grads.vectors && task.inputs.vectors ? launch_mma<T, false>(task, plan, out, exec)
                                                         : launch_mma<T, true>(task, plan, out, exec);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

template <>
int64_t fisher_weight_partials<kBackend>(const LayerProduct& layer) {
  return plan_of(layer).splits;
}

template <>
int fisher_weight<kBackend>(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  const int64_t elements = layer.groups * layer.outputs() * layer.inputs.columns();
  if (elements == 0 || layer.inputs.rows() == 0) return cudaSuccess;
  if (!countable(layer)) return cudaErrorInvalidValue;
  const Plan plan = plan_of(layer);
  const Task task = task_of(layer, plan);
  return visit(layer.inputs.dtype, [&]<class T>(Tag<T>) -> cudaError_t {
    using A = acc_t<T>;
    if (plan.splits == 1) return launch<T>(task, plan, static_cast<A*>(fisher), exec);
    if (const cudaError_t error = launch<T>(task, plan, static_cast<A*>(partial), exec)) return error;
    return add_partials<A>(static_cast<const A*>(partial), plan.splits, elements, layer.weight, static_cast<A*>(fisher),
                           exec);
  });
}

}  // namespace unlearn_ext
