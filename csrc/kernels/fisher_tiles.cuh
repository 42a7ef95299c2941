// Tiles of per-sample weight gradients on a GPU: the products of a sample so far, and the sums of their powers over the
// samples before it. Included by fisher_weight.cu only.
//
// Registers hold both, which halves the tile that a plain product would have. A block of 128 x 128 halves does 64 flops
// per byte it reads from the L2 cache: an estimate: the 5.5 to 7 TB/s of an H100 feed 350 to 450 Tflop/s, where
// mma.sync could do 600. Shared memory is nearly as busy: per 16 rows 24 KiB of fragments and 8 KiB of copies, 250
// clocks, next to 210 clocks of multiplication. So every fragment is read once, early, and by whole instructions of 16
// bytes per lane.
#pragma once

#include "kernels/fisher_loaders.cuh"

namespace unlearn_ext {
namespace {

// By tensor cores, kRows x kCols fragments of 16 x 8 to a warp. T: BFloat16, Half, or float for tf32. kHalves: samples
// may end in the middle of a step, whose halves are then multiplied by instructions half as deep.
template <class T, int kWarpsM, int kWarpsN, int kRows, int kCols, int kMinBlocks, bool kGathers, bool kHalves>
struct MmaTile {
  using Element = T;
  using Shared = T;
  using Acc = float;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kBlocks = kMinBlocks, kStages = 4;
  static constexpr int kM = 16 * kRows * kWarpsM, kN = 8 * kCols * kWarpsN;
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T)), kDepth = 2 * kStep;
  static constexpr int kBatches = kRows, kBatch = 4 * kCols;
  static constexpr int kPadding = kHalves ? kStep / 2 : kStep;  // samples are padded to a multiple of this
  static constexpr bool kBySample = true, kStartsAnew = true;
  // Fragments of the next step are read while those of this one are multiplied; where a gathering loader needs the
  // registers, other warps have to fill the gap.
  static constexpr bool kReadsAhead = !kGathers;
  struct Fragments {
    uint32_t grads[kRows][4], inputs[kCols][2];
  };
  using GradsLayout = Permuted<T, kM>;
  using InputsLayout = Permuted<T, kN>;
  template <class Side, class Layout>
  using Load = std::conditional_t<sizeof(T) == 2 && kGathers, HalfLoader<Side, Layout, kDepth, kThreads>,
                                  Loader<Side, Layout, kDepth, kThreads, kGathers>>;

  float product[kRows][kCols][4] = {}, total[kRows][kCols][4] = {};
  int m0, n0;  // of the warp
  // Where the lane reads, in bytes. Halves: its row of each ldmatrix, of the grads and then of the inputs. Floats: its
  // element of a fragment, by the three bits of the chunk's number that the layout permutes.
  static constexpr int kPlaces = sizeof(T) == 2 ? kRows + kCols / 2 : 8;
  int places[kPlaces];

  __device__ __forceinline__ MmaTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    m0 = warp % kWarpsM * (16 * kRows);
    n0 = warp / kWarpsM * (8 * kCols);
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        places[i] = 2 * GradsLayout::place(lane() / 16 * 8 + lane() % 8, m0 + 16 * i + lane() / 8 % 2 * 8);
#pragma unroll
      for (int j = 0; j < kCols / 2; ++j)
        places[kRows + j] = 2 * InputsLayout::place(lane() % 16, n0 + 16 * j + lane() / 16 * 8);
    } else {
      static_assert(kM == kN && 16 * kRows % 32 == 0 && 8 * kCols % 32 == 0);
#pragma unroll
      for (int i = 0; i < kPlaces; ++i)
        places[i] = 4 * (lane() % 4 * kM + (i ^ lane() / 16 ^ lane() % 4 * 2) * 4 + lane() / 4 % 4);
    }
#pragma unroll
    for (int i = 0; i < kPlaces; ++i) simt::keep(places[i]);
  }
  // Element `i` of batch `b` is in this row and this column of the tile.
  __device__ __forceinline__ int m(int b, int i) const { return m0 + 16 * b + i % 4 / 2 * 8 + lane() / 4; }
  __device__ __forceinline__ int n(int, int i) const { return n0 + i / 4 * 8 + lane() % 4 * 2 + i % 2; }
  __device__ __forceinline__ float value(int b, int i) const { return total[b][i / 4][i % 4]; }
  // Four elements side by side, made of elements [i, i + 4) of this lane's and its neighbour's batch `b`: the even one
  // gets the upper row, the odd one the lower. For whole warps.
  __device__ __forceinline__ void chunk(int b, int i, int& m, int& n, Chunk<float>& to) const {
    const bool odd = lane() % 2 != 0;
    const float(&mine)[4] = total[b][i / 4];
    const float first = __shfl_xor_sync(0xffffffffu, odd ? mine[0] : mine[2], 1);
    const float second = __shfl_xor_sync(0xffffffffu, odd ? mine[1] : mine[3], 1);
    to.set(0, odd ? first : mine[0]), to.set(1, odd ? second : mine[1]);
    to.set(2, odd ? mine[2] : first), to.set(3, odd ? mine[3] : second);
    m = m0 + 16 * b + (odd ? 8 : 0) + lane() / 4;
    n = n0 + i / 4 * 8 + lane() % 4 / 2 * 4;
  }
  // Nothing of the thread's share is within these bounds; the same for all lanes.
  __device__ __forceinline__ bool idle(int rows, int columns) const { return m0 >= rows || n0 >= columns; }

  // Rows [k, k + kStep) of the tiles.
  __device__ __forceinline__ void read(const T* grads, const T* inputs, int k, Fragments& to) const {
    if constexpr (sizeof(T) == 2) {
      static_assert(kCols % 2 == 0);
#pragma unroll
      for (int j = 0; j < kCols; j += 2) {
        uint32_t r[4];
        simt::ldmatrix_x4_trans(r, at(inputs + k * kN, kRows + j / 2));
        to.inputs[j][0] = r[0], to.inputs[j][1] = r[1], to.inputs[j + 1][0] = r[2], to.inputs[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) simt::ldmatrix_x4_trans(to.grads[i], at(grads + k * kM, i));
    } else {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          to.inputs[j][h] = simt::to_tf32(*at(inputs + n0 + (k + 4 * h) * kN + j / 4 * 32, j % 4 * 2 | h));
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int h = 0; h < 4; ++h)
          to.grads[i][h] =
              simt::to_tf32(*at(grads + m0 + (k + h / 2 * 4) * kM + i / 2 * 32, i % 2 * 4 | h % 2 * 2 | h / 2));
    }
  }

  // kFirst: of a sample, whose products start from nothing.
  template <simt::Part kPart, bool kFirst>
  __device__ __forceinline__ void multiply(const Fragments& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        if constexpr (kFirst)
          multiply<kPart>(product[i][j], f.grads[i], f.inputs[j], {});
        else
          multiply<kPart>(product[i][j], f.grads[i], f.inputs[j], product[i][j]);
      }
  }

  __device__ __forceinline__ void end_sample(int power) {
    if (power == 2)
      each([](float p, float& sum) { sum = plus_raised<2>(sum, p); });
    else
      each([](float p, float& sum) { sum = plus_raised<1>(sum, p); });
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(product[i][j][e], total[i][j][e]);
  }
  template <simt::Part kPart>
  __device__ __forceinline__ static void multiply(float (&to)[4], const uint32_t (&grads)[4],
                                                  const uint32_t (&inputs)[2], const float (&before)[4]) {
    if constexpr (std::is_same_v<T, BFloat16>)
      simt::mma_bf16<kPart>(to, grads, inputs, before);
    else if constexpr (std::is_same_v<T, Half>)
      simt::mma_f16<kPart>(to, grads, inputs, before);
    else
      simt::mma_tf32<kPart>(to, grads, inputs, before);
  }
  __device__ __forceinline__ const T* at(const T* tile, int i) const {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(tile) + places[i]);
  }
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
};

// By the ordinary units, exact to the compute type, kRows x kCols elements to a thread. kPowers: samples of one
// position, whose powers are multiplied instead, (g a)^2 = g^2 a^2; there is nothing to raise afterwards.
template <class T, int kRows, int kCols, int kMinBlocks, bool kPowers>
struct FmaTile {
  using Element = T;
  using Shared = acc_t<T>;
  using Acc = acc_t<T>;
  static constexpr int kAcross = 16, kThreads = kAcross * kAcross, kBlocks = kMinBlocks, kStages = 2;
  static constexpr int kM = kRows * kAcross, kN = kCols * kAcross, kDepth = 16;
  static constexpr int kStep = kPowers ? kDepth : 4, kPadding = kPowers ? 1 : kStep;
  static constexpr int kBatches = kRows, kBatch = kCols;
  // Products are cleared when a sample ends: for two kinds of steps some architectures lack the registers.
  static constexpr bool kBySample = !kPowers, kReadsAhead = false, kStartsAnew = false;
  struct Fragments {  // nothing is worth reading early: a step is long
    const Shared *grads, *inputs;
    int k;
  };
  using GradsLayout = Padded<Acc, kM>;
  using InputsLayout = Padded<Acc, kN>;
  template <class Side, class Layout>
  using Load = std::conditional_t<kPowers, PowerLoader<T, Side, Layout, kDepth, kThreads>,
                                  Loader<Side, Layout, kDepth, kThreads, true>>;

  Acc product[kRows][kCols] = {}, total[kPowers ? 1 : kRows][kPowers ? 1 : kCols] = {};

  __device__ __forceinline__ int m(int b, int) const { return at(b, static_cast<int>(threadIdx.x) / kAcross); }
  __device__ __forceinline__ int n(int, int i) const { return at(i, static_cast<int>(threadIdx.x) % kAcross); }
  __device__ __forceinline__ Acc value(int b, int i) const {
    if constexpr (kPowers)
      return product[b][i];
    else
      return total[b][i];
  }
  // Elements [i, i + kChunk<Acc>) of batch `b`, side by side.
  __device__ __forceinline__ void chunk(int b, int i, int& row, int& column, Chunk<Acc>& to) const {
    row = m(b, i), column = n(b, i);
#pragma unroll
    for (int j = 0; j < kChunk<Acc>; ++j) to.set(j, value(b, i + j));
  }
  __device__ __forceinline__ bool idle(int rows, int columns) const { return m(0, 0) >= rows || n(0, 0) >= columns; }

  __device__ __forceinline__ void read(const Acc* grads, const Acc* inputs, int k, Fragments& to) const {
    to = {grads, inputs, k};
  }
  template <simt::Part, bool>
  __device__ __forceinline__ void multiply(const Fragments& f) {
#pragma unroll 4
    for (int depth = 0; depth < kStep; ++depth) {
      Acc a[kRows], b[kCols];
      chunks<GradsLayout>(f.grads, f.k + depth, static_cast<int>(threadIdx.x) / kAcross, a);
      chunks<InputsLayout>(f.inputs, f.k + depth, static_cast<int>(threadIdx.x) % kAcross, b);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kCols; ++j) product[i][j] = fused_multiply_add(a[i], b[j], product[i][j]);
    }
  }

  __device__ __forceinline__ void end_sample(int power) {
    if constexpr (!kPowers) {
      if (power == 2)
        each([](Acc p, Acc& sum) { sum = plus_raised<2>(sum, p); });
      else
        each([](Acc p, Acc& sum) { sum = plus_raised<1>(sum, p); });
    }
  }

 private:
  template <class F>
  __device__ __forceinline__ void each(const F& f) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) f(product[i][j], total[i][j]), product[i][j] = 0;
  }
  // Chunks of neighbouring threads are neighbours.
  __device__ __forceinline__ static int at(int i, int thread) {
    return (i / kChunk<Acc> * kAcross + thread) * kChunk<Acc> + i % kChunk<Acc>;
  }
  template <class Layout, int kCount>
  __device__ __forceinline__ static void chunks(const Acc* tile, int k, int thread, Acc (&to)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += kChunk<Acc>) {
      const auto chunk = *reinterpret_cast<const Chunk<Acc>*>(tile + Layout::place(k, at(i, thread)));
#pragma unroll
      for (int j = 0; j < kChunk<Acc>; ++j) to[i + j] = chunk[j];
    }
  }
};

}  // namespace
}  // namespace unlearn_ext
