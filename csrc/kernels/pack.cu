#include "kernels/pack.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

// 16 flags, one access, are two packed bytes. A thread has several such accesses in flight.
constexpr int kFlags = 16, kInFlight = 2;
constexpr int64_t kPackChunk = kThreads * kFlags * kInFlight;  // flags of a block

using Flags = Vec<uint8_t, kFlags>;

// Tensors of 2^31 scalars and more need grids past 2^31 threads, so indices are 64-bit throughout.
__device__ __forceinline__ int64_t first_flag(int access) {
  return blockIdx.x * kPackChunk + (access * kThreads + static_cast<int>(threadIdx.x)) * kFlags;
}

__global__ void __launch_bounds__(kThreads)
    pack_kernel(const uint8_t* __restrict__ mask, uint8_t* __restrict__ packed, int64_t numel) {
  const bool whole_flags = is_aligned(mask, kFlags), whole_bytes = is_aligned(packed, 2);
  Flags flags[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t i = first_flag(u);
    if (whole_flags && i + kFlags <= numel) {
      flags[u] = *reinterpret_cast<const Flags*>(mask + i);
    } else {
#pragma unroll
      for (int j = 0; j < kFlags; ++j) flags[u].lane[j] = i + j < numel ? mask[i + j] : uint8_t{0};
    }
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t i = first_flag(u);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kFlags; ++j) bits |= static_cast<uint32_t>(flags[u].lane[j] != 0) << j;
    if (whole_bytes && i + 8 < numel) {
      *reinterpret_cast<uint16_t*>(packed + i / 8) = static_cast<uint16_t>(bits);
    } else {
      if (i < numel) packed[i / 8] = static_cast<uint8_t>(bits);
      if (i + 8 < numel) packed[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const uint8_t* __restrict__ packed, uint8_t* __restrict__ mask, int64_t numel) {
  const bool whole_flags = is_aligned(mask, kFlags), whole_bytes = is_aligned(packed, 2);
  uint32_t bits[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t i = first_flag(u);
    if (whole_bytes && i + 8 < numel)
      bits[u] = *reinterpret_cast<const uint16_t*>(packed + i / 8);
    else
      bits[u] = (i < numel ? packed[i / 8] : 0u) | (i + 8 < numel ? packed[i / 8 + 1] : 0u) << 8;
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int64_t i = first_flag(u);
    Flags flags;
#pragma unroll
    for (int j = 0; j < kFlags; ++j) flags.lane[j] = static_cast<uint8_t>(bits[u] >> j & 1u);
    if (whole_flags && i + kFlags <= numel) {
      *reinterpret_cast<Flags*>(mask + i) = flags;
    } else {
#pragma unroll
      for (int j = 0; j < kFlags; ++j)
        if (i + j < numel) mask[i + j] = flags.lane[j];
    }
  }
}

unsigned blocks_for(int64_t numel) { return static_cast<unsigned>((numel + kPackChunk - 1) / kPackChunk); }

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
