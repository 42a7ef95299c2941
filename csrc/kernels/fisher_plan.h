// What to launch for the Fisher diagonal of a layer on a GPU: depends on the shapes and types alone. Ordinary C++, for
// kernel files and for tests on the host.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

// Estimates for an H100, from its data sheet and not measured, for choosing between ways: multiprocessors, bytes of
// global memory per clock of each, and clocks to start a kernel.
[[maybe_unused]] constexpr double kProcessors = 132, kBytesPerClock = 20, kLaunchClocks = 5000;

// Elements of a tile raised to the power and added per clock when a sample ends, by the ordinary units: one instruction
// each, and another to clear it where those also multiply. An estimate like the others.
[[maybe_unused]] constexpr double kRaisesPerClock = 128;

enum class Way { narrow, powers, fma, small_mma, large_mma };

struct Plan {
  Way way;
  int m, n;             // one block's tile of a group's part of F
  int step;             // samples are padded to a multiple of this many positions
  int64_t splits;       // runs of samples
  bool halves = false;  // or of half as many: where operands come in chunks, and a sample would be padded by as much
};

// A warp's share of a group where groups are small, as those of depth-wise convolutions: all taps of a 3x3 kernel.
constexpr int kNarrowWarps = 4, kNarrowColumns = 9, kNarrowOutputs = 4, kNarrowGroups = 8;

// Runs of samples, whose partial sums are worth their traffic where there are fewer tiles than multiprocessors: the
// fewest, which move the least, among those whose clocks are within a tenth of the least, as these are estimates.
// `direct`: a single run needs none and adds its tiles to F.
inline int64_t best_splits(int64_t tiles, int64_t samples, double sample_clocks, double tile_bytes, double fisher_bytes,
                           bool direct) {
  constexpr int64_t kMost = 64, kLargest = 64 << 20;
  const auto clocks_of = [&](int64_t splits) {
    const double rounds = std::ceil(static_cast<double>(tiles * splits) / kProcessors);
    const double run = std::ceil(static_cast<double>(samples) / static_cast<double>(splits));
    const bool adds = splits == 1 && direct;
    double clocks = rounds * (run * sample_clocks + tile_bytes * (adds ? 2 : 1) / kBytesPerClock);
    if (!adds)
      clocks += kLaunchClocks + static_cast<double>(splits + 2) * fisher_bytes / (kProcessors * kBytesPerClock);
    return clocks;
  };
  double least = clocks_of(1);
  for (int64_t splits = 2; splits <= std::min(kMost, samples); ++splits) {
    if (static_cast<double>(splits) * fisher_bytes > kLargest) break;
    least = std::min(least, clocks_of(splits));
  }
  int64_t fewest = 1;
  while (clocks_of(fewest) > 1.1 * least) ++fewest;
  const int64_t run = (samples + fewest - 1) / fewest;
  return (samples + run - 1) / run;  // none of them without samples
}

inline Plan plan_of(const LayerProduct& layer) {
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
  // Beyond one and a half steps the half that is saved is less than a third of a sample.
  const bool mma = plan.way == Way::small_mma || plan.way == Way::large_mma;
  plan.halves = mma && (positions - 1) % plan.step < plan.step / 2 && positions <= plan.step * 3 / 2;
  const auto tiles = [&](int m, int n) { return layer.groups * ((outputs + m - 1) / m) * ((columns + n - 1) / n); };

  // A warp of the narrow kernel takes about 45 clocks for 32 positions of its share and as many to add up its lanes,
  // and longer where few groups have what a load brings in common.
  const int64_t padding = plan.step / (plan.halves ? 2 : 1);
  const double padded = static_cast<double>((positions + padding - 1) / padding * padding);
  const double area = static_cast<double>(plan.m) * plan.n;
  const double sample_clocks =
      padded * area / rate + (positions > 1 ? area * (mma ? 1 : 2) / (wide ? 64 : kRaisesPerClock) : 0);
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
  // Images for tensor cores are brought into channels_last order (torch/layers.h), see turned(). How these lie in fact
  // does not count: sums must not depend on it.
  const Patches& p = layer.inputs;
  const bool images = mma && p.in[0] * p.in[1] > 1 && layer.groups * p.channels % 8 == 0;
  const bool direct = !images || p.channels == 1 || p.window() == 1;
  plan.splits = best_splits(tiles(plan.m, plan.n), samples, sample_clocks, plan.m * plan.n * size,
                            static_cast<double>(layer.groups * outputs * columns) * size, direct);
  return plan;
}

// Whether columns of the tiles run over channels, then taps, the order of channels_last memory, and those of F do not.
// Neighbours in a tile are then a window apart in F, 36 bytes for 3x3 taps: a sector of 32 bytes for each element.
inline bool turned(const LayerProduct& layer) {
  return layer.inputs.channel_stride == 1 && layer.inputs.channels > 1 && layer.inputs.window() > 1;
}

// Arrays of partial sums: of all runs or, where there is a single one, in the order of the tiles. To store it and turn
// it moves four times the bytes of F, to add it to F in that order sixteen times. Tiles whose columns ran over taps
// first could be added in place, but would read their operands in pieces of 16 bytes, half a sector, for every
// position. Warps of the narrow kernel hold all taps themselves.
inline int64_t partials_of(const LayerProduct& layer, const Plan& plan) {
  const bool direct = plan.splits == 1 && (plan.way == Way::narrow || !turned(layer));
  return direct ? 0 : plan.splits;
}

// Division of numbers below 2^31 by one that is known in advance.
struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : value(static_cast<uint32_t>(by)), shift(31) {
    while (uint64_t{1} << (shift - 31) < value) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + value - 1) / value);
  }
  UNLEARN_HD uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

}  // namespace
}  // namespace unlearn_ext
