// Register-tiled products of packed panels on the CPU. Included by kernel files only, each built once per instruction
// set: the unnamed namespace keeps every build's copy to itself.
//
// Both operands are packed so that the inner loop reads them front to back: `a` as [depth][kRows<A>], `b` as
// [depth][kCols<A>]. Whoever packs decides what a row is (a tensor's rows, im2col patches, converted halves), so no
// operand is ever materialised beyond its panels.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#include "core/compiler.h"
#include "core/dtype.h"

namespace unlearn_ext {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kTileRows = 12;  // 24 accumulators, two columns of B and a broadcast fit 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;
#endif

template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
template <class A>
constexpr int kTileCols = 2 * kLanes<A>;
template <class A>
using VectorRegister = typename VectorOf<A, kVectorBytes>::type;

// sum[r][n] += sum_k a[k][r] * b[k][n] over `depth` lines of both panels, of the first kRows rows. In registers only if
// kRows of them fit.
template <int kRows, class A>
UNLEARN_ALWAYS_INLINE inline void add_products(const A* __restrict__ a, const A* __restrict__ b, int64_t depth,
                                               VectorRegister<A> (&sum)[kRows][2]) {
  using Vector = VectorRegister<A>;
  for (int64_t k = 0; k < depth; ++k) {
    const Vector left = *reinterpret_cast<const Vector*>(b);
    const Vector right = *reinterpret_cast<const Vector*>(b + kLanes<A>);
    UNLEARN_UNROLL
    for (int r = 0; r < kRows; ++r) {
      sum[r][0] += a[r] * left;
      sum[r][1] += a[r] * right;
    }
    a += kTileRows;
    b += kTileCols<A>;
  }
}

// c[r][n] = sum_k a[k][r] * b[k][n], or += with `accumulate`.
template <class A>
UNLEARN_ALWAYS_INLINE inline void multiply_panels(const A* __restrict__ a, const A* __restrict__ b, int64_t depth,
                                                  A (&c)[kTileRows][kTileCols<A>], bool accumulate) {
  using Vector = VectorRegister<A>;
  Vector sum[kTileRows][2] = {};
  add_products(a, b, depth, sum);
  UNLEARN_UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    Vector* row = reinterpret_cast<Vector*>(c[r]);
    row[0] = accumulate ? row[0] + sum[r][0] : sum[r][0];
    row[1] = accumulate ? row[1] + sum[r][1] : sum[r][1];
  }
}

// Cache-line aligned memory of one thread for the time of one call.
class PanelMemory {
 public:
  explicit PanelMemory(int64_t bytes)
      : memory_(std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64))) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  ~PanelMemory() { std::free(memory_); }
  PanelMemory(const PanelMemory&) = delete;
  PanelMemory& operator=(const PanelMemory&) = delete;

  template <class A>
  A* at(int64_t element) const {
    return static_cast<A*>(memory_) + element;
  }

 private:
  void* memory_;
};

}  // namespace
}  // namespace unlearn_ext
