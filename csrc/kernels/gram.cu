#include "kernels/gram.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

constexpr int kUnfoldRows = 64, kInFlight = 4;  // rows of a block, and how many of them a thread reads at a time

// A block's threads lie along 2^across columns, so that neighbours store next to each other. Where a row is (of its tap
// 0, along every axis of the image and in elements of the tensor) and what a column adds is worked out once for each.
// Numbers may pass through values below 0 and wrap around.
template <class T>
__global__ void __launch_bounds__(kThreads)
    unfold_kernel(const __grid_constant__ Patches p, int64_t first, int64_t n, int across, T* __restrict__ rows) {
  SIMT_SHARED(uint64_t, table, [kMaxSpatial + 1][kUnfoldRows]);
  const int64_t d = p.columns(), row0 = static_cast<int64_t>(blockIdx.x) * kUnfoldRows;
  const int thread = static_cast<int>(threadIdx.x),
            here = static_cast<int>(n - row0 < kUnfoldRows ? n - row0 : kUnfoldRows);
  if (thread < here) {
    int64_t rest = first + row0 + thread;
    uint64_t place = 0;
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      const auto at = static_cast<uint64_t>(p.source(axis, rest % p.out[axis], 0));
      place += at * static_cast<uint64_t>(p.space_stride[axis]);
      table[axis][thread] = at;
      rest /= p.out[axis];
    }
    table[kMaxSpatial][thread] = place + static_cast<uint64_t>(rest) * static_cast<uint64_t>(p.sample_stride);
  }
  __syncthreads();

  // A matrix of d x d has fewer than 2^31 columns.
  const uint32_t column = blockIdx.y << across | (static_cast<uint32_t>(thread) & ((1u << across) - 1));
  if (column >= d) return;
  uint64_t shift[kMaxSpatial], place = 0;
  uint32_t rest = column;
  for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
    const auto taps = static_cast<uint32_t>(p.kernel[axis]);
    shift[axis] = static_cast<uint64_t>(rest % taps) * static_cast<uint64_t>(p.dilation[axis]);
    place += shift[axis] * static_cast<uint64_t>(p.space_stride[axis]);
    rest /= taps;
  }
  place += static_cast<uint64_t>(rest) * static_cast<uint64_t>(p.channel_stride);
  const int apart = kThreads >> across;
  for (int r = thread >> across; r < here; r += kInFlight * apart) {
    T values[kInFlight] = {};
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int at = r + i * apart;
      const bool inside = (at < here) && (table[0][at] + shift[0] < static_cast<uint64_t>(p.in[0])) &
                                             (table[1][at] + shift[1] < static_cast<uint64_t>(p.in[1])) &
                                             (table[2][at] + shift[2] < static_cast<uint64_t>(p.in[2]));
      if (inside) values[i] = static_cast<const T*>(p.data)[table[kMaxSpatial][at] + place];
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (const int at = r + i * apart; at < here) rows[(row0 + at) * d + column] = values[i];
  }
}

// The most columns, of 32 to 256, for which hardly any thread has none.
int columns_across(int64_t d) {
  int across = 8;
  while (across > 5 && 8 * (((d + (1 << across) - 1) >> across << across) - d) > d) --across;
  return across;
}

constexpr int kEdge = 32;

// A block of threads owns a kEdge x kEdge square on or above the diagonal and its mirror image; the square is turned
// in shared memory so that both are stored along rows.
template <class A, class G>
__global__ void __launch_bounds__(kThreads)
    add_kernel(const A* __restrict__ block, int64_t column, int64_t width, G* __restrict__ gram, int64_t d) {
  SIMT_SHARED(G, turned, [kEdge][kEdge + 1]);
  const int64_t i0 = static_cast<int64_t>(blockIdx.y) * kEdge, j0 = column + static_cast<int64_t>(blockIdx.x) * kEdge;
  const int64_t last = column + width;
  if (i0 >= j0 + kEdge) return;  // wholly below the diagonal
  const int x = static_cast<int>(threadIdx.x % kEdge), y = static_cast<int>(threadIdx.x / kEdge);
  for (int r = y; r < kEdge; r += kThreads / kEdge) {
    const int64_t i = i0 + r, j = j0 + x;
    if (i < last && j < last && i <= j) {
      const G sum = gram[i * d + j] + static_cast<G>(block[i * width + (j - column)]);
      gram[i * d + j] = sum;
      turned[r][x] = sum;
    }
  }
  __syncthreads();
  for (int r = y; r < kEdge; r += kThreads / kEdge) {
    const int64_t j = j0 + r, i = i0 + x;
    if (i < last && j < last && i < j) gram[j * d + i] = turned[x][r];
  }
}

}  // namespace

template <>
int unfold_rows<kBackend>(const Patches& patches, int64_t first, int64_t n, void* rows, const Exec& exec) {
  const int64_t d = patches.columns();
  if (n == 0 || d == 0) return cudaSuccess;
  const int across = columns_across(d);
  const dim3 grid(static_cast<unsigned>((n + kUnfoldRows - 1) / kUnfoldRows),
                  static_cast<unsigned>((d + (1 << across) - 1) >> across));
  return visit(patches.dtype, [&]<class T>(Tag<T>) {
    return simt::launch(unfold_kernel<T>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream), patches,
                        first, n, across, static_cast<T*>(rows));
  });
}

template <>
int add_symmetric<kBackend>(DType dtype, const void* block, int64_t column, int64_t width, DType gram_dtype, void* gram,
                            int64_t d, const Exec& exec) {
  if (width == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((width + kEdge - 1) / kEdge),
                  static_cast<unsigned>((column + width + kEdge - 1) / kEdge));
  return visit_accumulator(dtype, [&]<class A>(Tag<A>) {
    return visit_accumulator(gram_dtype, [&]<class G>(Tag<G>) {
      return simt::launch(add_kernel<A, G>, grid, dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream),
                          static_cast<const A*>(block), column, width, static_cast<G*>(gram), d);
    });
  });
}

}  // namespace unlearn_ext
