// Tiles of per-sample weight gradients on a GPU: how operands get into shared memory, and how the threads of a block
// multiply them. Included by fisher_weight.cu only.
//
// A tile of outputs is as wide as a block's tile of F and kDepth rows deep, a row being a position of a sample. Both
// operands lie in shared memory as [row][channel], in chunks of 16 bytes.
#pragma once

#include "core/mma.cuh"
#include "kernels/fisher_layers.h"

namespace unlearn_ext {
namespace {

// ---- Operands

// One row of a tile: a position of a sample.
struct alignas(16) Position {
  int64_t grads, inputs;  // where it is, in elements; an input can lie before the tensor, in padding
  uint32_t at[3];         // the image position that tap 0 sees
  bool inside;            // false behind the last sample and from the end of one to the next whole step
};

// One column of a tile: a channel of the inputs, seen through a tap.
struct alignas(16) Column {
  int64_t offset;     // from a row's place, in elements
  uint32_t shift[3];  // of the image position
  int to;             // its place in a row of F
};

// Images are at most this large along any axis. No sum with these is inside one, not even that of both.
constexpr int64_t kLargestExtent = 1 << 29;
constexpr uint32_t kNoRow = 1u << 31, kNoColumn = 1u << 30;

// An operand as the loaders see it: at(row, column(m)) is the address of an element, null for one that is not there.
template <class T>
struct Grads {
  const T* data;  // of the tile's first output
  int64_t stride;
  int width;

  struct Channel {
    int64_t offset;
    bool inside;
  };
  __device__ __forceinline__ Channel column(int m) const { return {m * stride, m < width}; }
  __device__ __forceinline__ const T* at(const Position& row, const Channel& c) const {
    return row.inside && c.inside ? data + (row.grads + c.offset) : nullptr;
  }
};

template <class T>
struct Inputs {
  const T* data;  // of the group
  const Column* columns;
  uint32_t in[3];

  __device__ __forceinline__ Column column(int m) const { return columns[m]; }
  __device__ __forceinline__ const T* at(const Position& row, const Column& c) const {
    const bool inside =
        row.at[0] + c.shift[0] < in[0] && row.at[1] + c.shift[1] < in[1] && row.at[2] + c.shift[2] < in[2];
    return inside ? data + (row.inputs + c.offset) : nullptr;
  }
};

// How an operand may be read.
struct Access {
  bool vectors;          // whole chunks: neighbouring channels lie side by side, and every chunk is aligned
  bool along_positions;  // neighbouring positions are closer together than neighbouring channels
};

// ---- Shared memory

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// Where element (k, m) of a tile is. Chunks are permuted within eight neighbouring rows so that no two lanes of an
// ldmatrix, of a tf32 fragment or of a store along positions meet in a bank.
template <class T, int kWidth>
__device__ __forceinline__ int place(int k, int m) {
  static_assert(kWidth / kChunk<T> >= 8);
  const int turn = (k & 3) << 1 | (k >> 2 & 1);
  return k * kWidth + ((m / kChunk<T> ^ turn) * kChunk<T> | m % kChunk<T>);
}

// Which element a thread moves in its turn e, with kUnits units to a row: lanes along the axis that is dense in memory,
// but only eight along positions, or their stores would meet in a bank.
template <int kUnits>
__device__ __forceinline__ void spread(int e, bool along_positions, int& k, int& unit) {
  if (along_positions) {
    k = (e & 7) + e / 32 / (kUnits / 4) * 8;
    unit = (e >> 3 & 3) + e / 32 % (kUnits / 4) * 4;
  } else {
    k = e / kUnits;
    unit = e % kUnits;
  }
}

template <class T>
struct alignas(sizeof(T) * kChunk<T>) Chunk {
  T lane[kChunk<T>];
};

// ---- Loaders: fetch() starts reading a tile, deposit() makes sure that it is on its way to shared memory

// Copies that bypass registers: whole chunks, or single elements of at least 4 bytes.
template <class T, int kWidth, int kDepth, int kThreads, bool kGather>
struct Loader {
  template <class Side>
  __device__ __forceinline__ void fetch(const Side& side, const Position* rows, T* tile, Access access, int) {
    const int thread = static_cast<int>(threadIdx.x);
    if (access.vectors) {
      constexpr int kChunks = kWidth / kChunk<T>;
      static_assert(kThreads % kChunks == 0 && kChunks * kDepth % kThreads == 0);
      const int m = thread % kChunks * kChunk<T>;
      const auto column = side.column(m);
#pragma unroll
      for (int i = 0; i < kChunks * kDepth / kThreads; ++i) {
        const int k = thread / kChunks + i * (kThreads / kChunks);
        const T* from = side.at(rows[k], column);
        simt::cp_async<16>(tile + place<T, kWidth>(k, m), from != nullptr ? from : side.data, from != nullptr);
      }
    } else if constexpr (kGather) {
#pragma unroll
      for (int i = 0; i < kWidth * kDepth / kThreads; ++i) {
        int k, m;
        spread<kWidth>(thread + i * kThreads, access.along_positions, k, m);
        const T* from = side.at(rows[k], side.column(m));
        simt::cp_async<sizeof(T)>(tile + place<T, kWidth>(k, m), from != nullptr ? from : side.data, from != nullptr);
      }
    }
  }
  __device__ __forceinline__ void deposit(T*, Access) {}
};

// Single 16-bit elements go through registers: no asynchronous copy is that small.
template <class T, int kWidth, int kDepth, int kThreads>
struct HalfLoader : Loader<T, kWidth, kDepth, kThreads, false> {
  static constexpr int kPairs = kWidth * kDepth / kThreads / 2;
  uint16_t raw[kPairs][2];

  template <class Side>
  __device__ __forceinline__ void fetch(const Side& side, const Position* rows, T* tile, Access access, int power) {
    if (access.vectors)
      return Loader<T, kWidth, kDepth, kThreads, false>::fetch(side, rows, tile, access, power);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      int k, pair;
      spread<kWidth / 2>(static_cast<int>(threadIdx.x) + i * kThreads, access.along_positions, k, pair);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const T* from = side.at(rows[k], side.column(2 * pair + j));
        raw[i][j] = from != nullptr ? from->bits : 0;
      }
    }
  }
  __device__ __forceinline__ void deposit(T* tile, Access access) {
    if (access.vectors) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      int k, pair;
      spread<kWidth / 2>(static_cast<int>(threadIdx.x) + i * kThreads, access.along_positions, k, pair);
      *reinterpret_cast<uint32_t*>(tile + place<T, kWidth>(k, 2 * pair)) =
          raw[i][0] | static_cast<uint32_t>(raw[i][1]) << 16;
    }
  }
};

// Elements raised to the power on the way, in the compute type.
template <class T, int kWidth, int kDepth, int kThreads>
struct PowerLoader {
  using A = acc_t<T>;
  static constexpr int kChunks = kWidth / kChunk<A>, kEach = kChunks * kDepth / kThreads;
  struct alignas(sizeof(T) * kChunk<A>) Raw {
    T lane[kChunk<A>];
  };
  Raw raw[kEach];
  int power;

  template <class Side>
  __device__ __forceinline__ void fetch(const Side& side, const Position* rows, A*, Access access, int p) {
    power = p;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kThreads, m = e % kChunks * kChunk<A>;
      const Position row = rows[e / kChunks];
      raw[i] = {};
      if (access.vectors) {
        if (const T* from = side.at(row, side.column(m))) raw[i] = *reinterpret_cast<const Raw*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk<A>; ++j)
          if (const T* from = side.at(row, side.column(m + j))) raw[i].lane[j] = *from;
      }
    }
  }
  __device__ __forceinline__ void deposit(A* tile, Access) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kThreads;
      Chunk<A> chunk;
#pragma unroll
      for (int j = 0; j < kChunk<A>; ++j) {
        const A x = static_cast<A>(raw[i].lane[j]);
        chunk.lane[j] = power == 2 ? x * x : x < 0 ? -x : x;
      }
      *reinterpret_cast<Chunk<A>*>(tile + place<A, kWidth>(e / kChunks, e % kChunks * kChunk<A>)) = chunk;
    }
  }
};

template <class A>
__device__ __forceinline__ A raised(A x, int power) {
  return power == 2 ? x * x : x < 0 ? -x : x;
}

// ---- Tiles: the products of a sample so far, and the sums of their powers over the samples before it
//
// Registers hold both, which halves the tile a plain product would have. A block of 128 x 128 then reads 2 x 128
// elements per row for 128^2 multiplications: at 2 bytes 32 flops per byte from the L2 cache, 3/4 of what an H100 needs
// to keep mma.sync busy (about 0.6 of its wgmma rate). Shared memory is as busy: 24 KiB of fragments to 8 KiB of
// copies per 16 rows, 250 clocks next to about 210 of multiplication.

// By tensor cores, kRows x kCols fragments of 16 x 8 to a warp. T: BFloat16, Half, or float for tf32.
template <class T, int kWarpsM, int kWarpsN, int kRows, int kCols, int kMinBlocks, bool kGathers>
struct MmaTile {
  using Element = T;
  using Shared = T;
  using Acc = float;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN, kBlocks = kMinBlocks, kStages = 4;
  static constexpr int kM = 16 * kRows * kWarpsM, kN = 8 * kCols * kWarpsN;
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T)), kDepth = 2 * kStep;
  static constexpr int kBatches = kRows, kBatch = 4 * kCols;
  static constexpr bool kBySample = true;
  template <int kWidth>
  using Load = std::conditional_t<sizeof(T) == 2 && kGathers, HalfLoader<T, kWidth, kDepth, kThreads>,
                                  ::unlearn_ext::Loader<T, kWidth, kDepth, kThreads, kGathers>>;

  float product[kRows][kCols][4] = {}, total[kRows][kCols][4] = {};
  int m0, n0;  // of the warp

  __device__ __forceinline__ MmaTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    m0 = warp % kWarpsM * (16 * kRows);
    n0 = warp / kWarpsM * (8 * kCols);
  }
  // Element `i` of batch `b` is in this row and this column of the tile.
  __device__ __forceinline__ int m(int b, int i) const { return m0 + 16 * b + i % 4 / 2 * 8 + lane() / 4; }
  __device__ __forceinline__ int n(int, int i) const { return n0 + i / 4 * 8 + lane() % 4 * 2 + i % 2; }
  __device__ __forceinline__ float value(int b, int i) const { return total[b][i / 4][i % 4]; }
  // Nothing of the thread's share is within these bounds; the same for all lanes.
  __device__ __forceinline__ bool idle(int rows, int columns) const { return m0 >= rows || n0 >= columns; }

  // Rows [k, k + kStep) of the tiles.
  __device__ __forceinline__ void step(const T* grads, const T* inputs, int k) {
    uint32_t b[kCols][2];
    if constexpr (sizeof(T) == 2) {
      static_assert(kCols % 2 == 0);
#pragma unroll
      for (int j = 0; j < kCols; j += 2) {
        uint32_t r[4];
        simt::ldmatrix_x4_trans(r, inputs + place<T, kN>(k + lane() % 16, n0 + 8 * j + lane() / 16 * 8));
        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          b[j][h] = simt::to_tf32(inputs[place<T, kN>(k + lane() % 4 + 4 * h, n0 + 8 * j + lane() / 4)]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      uint32_t a[4];
      if constexpr (sizeof(T) == 2) {
        const int row = k + lane() / 16 * 8 + lane() % 8, column = m0 + 16 * i + lane() / 8 % 2 * 8;
        simt::ldmatrix_x4_trans(a, grads + place<T, kM>(row, column));
      } else {
#pragma unroll
        for (int h = 0; h < 4; ++h)
          a[h] = simt::to_tf32(
              grads[place<T, kM>(k + lane() % 4 + h / 2 * 4, m0 + 16 * i + h % 2 * 8 + lane() / 4)]);
      }
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        if constexpr (std::is_same_v<T, BFloat16>)
          simt::mma_bf16(product[i][j], a, b[j]);
        else if constexpr (std::is_same_v<T, Half>)
          simt::mma_f16(product[i][j], a, b[j]);
        else
          simt::mma_tf32(product[i][j], a, b[j]);
      }
    }
  }

  __device__ __forceinline__ void end_sample(int power) {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& p = product[i][j][e];
          total[i][j][e] = power == 2 ? fused_multiply_add(p, p, total[i][j][e]) : total[i][j][e] + fabsf(p);
          p = 0;
        }
  }

 private:
  __device__ __forceinline__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
};

// By the ordinary units, exact to the compute type, kRows x kCols elements to a thread. kPowers: samples of one
// position, whose powers are multiplied instead, (g a)^2 = g^2 a^2; there is nothing to raise afterwards.
template <class T, int kRows, int kCols, int kMinBlocks, bool kPowers>
struct FmaTile {
  using Element = T;
  using Shared = acc_t<T>;
  using Acc = acc_t<T>;
  static constexpr int kAcross = 16, kThreads = kAcross * kAcross, kBlocks = kMinBlocks, kStages = 3;
  static constexpr int kM = kRows * kAcross, kN = kCols * kAcross, kDepth = 16;
  static constexpr int kStep = kPowers ? kDepth : 4;
  static constexpr int kBatches = kRows, kBatch = kCols;
  static constexpr bool kBySample = !kPowers;
  template <int kWidth>
  using Load = std::conditional_t<kPowers, PowerLoader<T, kWidth, kDepth, kThreads>,
                                  ::unlearn_ext::Loader<T, kWidth, kDepth, kThreads, true>>;

  Acc product[kRows][kCols] = {}, total[kPowers ? 1 : kRows][kPowers ? 1 : kCols] = {};

  __device__ __forceinline__ int m(int b, int) const { return at(b, static_cast<int>(threadIdx.x) / kAcross); }
  __device__ __forceinline__ int n(int, int i) const { return at(i, static_cast<int>(threadIdx.x) % kAcross); }
  __device__ __forceinline__ Acc value(int b, int i) const {
    if constexpr (kPowers)
      return product[b][i];
    else
      return total[b][i];
  }
  __device__ __forceinline__ bool idle(int rows, int columns) const { return m(0, 0) >= rows || n(0, 0) >= columns; }

  __device__ __forceinline__ void step(const Acc* grads, const Acc* inputs, int k) {
#pragma unroll 4
    for (int depth = 0; depth < kStep; ++depth) {
      Acc a[kRows], b[kCols];
      read<kM>(grads, k + depth, static_cast<int>(threadIdx.x) / kAcross, a);
      read<kN>(inputs, k + depth, static_cast<int>(threadIdx.x) % kAcross, b);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kCols; ++j) product[i][j] = fused_multiply_add(a[i], b[j], product[i][j]);
    }
  }

  __device__ __forceinline__ void end_sample(int power) {
    if constexpr (kPowers) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kCols; ++j) {
        total[i][j] += raised(product[i][j], power);
        product[i][j] = 0;
      }
  }

 private:
  // Chunks of neighbouring threads are neighbours.
  __device__ __forceinline__ static int at(int i, int thread) {
    return (i / kChunk<Acc> * kAcross + thread) * kChunk<Acc> + i % kChunk<Acc>;
  }
  template <int kWidth, int kCount>
  __device__ __forceinline__ static void read(const Acc* tile, int k, int thread, Acc (&to)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; i += kChunk<Acc>) {
      const auto chunk = *reinterpret_cast<const Chunk<Acc>*>(tile + place<Acc, kWidth>(k, at(i, thread)));
#pragma unroll
      for (int j = 0; j < kChunk<Acc>; ++j) to[i + j] = chunk.lane[j];
    }
  }
};

}  // namespace
}  // namespace unlearn_ext
