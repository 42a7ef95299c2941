// A block of F by products in vector registers. Three cases:
//
//   many positions   a product per sample and tile; products of more positions than fit a stretch are added up first
//   few positions    half tiles, whose totals stay in registers while the samples pass
//   one position     |g a|^p = |g|^p |a|^p: one product of the powers, with the samples as its depth
//
// Included by kernel files only: see gemm_cpu.h on the unnamed namespace.
#pragma once

#include "kernels/fisher_block_cpu.h"

namespace unlearn_ext {
namespace {

constexpr int64_t kFewPositions = 20;  // products shorter than this are squared in registers

enum class Part { whole, first, middle, last, plain };

// One tile, kRows x kTileCols, of a sample's product over `depth` positions. `total` gets its power, `product` holds
// what earlier stretches of the sample gave; a plain tile is added to `total` as it is.
template <int kRows, int kPower, Part kPart, class A>
UNLEARN_ALWAYS_INLINE inline void multiply_tile(const A* __restrict__ a, const A* __restrict__ b, int64_t depth,
                                                A* __restrict__ product, A* __restrict__ total) {
  using V = VectorRegister<A>;
  V sum[kRows][2] = {};
  add_products(a, b, depth, sum);
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
    V sum[kRows][2] = {};
    add_products(a, b, positions, sum);
    a += positions * kTileRows;
    b += positions * kTileCols<A>;
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

// One of several stretches of a sample's positions.
template <int kPower, class A>
void multiply_stretch(int64_t rows, const A* a, const A* b, int64_t depth, bool first, bool last, A* product,
                      A* total) {
  if (first)
    multiply<kPower, Part::first>(rows, a, b, depth, product, total);
  else if (last)
    multiply<kPower, Part::last>(rows, a, b, depth, product, total);
  else
    multiply<kPower, Part::middle>(rows, a, b, depth, product, total);
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

template <int kPower, class T>
class RegisterBlock : public Block<T, kTileRows> {
  using Base = Block<T, kTileRows>;

 public:
  using A = acc_t<T>;

  static Plan plan(const LayerProduct& layer, int64_t, const Exec&) {
    return Plan(layer, kRegisterCut, kTileRows, kLanes<A>);
  }

  template <class... Args>
  explicit RegisterBlock(const Args&... args) : Base(args...) {
    this->sizes_[Base::kGrads] = this->cells_ * kTileRows * this->depth();
  }

  void run(int64_t begin, int64_t end, const PanelMemory& memory, A weight, bool adds, A* fisher) {
    this->over_samples(begin, end, memory, weight, adds, fisher,
                       [&](const Stretch& at, bool first, bool last) { stretch(at, first, last); });
  }

 private:
  void stretch(const Stretch& at, bool first, bool last) {
    const int64_t depth = at.depth(), positions = this->layer_.inputs.positions(), tiles = this->cells_;
    A *grads = this->at(Base::kGrads), *inputs = this->at(Base::kInputs);
    for (int64_t i = 0; i < tiles; ++i)
      pack_positions<T>(this->layer_.grads, this->first_output_ + i * kTileRows, this->rows_of(i), at, kTileRows,
                        grads + i * kTileRows * depth);
    if (positions == 1) raise<kPower>(grads, tiles * kTileRows * depth);
    this->image_.load(at, this->at(Base::kScratch));
    for (int64_t j = 0; j < this->panels_; ++j) {
      this->image_.pack(at, j, inputs);
      if (positions == 1) raise<kPower>(inputs, kTileCols<A> * depth);
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t cell = (j * tiles + i) * Base::kCell, rows = this->rows_of(i);
        const A* a = grads + i * kTileRows * depth;
        A *total = this->at(Base::kTotals) + cell, *product = this->at(Base::kProducts) + cell;
        if (positions == 1)
          multiply<kPower, Part::plain>(rows, a, inputs, depth, product, total);
        else if (positions < kFewPositions)
          multiply_short<kPower>(rows, a, inputs, positions, at.samples, total);
        else if (this->is_split_)
          multiply_stretch<kPower>(rows, a, inputs, depth, first, last, product, total);
        else
          for (int64_t s = 0; s < at.samples; ++s)
            multiply<kPower, Part::whole>(rows, a + s * positions * kTileRows, inputs + s * positions * kTileCols<A>,
                                          positions, product, total);
      }
    }
  }
};

}  // namespace
}  // namespace unlearn_ext
