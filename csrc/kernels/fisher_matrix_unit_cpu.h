// Products of pairs of bfloat16 by the CPU's matrix unit, which makes 16 times as many of them as vector registers make
// products of float32: see fisher_pairs_cpu.h. Included by kernel files only.
#pragma once

#include "kernels/fisher_pairs_cpu.h"

#if defined(UNLEARN_MATRIX_UNIT)
namespace unlearn_ext {
namespace {

// CPUs with a matrix unit have 2 MB of cache per core. Blocks do not show in the results, stretches do: this has the
// depth of kSmallCut.
constexpr Cut kLargeCut{384, 384 * 576, 256, kTileDepth};

// The sums of kCells x 2 tiles stay in registers 0 to 3; 4 and 5 hold left, 6 and 7 right factors.
template <int kCells>
UNLEARN_ALWAYS_INLINE inline void clear_sums() {
  clear_tile<0>(), clear_tile<1>();
  if constexpr (kCells == 2) clear_tile<2>(), clear_tile<3>();
}

template <int kCells>
UNLEARN_ALWAYS_INLINE inline void load_sums(const float* from) {
  load_tile<0>(from, kSumsRow), load_tile<1>(from + kTileSide, kSumsRow);
  if constexpr (kCells == 2)
    load_tile<2>(from + kSumsCell, kSumsRow), load_tile<3>(from + kSumsCell + kTileSide, kSumsRow);
}

template <int kCells>
UNLEARN_ALWAYS_INLINE inline void store_sums(float* to) {
  store_tile<0>(to, kSumsRow), store_tile<1>(to + kTileSide, kSumsRow);
  if constexpr (kCells == 2)
    store_tile<2>(to + kSumsCell, kSumsRow), store_tile<3>(to + kSumsCell + kTileSide, kSumsRow);
}

// The products of parts of which neither is negligible, in an order in which one factor of two stays.
template <int kCount, class F>
UNLEARN_ALWAYS_INLINE inline void for_each_product(const F& f) {
  constexpr int kLeft[] = {0, 0, 1, 1, 2, 0}, kRight[] = {0, 1, 1, 0, 0, 2};
  constexpr int kProducts = kCount == 3 ? 6 : kCount == 2 ? 4 : 1;
  [&]<int... i>(std::integer_sequence<int, i...>) UNLEARN_ALWAYS_INLINE {
    (f(std::integral_constant<int, kLeft[i]>{}, std::integral_constant<int, kRight[i]>{},
       std::bool_constant < i == 0 || kLeft[i] != kLeft[i > 0 ? i - 1 : 0] > {},
       std::bool_constant < i == 0 || kRight[i] != kRight[i > 0 ? i - 1 : 0] > {}),
     ...);
  }(std::make_integer_sequence<int, kProducts>{});
}

template <int kCount, int kCells>
UNLEARN_ALWAYS_INLINE inline void add_tiles(const uint16_t* a, int64_t cell, const uint16_t* b, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    for_each_product<kCount>([&](auto left, auto right, auto new_left, auto new_right) UNLEARN_ALWAYS_INLINE {
      if constexpr (new_left) {
        load_tile<4>(a + left * kTileScalars, 64);
        if constexpr (kCells == 2) load_tile<5>(a + cell + left * kTileScalars, 64);
      }
      if constexpr (new_right) {
        load_tile<6>(b + right * 2 * kTileScalars, 64);
        load_tile<7>(b + (right * 2 + 1) * kTileScalars, 64);
      }
      multiply_tiles<0, 4, 6>(), multiply_tiles<1, 4, 7>();
      if constexpr (kCells == 2) multiply_tiles<2, 5, 6>(), multiply_tiles<3, 5, 7>();
    });
    a += kCount * kTileScalars;
    b += 2 * kCount * kTileScalars;
  }
}

// The squares of two cells' sums still to be added to their totals: left until the next products are under way, since
// vector registers and the matrix unit work side by side.
struct Pending {
  const float* sums = nullptr;
  float* totals = nullptr;
  int64_t scalars = 0;

  UNLEARN_ALWAYS_INLINE void add() {
    using V = VectorRegister<float>;
    for (int64_t i = 0; i < scalars; i += kLanes<float>) {
      const V sum = *reinterpret_cast<const V*>(sums + i);
      *reinterpret_cast<V*>(totals + i) += sum * sum;
    }
    scalars = 0;
  }
};

template <class T>
struct MatrixUnitProducts {
  static constexpr int kCount = kParts<T>;
  using Registers = MatrixUnit;

  // Large blocks where there are enough of them to go round.
  static Plan plan(const LayerProduct& layer, int64_t runs, const Exec& exec) {
    const Plan large(layer, kLargeCut, kTileSide, kLanes<float>);
    const int64_t tasks = large.blocks(layer) * runs;
    if (tasks % exec.threads == 0 || tasks >= 4 * exec.threads) return large;
    return Plan(layer, kSmallCut, kTileSide, kLanes<float>);
  }

  // Lines of kTileSide values as left factors: [step][part] tiles of a line of 16 pairs per row of the product.
  template <class L>
  static bool split_rows(Lines<L> lines, int64_t length, uint16_t* to) {
    Words largest{};
    Square<float> squares[kCount];
    for_each_pair<kTileSide>(lines, length,
                             [&](int64_t step, int pair, int, auto even, auto odd) UNLEARN_ALWAYS_INLINE {
                               Words pairs[kCount];
                               split(even, odd, pairs, largest);
                               for (int part = 0; part < kCount; ++part)
                                 squares[part].row[pair] = (VectorRegister<float>)pairs[part];
                               if (pair + 1 < kTileSide) return;
                               for (int part = 0; part < kCount; ++part) {
                                 transpose(squares[part]);
                                 memcpy(to + (step * kCount + part) * kTileScalars, &squares[part], kTileBytes);
                               }
                             });
    return fits(largest);
  }

  // f with the number of cells, two or one, from cell i of so many on.
  template <class F>
  UNLEARN_ALWAYS_INLINE static void with_cells(int64_t i, int64_t cells, const F& f) {
    if (i + 1 < cells)
      f(std::integral_constant<int, 2>{});
    else
      f(std::integral_constant<int, 1>{});
  }

  static void add_up(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t length, bool first, float* product) {
    const int64_t all = divide_up(rows, kTileSide), steps = divide_up(length, kTileDepth);
    const int64_t tiles = steps * kCount * kTileScalars;
    for (int64_t i = 0; i < all; i += 2)
      with_cells(i, all, [&](auto cells) UNLEARN_ALWAYS_INLINE {
        first ? clear_sums<cells>() : load_sums<cells>(product + i * kSumsCell);
        add_tiles<kCount, cells>(a + i * tiles, tiles, b, steps);
        store_sums<cells>(product + i * kSumsCell);
      });
  }

  static void finish(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t length, const float* product,
                     float* total, float* memory) {
    const int64_t all = divide_up(rows, kTileSide), steps = divide_up(length, kTileDepth);
    const int64_t tiles = steps * kCount * kTileScalars;
    Pending pending;
    for (int64_t i = 0; i < all; i += 2) {
      float* sums = memory + i / 2 % 2 * 2 * kSumsCell;
      with_cells(i, all, [&](auto cells) UNLEARN_ALWAYS_INLINE {
        product == nullptr ? clear_sums<cells>() : load_sums<cells>(product + i * kSumsCell);
        add_tiles<kCount, cells>(a + i * tiles, tiles, b, steps);
        pending.add();
        store_sums<cells>(sums);
        pending = {sums, total + i * kSumsCell, cells * kSumsCell};
      });
    }
    pending.add();
  }
};

}  // namespace
}  // namespace unlearn_ext
#endif
