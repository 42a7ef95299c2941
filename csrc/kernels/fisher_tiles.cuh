// Tiles of per-sample weight gradients on a GPU: how operands get into shared memory, and how the threads of a block
// multiply them. Included by fisher_weight.cu only.
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

// ---- Tiles: the products of a sample so far, and the sums of their powers over the samples before it
//
// Registers hold both, which halves the tile that a plain product would have. A block of 128 x 128 halves does 64 flops
// per byte it reads from the L2 cache: an estimate: the 5.5 to 7 TB/s of an H100 feed 350 to 450 Tflop/s, where
// mma.sync could do 600. Shared memory is nearly as busy: per 16 rows 24 KiB of fragments and 8 KiB of copies, 250
// clocks, next to 210 clocks of multiplication. So every fragment is read once, early, and by whole instructions of 16
// bytes per lane.

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
