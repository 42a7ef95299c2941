#include "kernels/pack.h"

#include "core/apply_cuda.cuh"

namespace unlearn_ext {
namespace {

// 16 flags, one access, are two packed bytes: lanes of a warp then store 64 bytes side by side. Sixteen packed bytes to
// a lane would be 128 flags, whose eight loads leave gaps between the lanes. A thread has several accesses in flight.
constexpr int kFlags = 16, kInFlight = 2;
constexpr int64_t kPackChunk = kThreads * kFlags * kInFlight;  // flags of a block

using Flags = Vec<uint8_t, kFlags>;

// A block's part of a mask. Parts start at multiples of kPackChunk, so on whole packed bytes.
struct Part {
  uint8_t *mask, *packed;
  int numel;
  bool whole_flags, whole_bytes;  // may be accessed 16 flags, and their two packed bytes, at a time
};

__device__ __forceinline__ Part part_of(const Table<2>& table) {
  const Place place = locate(table, static_cast<int>(blockIdx.x), kPackChunk);
  void* const* data = table.data[place.tensor];
  auto* mask = static_cast<uint8_t*>(data[0]) + place.begin;
  auto* packed = static_cast<uint8_t*>(data[1]) + place.begin / 8;
  return {mask, packed, static_cast<int>(place.end - place.begin), is_aligned(mask, kFlags), is_aligned(packed, 2)};
}

__device__ __forceinline__ int first_flag(int access) {
  return (access * kThreads + static_cast<int>(threadIdx.x)) * kFlags;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Table<2> table) {
  const Part part = part_of(table);
  Flags flags[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int i = first_flag(u);
    if (part.whole_flags && i + kFlags <= part.numel) {
      flags[u] = *reinterpret_cast<const Flags*>(part.mask + i);
    } else {
#pragma unroll
      for (int j = 0; j < kFlags; ++j) flags[u].lane[j] = i + j < part.numel ? part.mask[i + j] : uint8_t{0};
    }
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int i = first_flag(u);
    uint32_t bits = 0;
#pragma unroll
    for (int j = 0; j < kFlags; ++j) bits |= static_cast<uint32_t>(flags[u].lane[j] != 0) << j;
    if (part.whole_bytes && i + 8 < part.numel) {
      *reinterpret_cast<uint16_t*>(part.packed + i / 8) = static_cast<uint16_t>(bits);
    } else {
      if (i < part.numel) part.packed[i / 8] = static_cast<uint8_t>(bits);
      if (i + 8 < part.numel) part.packed[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ Table<2> table) {
  const Part part = part_of(table);
  uint32_t bits[kInFlight];
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int i = first_flag(u);
    if (part.whole_bytes && i + 8 < part.numel)
      bits[u] = *reinterpret_cast<const uint16_t*>(part.packed + i / 8);
    else
      bits[u] = (i < part.numel ? part.packed[i / 8] : 0u) | (i + 8 < part.numel ? part.packed[i / 8 + 1] : 0u) << 8;
  }
#pragma unroll
  for (int u = 0; u < kInFlight; ++u) {
    const int i = first_flag(u);
    Flags flags;
#pragma unroll
    for (int j = 0; j < kFlags; ++j) flags.lane[j] = static_cast<uint8_t>(bits[u] >> j & 1u);
    if (part.whole_flags && i + kFlags <= part.numel) {
      *reinterpret_cast<Flags*>(part.mask + i) = flags;
    } else {
#pragma unroll
      for (int j = 0; j < kFlags; ++j)
        if (i + j < part.numel) part.mask[i + j] = flags.lane[j];
    }
  }
}

cudaError_t launch_masks(void (*kernel)(Table<2>), const Slice<2>* slices, int64_t count, const Exec& exec) {
  return for_each_table(slices, count, kPackChunk, [&](const Table<2>& table, unsigned blocks, int64_t) {
    return simt::launch(kernel, dim3(blocks), dim3(kThreads), 0, static_cast<cudaStream_t>(exec.stream), table);
  });
}

}  // namespace

template <>
int pack_masks<kBackend>(const Slice<2>* slices, int64_t count, const Exec& exec) {
  return launch_masks(pack_kernel, slices, count, exec);
}

template <>
int unpack_masks<kBackend>(const Slice<2>* slices, int64_t count, const Exec& exec) {
  return launch_masks(unpack_kernel, slices, count, exec);
}

}  // namespace unlearn_ext
