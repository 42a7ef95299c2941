// A block of F by instructions that multiply pairs of bfloat16 and add up in float32: those of the CPU's matrix unit
// (fisher_matrix_unit_cpu.h) or of its vector registers (fisher_dots_cpu.h). A float32 is the exact sum of three
// bfloat16 of falling size, a float16 of two: of their nine products the six largest are taken, which leaves out less
// than 2^-24 of a product, its own rounding. What comes out is as exact as sums of float32 products, and tests/native
// holds both to the same bounds.
//
// The instructions treat subnormal numbers as 0. With no factor above kLargest that changes what a stretch adds to a
// gradient by less than 2^-92, which its square in float32 cannot show; one with larger factors, infinities or NaN goes
// through vector registers of float32. Other powers than 2 do not come here: their totals hold small gradients.
//
// Included by kernel files only: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include "core/matrix_unit.h"
#include "kernels/fisher_registers_cpu.h"

#if defined(UNLEARN_MATRIX_UNIT)
namespace unlearn_ext {
namespace {

constexpr uint32_t kLargest = 0x4b800000u;  // the bits of 2^24 in float32

constexpr Cut kSmallCut{192, 192 * 288, 256, kTileDepth};  // a block, its tiles and its sums fill 1 MB of cache

// Sums and totals of a cell, 16 outputs x 32 columns.
constexpr int64_t kSumsRow = 2 * kTileSide * sizeof(float);
constexpr int64_t kSumsCell = kTileSide * 2 * kTileSide;

template <class T>
constexpr int kParts = std::is_same_v<T, float>  ? 3
                       : std::is_same_v<T, Half> ? 2
                                                 : 1;

using Words = typename VectorOf<uint32_t, kVectorBytes>::type;

// Two lines of values as kCount lines of pairs of bfloat16, the first line's in the lower halves, the largest part
// first. `largest` is raised to the bits of the largest magnitudes.
template <int kCount>
UNLEARN_ALWAYS_INLINE inline void split(VectorRegister<float> even, VectorRegister<float> odd, Words (&pairs)[kCount],
                                        Words& largest) {
  constexpr uint32_t kUpper = 0xffff0000u;
  for (const Words line : {(Words)even & 0x7fffffffu, (Words)odd & 0x7fffffffu})
    largest = line > largest ? line : largest;
  UNLEARN_UNROLL
  for (int part = 0; part < kCount; ++part) {
    // To the nearest, so that what is left out has either sign; the last part needs no rounding.
    const uint32_t half = part + 1 < kCount ? 0x8000u : 0u;
    const Words low = ((Words)even + half) & kUpper, high = ((Words)odd + half) & kUpper;
    pairs[part] = (low >> 16) | high;
    even -= (VectorRegister<float>)low;
    odd -= (VectorRegister<float>)high;
  }
}

// Lines of values next to each other, a line per position.
template <class T>
struct Lines {
  const T* data;  // null if there are none: see adjacent_lines()
  int64_t step;
};

template <class T>
UNLEARN_ALWAYS_INLINE inline VectorRegister<float> widened(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    using Halves = typename VectorOf<uint16_t, kVectorBytes / 2>::type;
    const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
    return (VectorRegister<float>)words;
  } else {
    return *reinterpret_cast<const VectorRegister<float>*>(from);
  }
}

// Where channels [first, first + columns) of a sample's part of a stretch lie as such lines in the tensor itself.
template <class T>
Lines<T> adjacent_lines(const Positions& p, int64_t first, int64_t columns, const Stretch& at, int64_t sample) {
  const bool rows_follow = p.space_stride[1] == p.extent[2] * p.space_stride[2];
  const bool planes_follow = p.space_stride[0] == p.extent[1] * p.space_stride[1];
  const int64_t last = at.line + at.lines - 1;
  const bool follow = at.lines == 1 || (rows_follow && (planes_follow || at.line / p.extent[1] == last / p.extent[1]));
  if (std::is_same_v<T, Half> || p.channel_stride != 1 || columns % kTileSide != 0 || !follow) return {nullptr, 0};
  return {static_cast<const T*>(p.data) + first + (at.sample + sample) * p.sample_stride +
              at.line / p.extent[1] * p.space_stride[0] + at.line % p.extent[1] * p.space_stride[1] +
              at.x * p.space_stride[2],
          p.space_stride[2]};
}

// What comes next lies behind each line, a page away from the line before: no CPU foresees that.
template <int kWidth, class T>
UNLEARN_ALWAYS_INLINE inline void prefetch_behind(const T* line) {
  for (int at = kWidth; at < 2 * kWidth; at += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(line + at);
}

// f(step, pair of lines within the step, the lines), lines past the length zero.
template <int kWidth, class T, class F>
UNLEARN_ALWAYS_INLINE inline void for_each_pair(Lines<T> lines, int64_t length, const F& f) {
  using V = VectorRegister<float>;
  int64_t line = 0;
  for (; line + 1 < length; line += 2, lines.data += 2 * lines.step) {
    prefetch_behind<kWidth>(lines.data);
    prefetch_behind<kWidth>(lines.data + lines.step);
    for (int at = 0; at < kWidth; at += kTileSide)
      f(line / kTileDepth, static_cast<int>(line % kTileDepth / 2), at / kTileSide, widened(lines.data + at),
        widened(lines.data + lines.step + at));
  }
  for (; line % kTileDepth != 0 || line < length; line += 2)
    for (int at = 0; at < kWidth; at += kTileSide)
      f(line / kTileDepth, static_cast<int>(line % kTileDepth / 2), at / kTileSide,
        line < length ? widened(lines.data + at) : V{}, V{});
}

inline bool fits(Words largest) {
  uint32_t all = 0;
  for (int lane = 0; lane < kTileSide; ++lane) all = std::max(all, largest[lane]);
  return all <= kLargest;
}

// Lines of 2 * kTileSide values as right factors: [step][part][half] tiles of 16 lines of 16 pairs.
template <int kCount, class T>
bool split_columns(Lines<T> lines, int64_t length, uint16_t* to) {
  Words largest{};
  for_each_pair<2 * kTileSide>(lines, length,
                               [&](int64_t step, int pair, int half, auto even, auto odd) UNLEARN_ALWAYS_INLINE {
                                 Words pairs[kCount];
                                 split(even, odd, pairs, largest);
                                 for (int part = 0; part < kCount; ++part)
                                   memcpy(to + ((step * kCount + part) * 2 + half) * kTileScalars + pair * kTileDepth,
                                          &pairs[part], sizeof(Words));
                               });
  return fits(largest);
}

// Where it was measured to be the faster way: splitting floats has to pay with many rows of products.
template <class T>
bool suits_pairs(const LayerProduct& layer) {
  constexpr int64_t kLeastOutputs = std::is_same_v<T, float> ? 64 : kTileSide;
  return layer.power == 2 && layer.inputs.positions() >= kFewPositions && layer.outputs() >= kLeastOutputs &&
         layer.inputs.columns() >= kTileSide;
}

// What works on one share: `Unit` says how lines become left factors, adds products up, and adds the squares of sums to
// totals. Right factors have one form: see split_columns().
template <class T, class Unit>
class PairsBlock : public Block<T, kTileSide> {
  using Base = Block<T, kTileSide>;
  static constexpr int kCount = Unit::kCount;
  static_assert(Base::kCell == kSumsCell);

 public:
  using A = float;

  static Plan plan(const LayerProduct& layer, int64_t runs, const Exec& exec) { return Unit::plan(layer, runs, exec); }

  template <class... Args>
  explicit PairsBlock(const Args&... args) : Base(args...) {
    const int64_t depth = this->depth(), samples = divide_up(depth, this->layer_.inputs.positions());
    // Tiles of a sample are padded to whole steps; two bfloat16 take the place of a float.
    const int64_t steps = samples * divide_up(divide_up(depth, samples), kTileDepth);
    this->sizes_[Base::kGrads] = kTileSide * depth;
    this->sizes_[Base::kGradTiles] = this->cells_ * steps * kCount * kTileScalars / 2;
    this->sizes_[Base::kInputTiles] = 2 * steps * kCount * kTileScalars / 2;
    this->sizes_[Base::kSums] = 4 * kSumsCell;
  }

  void run(int64_t begin, int64_t end, const PanelMemory& memory, float weight, bool adds, float* fisher) {
    [[maybe_unused]] const typename Unit::Registers registers;
    this->over_samples(begin, end, memory, weight, adds, fisher,
                       [&](const Stretch& at, bool first, bool last) { stretch(at, first, last); });
  }

 private:
  void stretch(const Stretch& at, bool first, bool last) {
    const int64_t length = this->is_split_ ? at.depth() : this->layer_.inputs.positions();
    const int64_t tiles = divide_up(length, kTileDepth) * kCount * kTileScalars;  // of a sample and cell
    auto* a = reinterpret_cast<uint16_t*>(this->at(Base::kGradTiles));
    auto* b = reinterpret_cast<uint16_t*>(this->at(Base::kInputTiles));
    const bool grads_fit = split_grads(at, length, tiles, a);
    this->image_.load(at, this->at(Base::kScratch));
    for (int64_t j = 0; j < this->panels_; ++j) {
      const bool fit = split_inputs(at, j, length, tiles, b) && grads_fit;
      float* product = this->at(Base::kProducts) + (this->is_split_ ? j * this->cells_ * kSumsCell : 0);
      float* total = this->at(Base::kTotals) + j * this->cells_ * kSumsCell;
      if (!fit)
        by_registers(at, j, length, first, last, product, total);
      else if (this->is_split_ && !last)
        Unit::add_up(a, b, this->rows_, length, first, product);
      else
        for (int64_t s = 0; s < at.samples; ++s)
          Unit::finish(a + s * this->cells_ * tiles, b + s * 2 * tiles, this->rows_, length,
                       this->is_split_ ? product : nullptr, total, this->at(Base::kSums));
    }
  }

  bool split_grads(const Stretch& at, int64_t length, int64_t tiles, uint16_t* to) {
    bool fit = true;
    for (int64_t i = 0; i < this->cells_; ++i) {
      const int64_t first = this->first_output_ + i * kTileSide, rows = this->rows_of(i);
      const bool direct = rows == kTileSide && adjacent_lines<T>(this->layer_.grads, first, rows, at, 0).data;
      float* panel = this->at(Base::kGrads);
      if (!direct) pack_positions<T>(this->layer_.grads, first, rows, at, kTileSide, panel);
      for (int64_t s = 0; s < at.samples; ++s) {
        uint16_t* tile = to + (s * this->cells_ + i) * tiles;
        fit &= direct ? Unit::split_rows(adjacent_lines<T>(this->layer_.grads, first, rows, at, s), length, tile)
                      : Unit::split_rows(Lines<float>{panel + s * length * kTileSide, kTileSide}, length, tile);
      }
    }
    return fit;
  }

  bool split_inputs(const Stretch& at, int64_t j, int64_t length, int64_t tiles, uint16_t* to) {
    constexpr int64_t kWidth = 2 * kTileSide;
    const bool direct = this->image_.is_plain() && (j + 1) * kWidth <= this->image_.columns() &&
                        adjacent_lines<T>(this->image_.plain(), j * kWidth, kWidth, at, 0).data;
    float* panel = this->at(Base::kInputs);
    if (!direct) this->image_.pack(at, j, panel);
    bool fit = true;
    for (int64_t s = 0; s < at.samples; ++s) {
      uint16_t* tile = to + s * 2 * tiles;
      fit &= direct ? split_columns<kCount>(adjacent_lines<T>(this->image_.plain(), j * kWidth, kWidth, at, s), length,
                                            tile)
                    : split_columns<kCount>(Lines<float>{panel + s * length * kWidth, kWidth}, length, tile);
    }
    return fit;
  }

  // Packs the gradients anew for every panel of columns: slow, for values that real gradients do not have.
  void by_registers(const Stretch& at, int64_t j, int64_t length, bool first, bool last, float* product, float* total) {
    float *grads = this->at(Base::kGrads), *inputs = this->at(Base::kInputs);
    this->image_.pack(at, j, inputs);
    for (int64_t i = 0; i < this->cells_; ++i)
      for (int64_t r = 0; r < this->rows_of(i); r += kTileRows) {
        const int64_t rows = std::min<int64_t>(kTileRows, this->rows_of(i) - r);
        const int64_t cell = i * kSumsCell + r * 2 * kTileSide;
        pack_positions<T>(this->layer_.grads, this->first_output_ + i * kTileSide + r, rows, at, kTileRows, grads);
        if (this->is_split_)
          multiply_stretch<2>(rows, grads, inputs, length, first, last, product + cell, total + cell);
        else
          for (int64_t s = 0; s < at.samples; ++s)
            multiply<2, Part::whole>(rows, grads + s * length * kTileRows, inputs + s * length * kTileCols<float>,
                                     length, product, total + cell);
      }
  }
};

}  // namespace
}  // namespace unlearn_ext
#endif
