// How F is cut into blocks, and what all ways to work on one share: memory, the walk over the samples, and how totals
// get from panels into F. Included by kernel files only: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include <array>

#include "core/layer_panels_cpu.h"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

// What limits blocks of F and stretches of positions.
struct Cut {
  int64_t rows, cells;      // outputs of a block, and outputs x columns
  int64_t depth, multiple;  // positions of a stretch, unless one line has to be longer; of part of a line a multiple
};
constexpr Cut kRegisterCut{192, 192 * 288, 192, 1};  // a block, its products and its panels fill 1 MB of cache

constexpr int64_t kGathered = 65536;  // scalars of transposed input lines
constexpr int64_t kTasks = 16;        // wanted, so that threads share the work evenly

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The size of equal parts of n that are no larger than `most`, or 1 if that is none.
constexpr int64_t evenly(int64_t n, int64_t most) {
  return n == 0 ? 0 : divide_up(n, divide_up(n, std::max<int64_t>(1, most)));
}

// How F is cut into blocks and the samples into stretches. What a scalar of F comes to depends on the stretches alone.
struct Plan {
  int64_t rows, channels;              // of a block
  int64_t row_blocks, channel_blocks;  // of one group
  int64_t samples, lines, width;       // of a stretch

  Plan(const LayerProduct& layer, const Cut& cut, int tile_rows, int lanes) {
    const Patches& p = layer.inputs;
    const int64_t window = p.window(), outputs = layer.outputs();
    row_blocks = std::max<int64_t>(1, divide_up(outputs, cut.rows));
    rows = divide_up(divide_up(outputs, row_blocks), tile_rows) * tile_rows;
    const int64_t most = std::max<int64_t>(lanes, cut.cells / std::max<int64_t>(rows, 1) / window / lanes * lanes);
    channel_blocks = std::max<int64_t>(1, divide_up(p.channels, most));
    channels = std::min(p.channels, divide_up(divide_up(p.channels, channel_blocks), lanes) * lanes);
    channel_blocks = channels == 0 ? 0 : divide_up(p.channels, channels);

    const int64_t all_lines = p.out[0] * p.out[1];
    width = evenly(p.out[2], cut.depth);
    if (width < p.out[2]) width = std::min(p.out[2], divide_up(width, cut.multiple) * cut.multiple);
    lines = width < p.out[2] ? 1 : evenly(all_lines, cut.depth / std::max<int64_t>(width, 1));
    samples = 1;
    if (lines == all_lines && width == p.out[2] && width > 0)
      samples = std::max<int64_t>(1, cut.depth / std::max<int64_t>(1, p.positions()));
  }

  int64_t blocks(const LayerProduct& layer) const { return layer.groups * row_blocks * channel_blocks; }
};

// How many parts the samples are cut into where there are few blocks, however these are worked on.
inline int64_t runs_of(const LayerProduct& layer) {
  const Patches& p = layer.inputs;
  const int lanes = p.dtype == DType::f64 ? kLanes<double> : kLanes<float>;
  const int64_t blocks = Plan(layer, kRegisterCut, kTileRows, lanes).blocks(layer);
  // A run has far more products than the scalars of F that it writes.
  const int64_t longest = std::max<int64_t>(1, p.samples * p.positions() / 1024);
  return blocks == 0 ? 1 : std::clamp<int64_t>(kTasks / blocks, 1, std::min(longest, std::max<int64_t>(1, p.samples)));
}

// One block of F: outputs [first_output, first_output + rows) of all, channels [first_channel, ...) of a group. Its
// totals lie in cells of kCellRows outputs x kTileCols columns, cell by cell down a panel of columns.
template <class T, int kCellRows>
class Block {
 public:
  using A = acc_t<T>;

  Block(const LayerProduct& layer, const Plan& plan, int64_t group, int64_t first_output, int64_t rows,
        int64_t first_channel, int64_t channels)
      : layer_(layer),
        first_output_(first_output),
        rows_(rows),
        image_(layer.inputs, static_cast<const T*>(layer.inputs.data) + group * layer.group_stride, first_channel,
               channels),
        cells_(divide_up(rows, kCellRows)),
        panels_(divide_up(image_.columns(), kTileCols<A>)),
        is_split_(plan.lines * plan.width < layer.inputs.positions()),
        plan_(plan),
        first_channel_(first_channel) {
    const int64_t gathered = ImagePanels<T>::scratch(layer.inputs, channels, plan.lines, plan.width);
    samples_ = std::clamp<int64_t>(kGathered / std::max<int64_t>(1, gathered), 1, plan.samples);
    sizes_[kInputs] = kTileCols<A> * depth();
    sizes_[kTotals] = cells_ * panels_ * kCell;
    sizes_[kProducts] = is_split_ ? sizes_[kTotals] : 0;
    sizes_[kScratch] = samples_ * gathered + kLanes<A>;
  }

  int64_t bytes() const {
    int64_t scalars = 0;
    for (const int64_t size : sizes_) scalars += align(size);
    return scalars * static_cast<int64_t>(sizeof(A));
  }

 protected:
  enum Array { kGrads, kInputs, kTotals, kProducts, kScratch, kGradTiles, kInputTiles, kSums, kArrays };
  static constexpr int64_t kCell = kCellRows * kTileCols<A>;

  // Of the longest stretch.
  int64_t depth() const { return samples_ * plan_.lines * plan_.width; }
  int64_t rows_of(int64_t cell) const { return std::min<int64_t>(kCellRows, rows_ - cell * kCellRows); }
  A* at(Array array) const { return at_[array]; }

  // to[o][...] += weight * F of samples [begin, end), or = without `adds`. `to` is the row of the first output of all.
  // f(stretch, whether it is a sample's first, whether its last) adds to the totals.
  template <class F>
  void over_samples(int64_t begin, int64_t end, const PanelMemory& memory, A weight, bool adds, A* fisher, const F& f) {
    A* next = memory.at<A>(0);
    for (size_t i = 0; i < kArrays; ++i) at_[i] = next, next += align(sizes_[i]);
    memset(at_[kTotals], 0, static_cast<size_t>(sizes_[kTotals]) * sizeof(A));
    const Patches& p = layer_.inputs;
    const int64_t lines = p.out[0] * p.out[1];
    for (int64_t n = begin; n < end; n += samples_)
      for (int64_t line = 0; line < lines; line += plan_.lines)
        for (int64_t x = 0; x < p.out[2]; x += plan_.width) {
          const Stretch here{n, std::min(samples_, end - n),        line, std::min(plan_.lines, lines - line),
                             x, std::min(plan_.width, p.out[2] - x)};
          const bool first = line == 0 && x == 0;
          f(here, first, line + here.lines == lines && x + here.width == p.out[2]);
        }
    store(weight, adds, fisher);
  }

  const LayerProduct& layer_;
  int64_t first_output_, rows_;
  ImagePanels<T> image_;
  int64_t cells_, panels_;
  bool is_split_;  // a sample's positions over several stretches
  std::array<int64_t, kArrays> sizes_{};

 private:
  static constexpr int64_t align(int64_t scalars) { return divide_up(scalars, 64) * 64; }

  void store(A weight, bool adds, A* fisher) const {
    const int64_t all = layer_.inputs.columns(), columns = image_.columns(), window = layer_.inputs.window();
    std::vector<int64_t> places(static_cast<size_t>(image_.is_natural() ? 0 : columns));
    for (size_t q = 0; q < places.size(); ++q) places[q] = image_.natural(static_cast<int64_t>(q));
    for (int64_t r = 0; r < rows_; ++r) {
      A* to = fisher + (first_output_ + r) * all + first_channel_ * window;
      for (int64_t j = 0; j < panels_; ++j) {
        const A* from = at_[kTotals] + (j * cells_ + r / kCellRows) * kCell + r % kCellRows * kTileCols<A>;
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

  const Plan& plan_;
  int64_t first_channel_, samples_;
  std::array<A*, kArrays> at_{};
};

}  // namespace
}  // namespace unlearn_ext
