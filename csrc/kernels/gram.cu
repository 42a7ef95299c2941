#include "kernels/gram.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

// One thread per element, columns fastest: neighbouring threads store next to each other.
template <class T>
__global__ void __launch_bounds__(kThreads)
    unfold_kernel(const __grid_constant__ Patches p, int64_t first, int64_t n, acc_t<T>* __restrict__ rows) {
  const int64_t d = p.columns(), element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= n * d) return;
  const int64_t column = element % d, row = first + element / d;
  const int64_t y0 = p.source(0, p.position(0, row), p.tap(0, column)),
                y1 = p.source(1, p.position(1, row), p.tap(1, column)),
                y2 = p.source(2, p.position(2, row), p.tap(2, column));
  const bool inside = y0 >= 0 && y0 < p.in[0] && y1 >= 0 && y1 < p.in[1] && y2 >= 0 && y2 < p.in[2];
  acc_t<T> value = 0;
  if (inside)
    value = static_cast<const T*>(p.data)[p.sample_of(row) * p.sample_stride + p.channel_of(column) * p.channel_stride +
                                          y0 * p.space_stride[0] + y1 * p.space_stride[1] + y2 * p.space_stride[2]];
  rows[element] = value;
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
  const int64_t elements = n * patches.columns();
  if (elements == 0) return cudaSuccess;
  return visit(patches.dtype, [&]<class T>(Tag<T>) {
    return simt::launch(unfold_kernel<T>, dim3(static_cast<unsigned>((elements + kThreads - 1) / kThreads)),
                        dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream), patches, first, n,
                        static_cast<acc_t<T>*>(rows));
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
