#include "kernels/select.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

constexpr unsigned kFull = 0xffffffffu;
constexpr int kWarps = kThreads / 32;

cudaStream_t stream_of(const Exec& exec) { return static_cast<cudaStream_t>(exec.stream); }

// Scalars of a 16-byte load, and how many of these a thread has in flight.
template <class T>
constexpr int kLoad = 16 / static_cast<int>(sizeof(T));
constexpr int kInFlight = 2;

// Scalars [i, i + V) of a list that ends at `end`, `fill` behind it.
template <class T, int V = kLoad<T>>
__device__ __forceinline__ Vec<T, V> load(const T* list, bool aligned, int64_t i, int64_t end, T fill) {
  if (aligned && i + V <= end) return *reinterpret_cast<const Vec<T, V>*>(list + i);
  Vec<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.lane[j] = i + j < end ? list[i + j] : fill;
  return pack;
}

// ---- selected_counts

constexpr int kAlphas = 32;    // per launch: a sweep of this length reads the importances once
constexpr int kAlphaTile = 8;  // counted at a time
constexpr int kLoads = 4;      // of each list by a thread, which keeps them for all alphas

template <class A>
constexpr int64_t kCountChunk = kThreads * kLoads * kLoad<A>;

struct Alphas {
  double value[kAlphas];
  int count;
};

template <class A>
__global__ void __launch_bounds__(kThreads)
    counts_kernel(const __grid_constant__ Table<2> table, const __grid_constant__ Alphas alphas,
                  unsigned long long* counts, int64_t row) {
  constexpr int V = kLoad<A>;
  SIMT_SHARED(unsigned, sums, [kAlphaTile]);
  const Place place = locate(table, static_cast<int>(blockIdx.x), kCountChunk<A>);
  const A* full = static_cast<const A*>(table.data[place.tensor][0]);
  const A* forget = static_cast<const A*>(table.data[place.tensor][1]);
  const bool aligned = is_aligned(full) && is_aligned(forget);
  Vec<A, V> read[kLoads][2];
#pragma unroll
  for (int u = 0; u < kLoads; ++u) {
    const int64_t i = place.begin + (u * kThreads + static_cast<int>(threadIdx.x)) * V;
    read[u][0] = load(full, aligned, i, place.end, A(0));
    read[u][1] = load(forget, aligned, i, place.end, A(-1));  // which no threshold selects
  }
  Comparable<A> pairs[kLoads * V];
#pragma unroll
  for (int i = 0; i < kLoads * V; ++i) pairs[i] = comparable(read[i / V][0].lane[i % V], read[i / V][1].lane[i % V]);
  for (int tile = 0; tile < alphas.count; tile += kAlphaTile) {
    if (threadIdx.x < kAlphaTile) sums[threadIdx.x] = 0;
    __syncthreads();
#pragma unroll
    for (int a = 0; a < kAlphaTile; ++a) {
      if (tile + a >= alphas.count) break;
      const A alpha = static_cast<A>(alphas.value[tile + a]);
      unsigned found = 0;
#pragma unroll
      for (int i = 0; i < kLoads * V; ++i) found += exceeds(alpha, pairs[i]);
      found = __reduce_add_sync(kFull, found);
      if (threadIdx.x % 32 == 0 && found != 0) atomicAdd(&sums[a], found);
    }
    __syncthreads();
    const int a = tile + static_cast<int>(threadIdx.x);
    if (threadIdx.x < kAlphaTile && a < alphas.count && sums[threadIdx.x] != 0)
      atomicAdd(&counts[a * row + table.index[place.tensor]], static_cast<unsigned long long>(sums[threadIdx.x]));
    __syncthreads();
  }
}

// ---- radix selection

constexpr int64_t kHistogramChunk = 32768;  // amortises adding 2048 bins to device memory

template <class A>
__global__ void __launch_bounds__(kThreads)
    start_kernel(SelectState<A>* state, int64_t rank, unsigned long long* histogram) {
  for (int bin = static_cast<int>(threadIdx.x); bin < 2 * kBins; bin += kThreads) histogram[bin] = 0;
  if (threadIdx.x == 0) *state = {{{0, rank}, {0, rank}}, 0, 0.0, 0};
}

// The key of a score. Of 16-bit scores the bits behind kHalfPasses digits say no more than the others and are cleared:
// those passes are enough.
constexpr int kHalfPasses = 2;

template <class T>
__device__ __forceinline__ Key<acc_t<T>> key_of_score(T score, bool largest) {
  using A = acc_t<T>;
  Key<A> key = selection_key<A>(score, largest);
  if constexpr (sizeof(T) == 2) key &= ~((Key<A>(1) << digit_shift<A>(kHalfPasses - 1)) - 1);
  return key;
}

// How a selection reads its lists: the key that scalars of the lists make, and whether it counts.
template <class A>
struct RatioKeys {
  using Scalar = A;
  static constexpr int lists = 2, passes = kPasses<A>;
  __device__ bool operator()(A full, A forget, Key<A>& key) const {
    const A ratio = importance_ratio(full, forget);
    key = key_of(ratio);
    return is_finite(ratio);
  }
};

template <class T>
struct ScoreKeys {
  using Scalar = T;
  static constexpr int lists = 1, passes = sizeof(T) == 2 ? kHalfPasses : kPasses<acc_t<T>>;
  bool largest;
  __device__ bool operator()(T score, T, Key<acc_t<T>>& key) const {
    key = key_of_score<T>(score, largest);
    return true;
  }
};

// f(key) for the keys of a block's part of the lists.
template <class A, class Keys, class F>
__device__ __forceinline__ void for_each_key(const Keys& key_at, void* const* data, const Place& place, const F& f) {
  using T = typename Keys::Scalar;
  constexpr int V = kLoad<T>, kLists = Keys::lists, U = kInFlight / kLists;
  const T* list[kLists];
  bool aligned = true;
#pragma unroll
  for (int l = 0; l < kLists; ++l) list[l] = static_cast<const T*>(data[l]), aligned = aligned && is_aligned(list[l]);
  for (int64_t tile = place.begin; tile < place.end; tile += kThreads * V * U) {
    Vec<T, V> pack[U][kLists];
#pragma unroll
    for (int u = 0; u < U; ++u)
#pragma unroll
      for (int l = 0; l < kLists; ++l)
        pack[u][l] = load(list[l], aligned, tile + (u * kThreads + static_cast<int>(threadIdx.x)) * V, place.end, T{});
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int64_t i = tile + (u * kThreads + static_cast<int>(threadIdx.x)) * V;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        Key<A> key;
        if (i + j < place.end && key_at(pack[u][0].lane[j], pack[u][kLists - 1].lane[j], key)) f(key);
      }
    }
  }
}

template <class A, class Keys>
__global__ void __launch_bounds__(kThreads, 4)
    histogram_kernel(const __grid_constant__ Table<2> table, const Keys key_at, const SelectState<A>* state, int pass,
                     unsigned long long* histogram) {
  SIMT_SHARED(unsigned, local, [2 * kBins]);
  for (int bin = static_cast<int>(threadIdx.x); bin < 2 * kBins; bin += kThreads) local[bin] = 0;
  const Key<A> first = state->cursor[0].prefix, second = state->cursor[1].prefix;
  const bool two = first != second;
  __syncthreads();
  const Place place = locate(table, static_cast<int>(blockIdx.x), kHistogramChunk);
  for_each_key<A>(key_at, table.data[place.tensor], place, [&](Key<A> key) {
    const int digit = digit_of<A>(key, pass);
    if (has_prefix<A>(key, first, pass))
      atomicAdd(&local[digit], 1u);
    else if (two && has_prefix<A>(key, second, pass))
      atomicAdd(&local[kBins + digit], 1u);
  });
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < 2 * kBins; bin += kThreads)
    if (local[bin] != 0) atomicAdd(&histogram[bin], static_cast<unsigned long long>(local[bin]));
}

// One warp steps a cursor through the counts: every lane sums an equal share of the bins, and the lane whose share
// holds the rank walks it. *held: the keys in the bin it comes to, if asked for.
template <class A>
__device__ void descend(Cursor<A>& cursor, const unsigned long long* histogram, int pass, int64_t* held) {
  constexpr int kShare = kBins / 32;
  const int lane = static_cast<int>(threadIdx.x);
  const Cursor<A> before = cursor;
  int64_t sum = 0;
  for (int bin = 0; bin < kShare; ++bin) sum += static_cast<int64_t>(histogram[lane * kShare + bin]);
  int64_t upto = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(kFull, upto, step);
    if (lane >= step) upto += other;
  }
  __syncwarp();
  if (before.rank >= upto - sum && before.rank < upto) {
    Cursor<A> next{before.prefix, before.rank - (upto - sum)};
    next.descend(histogram, pass, lane * kShare, kShare);
    if (held != nullptr) *held = static_cast<int64_t>(histogram[digit_of<A>(next.prefix, pass)]);
    cursor = next;
  }
  __syncwarp();
}

// Between two passes. quantile: the ranks follow from the number of keys, known after the first pass; negative means
// the ranks are set already.
template <class A>
__global__ void __launch_bounds__(32)
    advance_kernel(SelectState<A>* state, int pass, double quantile, unsigned long long* histogram) {
  const int lane = static_cast<int>(threadIdx.x);
  if (pass == 0) {
    int64_t sum = 0;
    for (int bin = lane; bin < kBins; bin += 32) sum += static_cast<int64_t>(histogram[bin]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFull, sum, step);
    if (lane == 0) {
      state->total = sum;
      if (quantile >= 0 && sum > 0) state->fraction = place_quantile(quantile, sum, state->cursor);
    }
    __syncwarp();
  }
  const bool two = state->cursor[0].prefix != state->cursor[1].prefix;
  __syncwarp();
  if (state->total > 0) {
    descend(state->cursor[0], histogram, pass, &state->tied);
    descend(state->cursor[1], histogram + (two ? kBins : 0), pass, nullptr);
  }
  for (int bin = lane; bin < 2 * kBins; bin += 32) histogram[bin] = 0;
}

template <class A>
struct Scratch {
  SelectState<A>* state;
  unsigned long long* histogram;
  long long* ties;

  explicit Scratch(void* raw)
      : state(static_cast<SelectState<A>*>(raw)),
        histogram(reinterpret_cast<unsigned long long*>(static_cast<char*>(raw) + sizeof(SelectState<double>))),
        ties(reinterpret_cast<long long*>(histogram + 2 * kBins)) {}
};

template <class A, class Keys>
cudaError_t select_keys(const Slice<2>* slices, int64_t count, const Keys& keys, int64_t rank, double quantile,
                        const Scratch<A>& scratch, cudaStream_t stream) {
  if (const cudaError_t error =
          simt::launch(start_kernel<A>, dim3(1), dim3(kThreads), 0, stream, scratch.state, rank, scratch.histogram))
    return error;
  for (int pass = 0; pass < Keys::passes; ++pass) {
    if (const cudaError_t error =
            for_each_table(slices, count, kHistogramChunk, [&](const Table<2>& table, unsigned blocks, int64_t) {
              return simt::launch(histogram_kernel<A, Keys>, dim3(blocks), dim3(kThreads), 0, stream, table, keys,
                                  scratch.state, pass, scratch.histogram);
            }))
      return error;
    if (const cudaError_t error = simt::launch(advance_kernel<A>, dim3(1), dim3(32), 0, stream, scratch.state, pass,
                                               quantile, scratch.histogram))
      return error;
  }
  return cudaSuccess;
}

template <class A>
__global__ void quantile_kernel(const SelectState<A>* state, A* result, int64_t* n_finite) {
  *result = interpolate(*state);
  *n_finite = state->total;
}

// ---- masks from the selected key

// Ties per chunk. Where all of them are selected nobody has to know: zeros, without a look at the scores.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    ties_kernel(const __grid_constant__ Table<2> table, int64_t chunk, const ScoreKeys<T> key_at,
                const SelectState<acc_t<T>>* state, long long* ties) {
  using A = acc_t<T>;
  SIMT_SHARED(unsigned, sum, [1]);
  if (state->tied == state->cursor[0].rank + 1) {
    if (threadIdx.x == 0) ties[blockIdx.x] = 0;
    return;
  }
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  const Place place = locate(table, static_cast<int>(blockIdx.x), chunk);
  const Key<A> threshold = state->cursor[0].prefix;
  unsigned found = 0;
  for_each_key<A>(key_at, table.data[place.tensor], place, [&](Key<A> key) { found += key == threshold; });
  found = __reduce_add_sync(kFull, found);
  if (threadIdx.x % 32 == 0 && found != 0) atomicAdd(&sum[0], found);
  __syncthreads();
  if (threadIdx.x == 0) ties[blockIdx.x] = sum[0];
}

// ties[c] <- the ties before chunk c, for c up to and including `chunks`, by one block: a run of chunks per thread,
// then a scan over the threads.
__global__ void __launch_bounds__(kThreads) scan_kernel(long long* ties, int64_t chunks) {
  SIMT_SHARED(long long, sums, [kThreads]);
  const int64_t run = (chunks + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * run, end = begin + run < chunks ? begin + run : chunks;
  long long sum = 0;
  for (int64_t c = begin; c < end; ++c) sum += ties[c];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = 1; step < kThreads; step *= 2) {
    const long long other = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += other;
    __syncthreads();
  }
  long long before = sums[threadIdx.x] - sum;
  for (int64_t c = begin; c < end; ++c) {
    const long long here = ties[c];
    ties[c] = before;
    before += here;
  }
  if (threadIdx.x == kThreads - 1) ties[chunks] = sums[threadIdx.x];
}

// Of a thread's ties, a bit each, those that are among the first `room` of the block's, in the order of threads and
// bits. Takes those of the whole block off `room`.
__device__ __forceinline__ uint32_t first_ties(uint32_t tied, long long& room, unsigned* tied_in_warp) {
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  unsigned upto = static_cast<unsigned>(__popc(tied));
  for (int step = 1; step < 32; step *= 2) {
    const unsigned other = __shfl_up_sync(kFull, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) tied_in_warp[warp] = upto;
  __syncthreads();
  long long rank = upto - __popc(tied), found = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) rank += tied_in_warp[w];
    found += tied_in_warp[w];
  }
  uint32_t selected = 0;
  for (uint32_t left = tied; left != 0; left &= left - 1, ++rank)
    if (rank < room) selected |= left & (0 - left);
  room -= found;
  __syncthreads();
  return selected;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    mask_kernel(const __grid_constant__ Table<2> table, int64_t chunk, bool largest, const SelectState<acc_t<T>>* state,
                const long long* ties) {
  using A = acc_t<T>;
  constexpr int V = kLoad<T>, kGroup = 32 / V;  // lanes that make a word of the mask
  SIMT_SHARED(unsigned, tied_in_warp, [kWarps]);
  const Place place = locate(table, static_cast<int>(blockIdx.x), chunk);
  const T* scores = static_cast<const T*>(table.data[place.tensor][0]);
  uint8_t* packed = static_cast<uint8_t*>(table.data[place.tensor][1]);
  const Key<A> threshold = state->cursor[0].prefix;
  const bool aligned = is_aligned(scores);
  const int in_group = static_cast<int>(threadIdx.x) % kGroup;
  // Ties still to select at the start of this chunk. At most one chunk has to order its ties one by one; in the
  // others there is room for all of them or for none, and no thread waits for another.
  long long room = state->cursor[0].rank + 1 - ties[blockIdx.x];
  const bool none = room <= 0, all = room >= ties[blockIdx.x + 1] - ties[blockIdx.x];
  for (int64_t tile = place.begin; tile < place.end; tile += kThreads * V * kInFlight) {
    Vec<T, V> pack[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u)
      pack[u] = load(scores, aligned, tile + (u * kThreads + static_cast<int>(threadIdx.x)) * V, place.end, T{});
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const int64_t i = tile + (u * kThreads + static_cast<int>(threadIdx.x)) * V;
      uint32_t selected = 0, tied = 0;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        if (i + j >= place.end) break;
        const Key<A> key = key_of_score<T>(pack[u].lane[j], largest);
        selected |= static_cast<uint32_t>(key < threshold) << j;
        tied |= static_cast<uint32_t>(key == threshold) << j;
      }
      if (all)
        selected |= tied;
      else if (!none)
        selected |= first_ties(tied, room, tied_in_warp);
      uint32_t word = selected << (V * in_group);
#pragma unroll
      for (int step = 1; step < kGroup; step *= 2) word |= __shfl_xor_sync(kFull, word, step);
      const int64_t byte_start = i - V * in_group + 8 * in_group;  // the scalar of the lowest bit of this lane's byte
      if (in_group < 4 && byte_start < place.end) packed[byte_start / 8] = static_cast<uint8_t>(word >> (8 * in_group));
    }
  }
}

}  // namespace

template <>
int selected_counts<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, const double* alphas,
                              int64_t n_alphas, int64_t* counts, const Exec& exec) {
  return visit_accumulator(dtype, [&]<class A>(Tag<A>) -> cudaError_t {
    for (int64_t from = 0; from < n_alphas; from += kAlphas) {
      Alphas some{};
      some.count = static_cast<int>(std::min<int64_t>(kAlphas, n_alphas - from));
      std::copy_n(alphas + from, some.count, some.value);
      if (const cudaError_t error =
              for_each_table(slices, count, kCountChunk<A>, [&](const Table<2>& table, unsigned blocks, int64_t) {
                return simt::launch(counts_kernel<A>, dim3(blocks), dim3(kThreads), 0, stream_of(exec), table, some,
                                    reinterpret_cast<unsigned long long*>(counts + from * count), count);
              }))
        return error;
    }
    return cudaSuccess;
  });
}

template <>
int ratio_quantile<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, double q, void* result,
                             int64_t* n_finite, void* scratch, const Exec& exec) {
  return visit_accumulator(dtype, [&]<class A>(Tag<A>) -> cudaError_t {
    const Scratch<A> s(scratch);
    if (const cudaError_t error = select_keys<A>(slices, count, RatioKeys<A>{}, 0, q, s, stream_of(exec))) return error;
    return simt::launch(quantile_kernel<A>, dim3(1), dim3(1), 0, stream_of(exec), s.state, static_cast<A*>(result),
                        n_finite);
  });
}

template <>
int topk_mask<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, int64_t k, bool largest, int64_t*,
                        void* scratch, const Exec& exec) {
  return visit(dtype, [&]<class T>(Tag<T>) -> cudaError_t {
    using A = acc_t<T>;
    const Scratch<A> s(scratch);
    if (const cudaError_t error = select_keys<A>(slices, count, ScoreKeys<T>{largest}, k - 1, -1.0, s, stream_of(exec)))
      return error;
    int64_t total = 0, chunks = 0;
    for (int64_t t = 0; t < count; ++t) total += slices[t].numel;
    const int64_t size = tie_chunk(total);
    for (int64_t t = 0; t < count; ++t) chunks += (slices[t].numel + size - 1) / size;
    if (const cudaError_t error =
            for_each_table(slices, count, size, [&](const Table<2>& table, unsigned blocks, int64_t before) {
              return simt::launch(ties_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream_of(exec), table, size,
                                  ScoreKeys<T>{largest}, s.state, s.ties + before);
            }))
      return error;
    if (const cudaError_t error =
            simt::launch(scan_kernel, dim3(1), dim3(kThreads), 0, stream_of(exec), s.ties, chunks))
      return error;
    return for_each_table(slices, count, size, [&](const Table<2>& table, unsigned blocks, int64_t before) {
      return simt::launch(mask_kernel<T>, dim3(blocks), dim3(kThreads), 0, stream_of(exec), table, size, largest,
                          s.state, static_cast<const long long*>(s.ties + before));
    });
  });
}

}  // namespace unlearn_ext
