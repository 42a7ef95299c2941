// Walks lists of tensors on a GPU: address tables passed by value, one block per chunk, 16-byte accesses.
// Included by kernel files only.
#pragma once

#include "core/lists.h"
#include "core/simt.h"

namespace unlearn_ext {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // scalars per block of an elementwise op: several 16-byte loads in flight per thread

// Kernel parameters are 4 KiB on every driver; the rest is left to the op's constants.
constexpr int kTableBytes = 3584;

template <int N>
struct Table {
  static constexpr int capacity = kTableBytes / (8 * N + 8 + 4 + 4);
  void* data[capacity][N];
  int64_t numel[capacity];
  int32_t first[capacity];  // first block of each tensor
  int32_t index[capacity];  // its place in the list
  int32_t count;
};

struct Place {
  int tensor;
  int64_t begin, end;  // scalars of the tensor
};

// Which part of which tensor a block works on.
template <int N>
__device__ __forceinline__ Place locate(const Table<N>& table, int block, int64_t chunk) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first[middle] <= block)
      low = middle;
    else
      high = middle;
  }
  const int64_t begin = static_cast<int64_t>(block - table.first[low]) * chunk;
  const int64_t left = table.numel[low] - begin;
  return {low, begin, begin + (left < chunk ? left : chunk)};
}

// Fills tables with the non-empty tensors and calls f(table, blocks, blocks of earlier tables) for each full one and
// for what is left at the end. A table also ends before its blocks pass what a grid can hold; no single tensor has
// 2^31 chunks.
template <int N, class F>
cudaError_t for_each_table(const Slice<N>* slices, int64_t count, int64_t chunk, const F& f) {
  Table<N> table;
  table.count = 0;
  int64_t blocks = 0, blocks_before = 0;
  const auto flush = [&]() -> cudaError_t {
    if (table.count == 0) return cudaSuccess;
    const cudaError_t error = f(table, static_cast<unsigned>(blocks), blocks_before);
    blocks_before += blocks;
    table.count = 0;
    blocks = 0;
    return error;
  };
  for (int64_t tensor = 0; tensor < count; ++tensor) {
    const int64_t here = (slices[tensor].numel + chunk - 1) / chunk;
    if (here == 0) continue;
    if (table.count == Table<N>::capacity || blocks + here > INT32_MAX)
      if (const cudaError_t error = flush()) return error;
    for (int list = 0; list < N; ++list) table.data[table.count][list] = slices[tensor].data[list];
    table.numel[table.count] = slices[tensor].numel;
    table.first[table.count] = static_cast<int32_t>(blocks);
    table.index[table.count] = static_cast<int32_t>(tensor);
    ++table.count;
    blocks += here;
  }
  return flush();
}

template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Vec {
  T lane[V];
};

// Whether an access of so many bytes, a power of two, may begin there.
__device__ __forceinline__ bool is_aligned(const void* p, uintptr_t bytes = 16) {
  return (reinterpret_cast<uintptr_t>(p) & (bytes - 1)) == 0;
}

// Scalars of a vector: one 16-byte access of the widest list, a shorter one of the others. More of a wide list would
// leave gaps between the lanes of an instruction, which then moves every 32 bytes twice.
template <class R>
constexpr int kVector = 16 / R::largest;

// Vectors of every list a thread loads before it stores the first: enough bytes in flight to hide memory latency, no
// more than fit the registers of three blocks per multiprocessor.
template <class R>
constexpr int kUnroll = kVector<R> * R::bytes <= 32 ? 4 : 2;

// The mask bits of scalars [i, i + V), set where op acts; all set without a mask. The last of them is inside the mask.
template <class Op, int V>
__device__ __forceinline__ uint32_t keep_bits(const uint8_t* bits, int i) {
  constexpr uint32_t kAll = (1u << V) - 1u;
  if (bits == nullptr) return kAll;
  uint32_t word = bits[i / 8];
  if (i % 8 + V > 8) word |= static_cast<uint32_t>(bits[i / 8 + 1]) << 8;
  return (kOnCleared<Op> ? ~word : word) >> (i % 8) & kAll;
}

// Scalars before the first vector of a chunk: the first list's vectors then start on the 32 bytes that memory is read
// in. Negative if the lists lie differently towards their vectors; chunks start alike in all of a tensor.
template <class R, size_t... I>
__device__ __forceinline__ int head_of(void* const* data, std::index_sequence<I...>) {
  constexpr uintptr_t kSectorScalars = 32 / R::smallest, V = kVector<R>;
  const uintptr_t scalars[] = {reinterpret_cast<uintptr_t>(data[I]) / sizeof(typename R::template at<I>)...};
  const uintptr_t head = (0 - scalars[0]) % kSectorScalars;
  return (((scalars[I] + head) % V == 0) && ...) ? static_cast<int>(head) : -1;
}

template <class R, class Op, size_t... I>
__device__ __forceinline__ void apply_chunk(const Op& op, void* const* data, const uint8_t* bits, int head,
                                            int64_t begin, int n, std::index_sequence<I...> indices) {
  constexpr int V = kVector<R>, U = kUnroll<R>;
  constexpr uint32_t kAll = (1u << V) - 1u;
  [&](auto*... list) {
    const int vectors = head < 0 || n < head ? 0 : (n - head) / V;
    for (int first = static_cast<int>(threadIdx.x); first < vectors; first += kThreads * U) {
      std::tuple<Vec<typename R::template at<I>, V>...> pack[U];
      uint32_t keep[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int v = first + u * kThreads;
        keep[u] = v >= vectors ? 0u : keep_bits<Op, V>(bits, head + v * V);
        if (kOverwrites<Op> && keep[u] == kAll)
          pack[u] = {};
        else if (keep[u] != 0)
          pack[u] = {reinterpret_cast<const Vec<typename R::template at<I>, V>*>(list + head)[v]...};
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (keep[u] == 0) continue;
#pragma unroll
        for (int j = 0; j < V; ++j)
          apply_at<R>(op, (keep[u] >> j & 1u) != 0, indices, &std::get<I>(pack[u]).lane[j]...);
        const int v = first + u * kThreads;
        (
            [&] {
              if constexpr (I < static_cast<size_t>(Op::writes))
                reinterpret_cast<Vec<typename R::template at<I>, V>*>(list + head)[v] = std::get<I>(pack[u]);
            }(),
            ...);
      }
    }
    // The scalars before and behind the vectors.
    for (int k = static_cast<int>(threadIdx.x); k < n - vectors * V; k += kThreads) {
      const int i = vectors == 0 || k < head ? k : k + vectors * V;
      if (keep_bits<Op, 1>(bits, i)) apply_at<R>(op, Always{}, indices, list + i...);
    }
  }(static_cast<typename R::template at<I>*>(data[I]) + begin...);
}

template <class R, class Op, bool kMasked>
__global__ void __launch_bounds__(kThreads, 3)
    list_kernel(const __grid_constant__ Table<R::size + kMasked> table, const Op constants) {
  const Place place = locate(table, static_cast<int>(blockIdx.x), kChunk);
  void* const* data = table.data[place.tensor];
  const uint8_t* bits = nullptr;
  if constexpr (kMasked) bits = static_cast<const uint8_t*>(data[R::size]) + place.begin / 8;
  Op op = constants;
  if constexpr (requires { op.load_constants(); }) op.load_constants();
  apply_chunk<R>(op, data, bits, head_of<R>(data, typename R::indices{}), place.begin,
                 static_cast<int>(place.end - place.begin), typename R::indices{});
}

template <class R, class Op, bool kMasked, int N>
cudaError_t launch_lists(const Op& op, const Slice<N>* slices, int64_t count, const Exec& exec) {
  return for_each_table(slices, count, kChunk, [&](const Table<N>& table, unsigned blocks, int64_t) {
    return simt::launch(list_kernel<R, Op, kMasked>, dim3(blocks), dim3(kThreads), 0,
                        static_cast<cudaStream_t>(exec.stream), table, op);
  });
}

template <class R, class Op>
int apply(const Op& op, const Slice<R::size>* slices, int64_t count, const Exec& exec) {
  return launch_lists<R, Op, false>(op, slices, count, exec);
}

// Slices carry the packed mask behind the row; vectors on which op does not act are neither loaded nor
// stored.
template <class R, class Op>
int apply_masked(const Op& op, const Slice<R::size + 1>* slices, int64_t count, const Exec& exec) {
  return launch_lists<R, Op, true>(op, slices, count, exec);
}

}  // namespace
}  // namespace unlearn_ext
