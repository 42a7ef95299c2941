// How operands of per-sample weight gradients get into a GPU's shared memory, and tiles of sums out of registers.
// Included by fisher_weight.cu only.
//
// A tile of outputs is as wide as a block's tile of F and kDepth rows deep, a row being a position of a sample. Both
// operands lie in shared memory as [row][channel], in chunks of 16 bytes.
#pragma once

#include "core/mma.cuh"
#include "kernels/fisher_positions.cuh"

namespace unlearn_ext {
namespace {

// ---- Operands

// One row of a tile: a position of a sample. As two 16-byte words, of which the outputs' gradients need the first.
struct alignas(16) Position {
  int64_t grads;    // where it is, in bytes
  uint32_t inside;  // 0 behind the last sample and from the end of one to the next whole step
  uint32_t at[3];   // the image position that tap 0 sees
  int64_t inputs;   // where that is, in bytes: outside the tensor if in padding
};

// One column of a tile: a channel of the inputs, seen through a tap.
struct alignas(16) Column {
  int64_t offset;     // in bytes, from a row's place
  uint32_t shift[3];  // of the image position
  int to;             // its place in a row of F, or of partial sums
};

// Images are at most this large along any axis. No sum with these is inside one, not even that of both.
constexpr int64_t kLargestExtent = 1 << 29;
constexpr uint32_t kNoRow = 1u << 31, kNoColumn = 1u << 30;

// An operand as the loaders see it: what a column needs for all rows, and where its element of a row is, if anywhere.
struct Channel {
  const char* data;
  bool inside;

  __device__ __forceinline__ bool find(const Position& row, const void*& from) const {
    from = data + row.grads;
    return inside & (row.inside != 0);
  }
};

template <class T>
struct Grads {
  const T* data;  // of the tile's first output
  int64_t stride;
  int width;

  __device__ __forceinline__ Channel column(int m) const {
    return {reinterpret_cast<const char*>(data + m * stride), m < width};
  }
};

struct Patch {
  const char* data;
  uint32_t shift[3], in[3];

  __device__ __forceinline__ bool find(const Position& row, const void*& from) const {
    from = data + row.inputs;
    return (row.at[0] + shift[0] < in[0]) & (row.at[1] + shift[1] < in[1]) & (row.at[2] + shift[2] < in[2]);
  }
};

template <class T>
struct Inputs {
  const T* data;  // of the group
  const Column* columns;
  uint32_t in[3];

  __device__ __forceinline__ Patch column(int m) const {
    const Column c = columns[m];
    return {
        reinterpret_cast<const char*>(data) + c.offset, {c.shift[0], c.shift[1], c.shift[2]}, {in[0], in[1], in[2]}};
  }
};

// How an operand may be read.
struct Access {
  bool vectors;          // whole chunks: neighbouring channels lie side by side, and every chunk is aligned
  bool along_positions;  // neighbouring positions are closer together than neighbouring channels
};

// ---- Shared memory

// Where element (k, m) of a tile is. In both layouts eight neighbouring rows of a chunk lie in different banks, so that
// no two lanes of an ldmatrix or of a store along positions meet in one. Permuted chunks also suit the fragments of
// tf32; padded rows, the length of a chunk further apart, are found without arithmetic.
template <class T, int kWidth_>
struct Permuted {
  using Element = T;
  static constexpr int kWidth = kWidth_, kPitch = kWidth;
  static_assert(kWidth / kChunk<T> >= 8);
  __device__ __forceinline__ static int place(int k, int m) {
    const int turn = (k & 3) << 1 | (k >> 2 & 1);
    return k * kPitch + ((m / kChunk<T> ^ turn) * kChunk<T> | m % kChunk<T>);
  }
};
template <class T, int kWidth_>
struct Padded {
  using Element = T;
  static constexpr int kWidth = kWidth_, kPitch = kWidth + kChunk<T>;
  __device__ __forceinline__ static int place(int k, int m) { return k * kPitch + m; }
};

// How the threads of a block share a tile of kUnits units per row: each has kEach of them, the i-th in row k. Lanes run
// along the axis that is dense in memory, but only eight along positions: their stores would meet in a bank.
template <int kUnits, int kDepth, int kThreads>
struct Shares {
  static_assert(kThreads % kUnits == 0 && kUnits % (kThreads / 8) == 0 && kDepth % 8 == 0);
  static constexpr int kEach = kUnits * kDepth / kThreads;

  __device__ __forceinline__ static void find(int i, bool along_positions, int& k, int& unit) {
    const unsigned thread = threadIdx.x;
    if (along_positions) {
      k = static_cast<int>(thread % 8) + i % (kDepth / 8) * 8;
      unit = static_cast<int>(thread / 8) + i / (kDepth / 8) * (kThreads / 8);
    } else {
      k = static_cast<int>(thread / kUnits) + i * (kThreads / kUnits);
      unit = static_cast<int>(thread % kUnits);
    }
  }
};

// ---- Loaders: fetch() starts reading a tile, deposit() sends what took the way through registers to shared memory

// Asynchronous copies of whole chunks or, with kGather, of single elements of at least 4 bytes.
template <class Side, class Layout, int kDepth, int kThreads, bool kGather>
struct Loader {
  using T = typename Layout::Element;
  static constexpr int kChunks = Layout::kWidth / kChunk<T>, kRows = kThreads / kChunks;
  static_assert(kThreads % kChunks == 0 && kDepth % kRows == 0 && kRows % 8 == 0);
  Side side;
  decltype(std::declval<Side>().column(0)) column;  // of the thread's chunks
  int first, to;                                    // row and place of the first; the others are kRows further

  __device__ __forceinline__ Loader(const Side& side_) : side(side_) {
    const int thread = static_cast<int>(threadIdx.x), m = thread % kChunks * kChunk<T>;
    column = side.column(m);
    first = thread / kChunks;
    to = Layout::place(first, m);
    if constexpr (!kGather) {
      simt::keep(column.data);
      simt::keep(to);
    }
  }

  __device__ __forceinline__ void fetch(const Position* rows, T* tile, Access access, int) {
    const void* from;
    if (!kGather || access.vectors) {
#pragma unroll
      for (int i = 0; i < kDepth / kRows; ++i) {
        const bool inside = column.find(rows[first + i * kRows], from);
        simt::cp_async<16>(tile + to + i * kRows * Layout::kPitch, from, inside);
      }
    } else if constexpr (kGather) {
      using Mine = Shares<Layout::kWidth, kDepth, kThreads>;
#pragma unroll
      for (int i = 0; i < Mine::kEach; ++i) {
        int k, m;
        Mine::find(i, access.along_positions, k, m);
        const bool inside = side.column(m).find(rows[k], from);
        simt::cp_async<sizeof(T)>(tile + Layout::place(k, m), from, inside);
      }
    }
  }
  __device__ __forceinline__ void deposit(T*, Access) {}
};

// Chunks, or single 16-bit elements through registers: no asynchronous copy is that small.
template <class Side, class Layout, int kDepth, int kThreads>
struct HalfLoader {
  using T = typename Layout::Element;
  using Mine = Shares<Layout::kWidth / 2, kDepth, kThreads>;
  static constexpr int kChunks = Layout::kWidth / kChunk<T>;
  Side side;
  uint16_t raw[Mine::kEach][2];

  __device__ __forceinline__ HalfLoader(const Side& side_) : side(side_) {}

  __device__ __forceinline__ void fetch(const Position* rows, T* tile, Access access, int) {
    const void* from;
    if (access.vectors) {
      const int first = static_cast<int>(threadIdx.x) / kChunks,
                m = static_cast<int>(threadIdx.x) % kChunks * kChunk<T>;
      const auto column = side.column(m);
#pragma unroll
      for (int k = 0; k < kDepth; k += kThreads / kChunks) {
        const bool inside = column.find(rows[first + k], from);
        simt::cp_async<16>(tile + Layout::place(first + k, m), from, inside);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < Mine::kEach; ++i) {
      int k, pair;
      Mine::find(i, access.along_positions, k, pair);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        raw[i][j] = side.column(2 * pair + j).find(rows[k], from) ? static_cast<const T*>(from)->bits : 0;
    }
  }
  __device__ __forceinline__ void deposit(T* tile, Access access) {
    if (access.vectors) return;
#pragma unroll
    for (int i = 0; i < Mine::kEach; ++i) {
      int k, pair;
      Mine::find(i, access.along_positions, k, pair);
      *reinterpret_cast<uint32_t*>(tile + Layout::place(k, 2 * pair)) = raw[i][0] | static_cast<uint32_t>(raw[i][1])
                                                                                        << 16;
    }
  }
};

// Elements of type T raised to the power on the way, in the compute type.
template <class T, class Side, class Layout, int kDepth, int kThreads>
struct PowerLoader {
  using A = typename Layout::Element;
  static constexpr int kChunks = Layout::kWidth / kChunk<A>, kEach = kChunks * kDepth / kThreads;
  struct alignas(sizeof(T) * kChunk<A>) Raw {
    T lane[kChunk<A>];
  };
  Side side;
  Raw raw[kEach];
  int power = 0;

  __device__ __forceinline__ PowerLoader(const Side& side_) : side(side_) {}

  __device__ __forceinline__ void fetch(const Position* rows, A*, Access access, int p) {
    power = p;
    const void* from;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kThreads, m = e % kChunks * kChunk<A>;
      const Position row = rows[e / kChunks];
      raw[i] = {};
      if (access.vectors) {
        if (side.column(m).find(row, from)) raw[i] = *static_cast<const Raw*>(from);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk<A>; ++j)
          if (side.column(m + j).find(row, from)) raw[i].lane[j] = *static_cast<const T*>(from);
      }
    }
  }
  __device__ __forceinline__ void deposit(A* tile, Access) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int e = static_cast<int>(threadIdx.x) + i * kThreads;
      Chunk<A> chunk;
#pragma unroll
      for (int j = 0; j < kChunk<A>; ++j) chunk.set(j, raised(static_cast<A>(raw[i].lane[j]), power));
      *reinterpret_cast<Chunk<A>*>(tile + Layout::place(e / kChunks, e % kChunks * kChunk<A>)) = chunk;
    }
  }
};

// ---- Chunks of a row of F or of partial sums, of which `left` elements are in the row: of all rows whole ones where
// `chunks`, else element by element

template <class A>
__device__ __forceinline__ void load_row(const A* from, int left, bool chunks, Chunk<A>& to) {
  to = {};
  if (chunks) {
    to = *reinterpret_cast<const Chunk<A>*>(from);
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk<A>; ++j)
    if (j < left) to.set(j, from[j]);
}
template <class A>
__device__ __forceinline__ void store_row(A* to, int left, bool chunks, const Chunk<A>& from) {
  if (chunks) {
    *reinterpret_cast<Chunk<A>*>(to) = from;
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk<A>; ++j)
    if (j < left) to[j] = from[j];
}

}  // namespace
}  // namespace unlearn_ext
