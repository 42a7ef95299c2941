// A task owns a block of F, outputs x columns, and goes through the samples: panels of the gradients and of the inputs
// are packed for a stretch of positions, multiplied tile by tile in registers, and each sample's product is squared
// into running totals that stay in the cache until the task ends. Three cases:
//
//   many positions   a product per sample and tile; products of more than kDepth positions are added up first
//   few positions    half tiles, whose totals stay in registers while the samples pass
//   one position     |g a|^p = |g|^p |a|^p: one product of the powers, with the samples as its depth
//
// Convolutions of tiny groups take another way: see fisher_grouped_cpu.h.
//
// Flops: 2 N T O I, those of the plain weight gradient. Packing moves an input once per kBlockRows outputs, a gradient
// once per kBlockCells / kBlockRows columns, and F once.
#include "core/apply_cpu.h"
#include "core/layer_panels_cpu.h"
#include "core/shuffled.h"
#include "kernels/fisher_grouped_cpu.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

constexpr int64_t kDepth = 192;             // of the panels, unless one line has to be longer
constexpr int64_t kFewPositions = 20;       // products shorter than this are squared in registers
constexpr int64_t kBlockRows = 192;         // outputs of a task, and
constexpr int64_t kBlockCells = 192 * 288;  // outputs x columns: with its products and panels they fill an L2 cache
constexpr int64_t kGathered = 65536;        // scalars of transposed input lines
constexpr int64_t kTasks = 16;              // wanted, so that threads share the work evenly

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of equal parts of n that are no larger than `most`, or 1 if that is none.
constexpr int64_t evenly(int64_t n, int64_t most) {
  return n == 0 ? 0 : divide_up(n, divide_up(n, std::max<int64_t>(1, most)));
}

// How F is cut into blocks and the samples into runs.
struct Plan {
  int64_t rows, channels;                    // of a block
  int64_t row_blocks, channel_blocks, runs;  // blocks of one group, runs of samples
  int64_t samples, lines, width;             // of a stretch

  Plan(const LayerProduct& layer, int tile_rows, int lanes) {
    const Patches& p = layer.inputs;
    const int64_t window = p.window(), outputs = layer.outputs();
    row_blocks = std::max<int64_t>(1, divide_up(outputs, kBlockRows));
    rows = divide_up(divide_up(outputs, row_blocks), tile_rows) * tile_rows;
    const int64_t most = std::max<int64_t>(lanes, kBlockCells / std::max<int64_t>(rows, 1) / window / lanes * lanes);
    channel_blocks = std::max<int64_t>(1, divide_up(p.channels, most));
    channels = std::min(p.channels, divide_up(divide_up(p.channels, channel_blocks), lanes) * lanes);
    channel_blocks = channels == 0 ? 0 : divide_up(p.channels, channels);

    const int64_t all_lines = p.out[0] * p.out[1];
    width = evenly(p.out[2], kDepth);
    lines = width < p.out[2] ? 1 : evenly(all_lines, kDepth / std::max<int64_t>(width, 1));
    samples = 1;
    if (lines == all_lines && width == p.out[2] && width > 0) samples = std::max<int64_t>(1, kDepth / p.positions());
    const int64_t tasks = layer.groups * row_blocks * channel_blocks;
    // A run has far more products than the scalars of F that it writes.
    const int64_t longest = std::max<int64_t>(1, p.samples * p.positions() / 1024);
    runs = tasks == 0 ? 1 : std::clamp<int64_t>(kTasks / tasks, 1, std::min(longest, std::max<int64_t>(1, p.samples)));
  }
};

enum class Part { whole, first, middle, last, plain };

// One tile, kRows x kTileCols, of a sample's product over `depth` positions. `total` gets its power, `product` holds
// what earlier stretches of the sample gave; a plain tile is added to `total` as it is.
template <int kRows, int kPower, Part kPart, class A>
UNLEARN_ALWAYS_INLINE inline void multiply_tile(const A* __restrict__ a, const A* __restrict__ b, int64_t depth,
                                                A* __restrict__ product, A* __restrict__ total) {
  using V = VectorRegister<A>;
  V sum[kRows][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const V left = *reinterpret_cast<const V*>(b), right = *reinterpret_cast<const V*>(b + kLanes<A>);
    UNLEARN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] += a[r] * left;
      sum[r][1] += a[r] * right;
    }
    a += kTileRows;
    b += kTileCols<A>;
  }
  UNLEARN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    UNLEARN_UNROLL
    for (int half = 0; half < 2; ++half) {
      V& before = *reinterpret_cast<V*>(product + r * kTileCols<A> + half * kLanes<A>);
      V& powers = *reinterpret_cast<V*>(total + r * kTileCols<A> + half * kLanes<A>);
      V value = sum[r][half];
      if constexpr (kPart == Part::middle || kPart == Part::last) value += before;
      if constexpr (kPart == Part::first || kPart == Part::middle)
        before = value;
      else if constexpr (kPart == Part::plain)
        powers += value;
      else
        powers += raised<kPower>(value);
    }
  }
}

// The tiles of `samples` samples of few positions each, kRows <= kTileRows / 2: two sets of accumulators in registers.
template <int kRows, int kPower, class A>
UNLEARN_ALWAYS_INLINE inline void multiply_few(const A* __restrict__ a, const A* __restrict__ b, int64_t positions,
                                               int64_t samples, A* __restrict__ total) {
  using V = VectorRegister<A>;
  V powers[kRows][2];
  UNLEARN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    powers[r][0] = *reinterpret_cast<const V*>(total + r * kTileCols<A>);
    powers[r][1] = *reinterpret_cast<const V*>(total + r * kTileCols<A> + kLanes<A>);
  }
  for (int64_t n = 0; n < samples; ++n) {
    V sum[kRows][2];
    V left = *reinterpret_cast<const V*>(b), right = *reinterpret_cast<const V*>(b + kLanes<A>);
    UNLEARN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] = a[r] * left;
      sum[r][1] = a[r] * right;
    }
    a += kTileRows;
    b += kTileCols<A>;
    for (int64_t k = 1; k < positions; ++k) {
      left = *reinterpret_cast<const V*>(b), right = *reinterpret_cast<const V*>(b + kLanes<A>);
      UNLEARN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += a[r] * left;
        sum[r][1] += a[r] * right;
      }
      a += kTileRows;
      b += kTileCols<A>;
    }
    UNLEARN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      powers[r][0] += raised<kPower>(sum[r][0]);
      powers[r][1] += raised<kPower>(sum[r][1]);
    }
  }
  UNLEARN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    *reinterpret_cast<V*>(total + r * kTileCols<A>) = powers[r][0];
    *reinterpret_cast<V*>(total + r * kTileCols<A> + kLanes<A>) = powers[r][1];
  }
}

// Calls f with the least of a third, two thirds and the whole of kMost that holds `rows`, as a constant.
template <int kMost, class F>
UNLEARN_ALWAYS_INLINE inline void with_rows(int64_t rows, const F& f) {
  if (rows > kMost / 3 * 2)
    f(std::integral_constant<int, kMost>{});
  else if (rows > kMost / 3)
    f(std::integral_constant<int, kMost / 3 * 2>{});
  else
    f(std::integral_constant<int, kMost / 3>{});
}

template <int kPower, Part kPart, class A>
void multiply(int64_t rows, const A* a, const A* b, int64_t depth, A* product, A* total) {
  with_rows<kTileRows>(rows, [&]<int kRows>(std::integral_constant<int, kRows>) UNLEARN_ALWAYS_INLINE {
    multiply_tile<kRows, kPower, kPart>(a, b, depth, product, total);
  });
}

template <int kPower, class A>
void multiply_short(int64_t rows, const A* a, const A* b, int64_t positions, int64_t samples, A* total) {
  constexpr int kHalf = kTileRows / 2;
  for (int64_t r = 0; r < rows; r += kHalf)
    with_rows<kHalf>(std::min<int64_t>(kHalf, rows - r),
                     [&]<int kRows>(std::integral_constant<int, kRows>) UNLEARN_ALWAYS_INLINE {
                       multiply_few<kRows, kPower>(a + r, b, positions, samples, total + r * kTileCols<A>);
                     });
}

template <int kPower, class A>
void raise(A* panel, int64_t n) {
  for (int64_t i = 0; i < n; ++i) panel[i] = kPower == 1 ? (panel[i] < 0 ? -panel[i] : panel[i]) : panel[i] * panel[i];
}

// One block of F: outputs [first_output, first_output + rows) of all, channels [first_channel, ...) of a group, samples
// [begin, end).
template <int kPower, class T>
class Block {
 public:
  using A = acc_t<T>;

  Block(const LayerProduct& layer, const Plan& plan, int64_t group, int64_t first_output, int64_t rows,
        int64_t first_channel, int64_t channels)
      : layer_(layer),
        plan_(plan),
        first_output_(first_output),
        rows_(rows),
        first_channel_(first_channel),
        image_(layer.inputs, static_cast<const T*>(layer.inputs.data) + group * layer.group_stride, first_channel,
               channels),
        tiles_(divide_up(rows, kTileRows)),
        panels_(divide_up(image_.columns(), kTileCols<A>)),
        is_split_(plan.lines * plan.width < layer.inputs.positions()) {
    const Patches& p = layer.inputs;
    gathered_ = ImagePanels<T>::scratch(p, channels, plan.lines, plan.width);
    samples_ = std::clamp<int64_t>(kGathered / std::max<int64_t>(1, gathered_), 1, plan.samples);
    const int64_t depth = samples_ * plan.lines * plan.width, cells = tiles_ * panels_ * kTileCells;
    sizes_[0] = tiles_ * kTileRows * depth;
    sizes_[1] = kTileCols<A> * depth;
    sizes_[2] = cells;
    sizes_[3] = is_split_ ? cells : 0;
    sizes_[4] = samples_ * gathered_ + kLanes<A>;
  }

  int64_t bytes() const {
    int64_t scalars = 0;
    for (const int64_t size : sizes_) scalars += align(size);
    return scalars * static_cast<int64_t>(sizeof(A));
  }

  // to[o][...] += weight * F, or = without `adds`. `to` is the row of the first output of all.
  void run(int64_t begin, int64_t end, const PanelMemory& memory, A weight, bool adds, A* fisher) {
    A* at = memory.at<A>(0);
    A** const pointers[] = {&grads_, &inputs_, &totals_, &products_, &scratch_};
    for (size_t i = 0; i < 5; ++i) *pointers[i] = at, at += align(sizes_[i]);
    memset(totals_, 0, static_cast<size_t>(sizes_[2]) * sizeof(A));
    const Patches& p = layer_.inputs;
    const int64_t lines = p.out[0] * p.out[1];
    for (int64_t n = begin; n < end; n += samples_)
      for (int64_t line = 0; line < lines; line += plan_.lines)
        for (int64_t x = 0; x < p.out[2]; x += plan_.width) {
          const Stretch at_here{n, std::min(samples_, end - n),        line, std::min(plan_.lines, lines - line),
                                x, std::min(plan_.width, p.out[2] - x)};
          const bool first = line == 0 && x == 0;
          const bool last = line + at_here.lines == lines && x + at_here.width == p.out[2];
          stretch(at_here, first, last);
        }
    store(weight, adds, fisher);
  }

 private:
  static constexpr int64_t kTileCells = kTileRows * kTileCols<A>;
  static constexpr int64_t align(int64_t scalars) { return divide_up(scalars, 64) * 64; }

  void stretch(const Stretch& at, bool first, bool last) {
    const int64_t depth = at.depth(), positions = layer_.inputs.positions();
    for (int64_t i = 0; i < tiles_; ++i)
      pack_positions<T>(layer_.grads, first_output_ + i * kTileRows, rows_of(i), at, kTileRows,
                        grads_ + i * kTileRows * depth);
    if (positions == 1) raise<kPower>(grads_, tiles_ * kTileRows * depth);
    image_.load(at, scratch_);
    for (int64_t j = 0; j < panels_; ++j) {
      image_.pack(at, j, inputs_);
      if (positions == 1) raise<kPower>(inputs_, kTileCols<A> * depth);
      for (int64_t i = 0; i < tiles_; ++i) {
        const int64_t cell = (j * tiles_ + i) * kTileCells;
        const A* a = grads_ + i * kTileRows * depth;
        A *total = totals_ + cell, *product = products_ + cell;
        if (positions == 1)
          multiply<kPower, Part::plain>(rows_of(i), a, inputs_, depth, product, total);
        else if (positions < kFewPositions)
          multiply_short<kPower>(rows_of(i), a, inputs_, positions, at.samples, total);
        else if (!is_split_)
          for (int64_t s = 0; s < at.samples; ++s)
            multiply<kPower, Part::whole>(rows_of(i), a + s * positions * kTileRows,
                                          inputs_ + s * positions * kTileCols<A>, positions, product, total);
        else if (first)
          multiply<kPower, Part::first>(rows_of(i), a, inputs_, depth, product, total);
        else if (last)
          multiply<kPower, Part::last>(rows_of(i), a, inputs_, depth, product, total);
        else
          multiply<kPower, Part::middle>(rows_of(i), a, inputs_, depth, product, total);
      }
    }
  }

  int64_t rows_of(int64_t tile) const { return std::min<int64_t>(kTileRows, rows_ - tile * kTileRows); }

  void store(A weight, bool adds, A* fisher) const {
    const int64_t all = layer_.inputs.columns(), columns = image_.columns(), window = layer_.inputs.window();
    std::vector<int64_t> places(static_cast<size_t>(image_.is_natural() ? 0 : columns));
    for (size_t q = 0; q < places.size(); ++q) places[q] = image_.natural(static_cast<int64_t>(q));
    for (int64_t r = 0; r < rows_; ++r) {
      A* to = fisher + (first_output_ + r) * all + first_channel_ * window;
      for (int64_t j = 0; j < panels_; ++j) {
        const A* from = totals_ + (j * tiles_ + r / kTileRows) * kTileCells + r % kTileRows * kTileCols<A>;
        const int64_t begin = j * kTileCols<A>, stop = std::min<int64_t>(kTileCols<A>, columns - begin);
        if (!places.empty())
          for (int64_t c = 0; c < stop; ++c) add(to[places[static_cast<size_t>(begin + c)]], weight * from[c], adds);
        else if (stop == kTileCols<A>)
          for (int64_t c = 0; c < kTileCols<A>; ++c) add(to[begin + c], weight * from[c], adds);
        else
          for (int64_t c = 0; c < stop; ++c) add(to[begin + c], weight * from[c], adds);
      }
    }
  }

  static void add(A& to, A value, bool adds) { to = adds ? to + value : value; }

  const LayerProduct& layer_;
  const Plan& plan_;
  int64_t first_output_, rows_, first_channel_;
  ImagePanels<T> image_;
  int64_t tiles_, panels_;
  bool is_split_;  // a sample's positions over several stretches
  int64_t gathered_, samples_, sizes_[5];
  A *grads_ = nullptr, *inputs_ = nullptr, *totals_ = nullptr, *products_ = nullptr, *scratch_ = nullptr;
};

template <int kPower, class T>
void accumulate(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  using A = acc_t<T>;
  const Plan plan(layer, kTileRows, kLanes<A>);
  const Patches& p = layer.inputs;
  const int64_t blocks = layer.groups * plan.row_blocks * plan.channel_blocks, outputs = layer.outputs();
  const int64_t scalars = layer.grads.channels * p.columns();
  const Shuffled order(std::max<int64_t>(1, blocks * plan.runs));
  parallel_for(exec, blocks * plan.runs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t task = order[i], run = task / blocks, block = task % blocks;
      const int64_t group = block / (plan.row_blocks * plan.channel_blocks);
      const int64_t row = block / plan.channel_blocks % plan.row_blocks * plan.rows;
      const int64_t channel = block % plan.channel_blocks * plan.channels;
      Block<kPower, T> work(layer, plan, group, group * outputs + row, std::min(plan.rows, outputs - row), channel,
                            std::min(plan.channels, p.channels - channel));
      const PanelMemory memory(work.bytes());
      const bool whole = plan.runs == 1;
      work.run(p.samples * run / plan.runs, p.samples * (run + 1) / plan.runs, memory,
               whole ? static_cast<A>(layer.weight) : A(1), whole,
               whole ? static_cast<A*>(fisher) : static_cast<A*>(partial) + run * scalars);
    }
  });
  if (plan.runs == 1) return;
  parallel_for(exec, scalars, kGrain, [&](int64_t begin, int64_t end) {
    A* to = static_cast<A*>(fisher);
    const A* from = static_cast<const A*>(partial);
    for (int64_t i = begin; i < end; ++i) {
      A sum = from[i];
      for (int64_t run = 1; run < plan.runs; ++run) sum += from[run * scalars + i];
      to[i] += static_cast<A>(layer.weight) * sum;
    }
  });
}

}  // namespace

template <>
int64_t fisher_weight_partials<kBackend>(const LayerProduct& layer) {
  if (has_tiny_groups(layer)) return 1;
  const int lanes = layer.inputs.dtype == DType::f64 ? kLanes<double> : kLanes<float>;
  return Plan(layer, kTileRows, lanes).runs;
}

template <>
int fisher_weight<kBackend>(const LayerProduct& layer, void* fisher, void* partial, const Exec& exec) {
  if (layer.inputs.rows() == 0 || layer.grads.channels == 0 || layer.inputs.columns() == 0) return 0;
  visit(layer.inputs.dtype, [&]<class T>(Tag<T>) {
    if (has_tiny_groups(layer))
      accumulate_groups<T>(layer, fisher, exec);
    else if (layer.power == 1)
      accumulate<1, T>(layer, fisher, partial, exec);
    else
      accumulate<2, T>(layer, fisher, partial, exec);
  });
  return 0;
}

}  // namespace unlearn_ext
