// Products of pairs of bfloat16 in vector registers (AVX512_BF16), each instruction two of them for one of float32: see
// fisher_pairs_cpu.h. Only for bfloat16: what a float32 or float16 is split into would take more instructions than it
// saves. Included by kernel files only.
#pragma once

#include "kernels/fisher_pairs_cpu.h"

#if defined(UNLEARN_MATRIX_UNIT)
namespace unlearn_ext {
namespace {

// sum[n] += a[2n + 1] b[2n + 1], then a[2n] b[2n]. Subnormal factors and sums count as 0. In assembly because the file
// is compiled for all CPUs with AVX-512. Source: Intel, Architecture Instruction Set Extensions Programming Reference.
UNLEARN_ALWAYS_INLINE inline VectorRegister<float> add_pairs(VectorRegister<float> sum, Words a, Words b) {
#if defined(UNLEARN_EMULATED_MATRIX_UNIT)
  for (int n = 0; n < kTileSide; ++n) {
    sum[n] = std::fma(without_subnormal(a[n] & 0xffff0000u), without_subnormal(b[n] & 0xffff0000u), sum[n]);
    sum[n] = std::fma(without_subnormal(a[n] << 16), without_subnormal(b[n] << 16), sum[n]);
  }
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
  return sum;
}

struct DotProducts {
  static constexpr int kCount = 1;
  struct Registers {};

  static Plan plan(const LayerProduct& layer, int64_t, const Exec&) {
    return Plan(layer, kSmallCut, kTileSide, kLanes<float>);
  }

  // Lines of kTileSide values as left factors: a line of pairs for every two.
  template <class L>
  static bool split_rows(Lines<L> lines, int64_t length, uint16_t* to) {
    Words largest{};
    for_each_pair<kTileSide>(lines, length,
                             [&](int64_t step, int pair, int, auto even, auto odd) UNLEARN_ALWAYS_INLINE {
                               Words pairs[kCount];
                               split(even, odd, pairs, largest);
                               memcpy(to + step * kTileScalars + pair * kTileDepth, pairs, sizeof(pairs));
                             });
    return fits(largest);
  }

  static void add_up(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t length, bool first, float* product) {
    for_each_part(a, rows, length, [&](const uint16_t* part, int64_t at) UNLEARN_ALWAYS_INLINE {
      Sums sums;
      load(first ? nullptr : product + at, sums);
      add_products(part, b, length, sums);
      V* to = reinterpret_cast<V*>(product + at);
      UNLEARN_UNROLL
      for (int r = 0; r < kRows; ++r) to[2 * r] = sums[r][0], to[2 * r + 1] = sums[r][1];
    });
  }

  static void finish(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t length, const float* product,
                     float* total, float*) {
    for_each_part(a, rows, length, [&](const uint16_t* part, int64_t at) UNLEARN_ALWAYS_INLINE {
      Sums sums;
      load(product == nullptr ? nullptr : product + at, sums);
      add_products(part, b, length, sums);
      V* to = reinterpret_cast<V*>(total + at);
      UNLEARN_UNROLL
      for (int r = 0; r < kRows; ++r) to[2 * r] += sums[r][0] * sums[r][0], to[2 * r + 1] += sums[r][1] * sums[r][1];
    });
  }

 private:
  using V = VectorRegister<float>;
  static constexpr int kRows = kTileSide / 2;  // 16 sums, two lines of right factors and a pair for a line of the left
  using Sums = V[kRows][2];

  // f(its left factors, its place among the sums) for every half of a cell that has rows.
  template <class F>
  UNLEARN_ALWAYS_INLINE static void for_each_part(const uint16_t* a, int64_t rows, int64_t length, const F& f) {
    const int64_t tiles = divide_up(length, kTileDepth) * kTileScalars;
    for (int64_t r = 0; r < rows; r += kRows) f(a + r / kTileSide * tiles + r % kTileSide * 2, r * 2 * kTileSide);
  }

  UNLEARN_ALWAYS_INLINE static void load(const float* from, Sums& sums) {
    UNLEARN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = from == nullptr ? V{} : *reinterpret_cast<const V*>(from + 2 * r * kTileSide);
      sums[r][1] = from == nullptr ? V{} : *reinterpret_cast<const V*>(from + (2 * r + 1) * kTileSide);
    }
  }

  // Positions past the length are zero in both factors, up to the end of a step: only whole pairs of them are skipped.
  UNLEARN_ALWAYS_INLINE static void add_products(const uint16_t* a, const uint16_t* b, int64_t length, Sums& sums) {
    for (int64_t position = 0; position < length; position += kTileDepth, b += 2 * kTileScalars) {
      const int64_t pairs = std::min<int64_t>(kTileSide, divide_up(length - position, 2));
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Words left = *reinterpret_cast<const Words*>(b + pair * kTileDepth);
        const Words right = *reinterpret_cast<const Words*>(b + kTileScalars + pair * kTileDepth);
        UNLEARN_UNROLL
        for (int r = 0; r < kRows; ++r) {
          uint32_t one;
          memcpy(&one, a + position * kTileSide + pair * kTileDepth + 2 * r, sizeof(one));
          const Words row = Words{} + one;
          sums[r][0] = add_pairs(sums[r][0], row, left);
          sums[r][1] = add_pairs(sums[r][1], row, right);
        }
      }
    }
  }
};

}  // namespace
}  // namespace unlearn_ext
#endif
