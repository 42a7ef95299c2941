#include "kernels/pack.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

// Thread i owns packed byte i and its eight flags. Tensors of 2^31 scalars and more need grids past 2^31 threads, so
// indices are 64-bit throughout.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* __restrict__ mask, uint8_t* __restrict__ packed, int64_t numel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * i >= numel) return;
  uint32_t bits = 0;
  if (8 * i + 8 <= numel && (reinterpret_cast<uintptr_t>(mask) & 7) == 0) {
    const Vec<uint8_t, 8> flags = *reinterpret_cast<const Vec<uint8_t, 8>*>(mask + 8 * i);
#pragma unroll
    for (int j = 0; j < 8; ++j) bits |= static_cast<uint32_t>(flags.lane[j] != 0) << j;
  } else {
    for (int j = 0; j < 8 && 8 * i + j < numel; ++j) bits |= static_cast<uint32_t>(mask[8 * i + j] != 0) << j;
  }
  packed[i] = static_cast<uint8_t>(bits);
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* __restrict__ packed, uint8_t* __restrict__ mask, int64_t numel) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (8 * i >= numel) return;
  const uint32_t bits = packed[i];
  if (8 * i + 8 <= numel && (reinterpret_cast<uintptr_t>(mask) & 7) == 0) {
    Vec<uint8_t, 8> flags;
#pragma unroll
    for (int j = 0; j < 8; ++j) flags.lane[j] = static_cast<uint8_t>(bits >> j & 1u);
    *reinterpret_cast<Vec<uint8_t, 8>*>(mask + 8 * i) = flags;
  } else {
    for (int j = 0; j < 8 && 8 * i + j < numel; ++j) mask[8 * i + j] = static_cast<uint8_t>(bits >> j & 1u);
  }
}

unsigned blocks_for(int64_t numel) { return static_cast<unsigned>(((numel + 7) / 8 + kThreads - 1) / kThreads); }

}  // namespace

template <>
int pack_mask<kBackend>(const uint8_t* mask, uint8_t* packed, int64_t numel, const Exec& exec) {
  if (numel == 0) return cudaSuccess;
  return simt::launch(pack_kernel, dim3(blocks_for(numel)), dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream),
                      mask, packed, numel);
}

template <>
int unpack_mask<kBackend>(const uint8_t* packed, uint8_t* mask, int64_t numel, const Exec& exec) {
  if (numel == 0) return cudaSuccess;
  return simt::launch(unpack_kernel, dim3(blocks_for(numel)), dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream),
                      packed, mask, numel);
}

}  // namespace unlearn_ext
