// Walking the positions of tensors of one value per (sample, position, channel) on a GPU. Included by kernel files
// only.
#pragma once

#include "core/simt.h"
#include "kernels/fisher_plan.h"

namespace unlearn_ext {
namespace {

template <class T>
constexpr int kChunk = 16 / static_cast<int>(sizeof(T));

// What one 16-byte access brings, kept in the registers it arrives in: halves are taken apart when they are used.
template <class T>
struct alignas(16) Chunk {
  uint32_t word[4];

  __device__ __forceinline__ T operator[](int i) const {
    if constexpr (sizeof(T) == 2) {
      return {static_cast<uint16_t>(word[i / 2] >> i % 2 * 16)};
    } else if constexpr (sizeof(T) == 4) {
      return bit_cast<T>(word[i]);
    } else {
      const uint32_t both[] = {word[2 * i], word[2 * i + 1]};
      return bit_cast<T>(both);
    }
  }
  // Of a chunk of zeros.
  __device__ __forceinline__ void set(int i, T value) {
    if constexpr (sizeof(T) == 2)
      word[i / 2] |= static_cast<uint32_t>(value.bits) << i % 2 * 16;
    else
      memcpy(&word[i * static_cast<int>(sizeof(T) / 4)], &value, sizeof(T));
  }
};

// Position axes of one or two tensors of the same extents; neighbours that are one axis in both are merged, so that
// nearly always a single one is left and no division is needed.
struct Axes {
  int64_t positions;
  uint32_t extent[kMaxSpatial];
  int64_t stride[kMaxSpatial][2];

  Axes(const Positions& first, const Positions& second) : positions(first.positions()), extent{1, 1, 1}, stride{} {
    int to = kMaxSpatial;
    for (int axis = kMaxSpatial - 1; axis >= 0; --axis) {
      const int64_t strides[] = {first.space_stride[axis], second.space_stride[axis]};
      if (first.extent[axis] == 1) continue;
      if (to < kMaxSpatial && strides[0] == stride[to][0] * extent[to] && strides[1] == stride[to][1] * extent[to]) {
        extent[to] *= static_cast<uint32_t>(first.extent[axis]);
        continue;
      }
      extent[--to] = static_cast<uint32_t>(first.extent[axis]);
      stride[to][0] = strides[0], stride[to][1] = strides[1];
    }
  }

  bool single() const { return extent[1] == 1; }

  __device__ __forceinline__ int64_t offset(uint32_t position, int tensor) const {
    if (extent[1] == 1) return position * stride[2][tensor];
    const uint32_t rest = position / extent[2];
    return position % extent[2] * stride[2][tensor] + rest % extent[1] * stride[1][tensor] +
           rest / extent[1] * stride[0][tensor];
  }
};

// Whether chunks of channels can be read: side by side, aligned whatever the sample and the position.
inline bool chunks_of_channels(const Positions& p, int64_t lanes) {
  bool aligned = p.channel_stride == 1 && p.channels % lanes == 0 && p.sample_stride % lanes == 0 &&
                 reinterpret_cast<uintptr_t>(p.data) % 16 == 0;
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    aligned = aligned && (p.extent[axis] == 1 || p.space_stride[axis] % lanes == 0);
  return aligned;
}

// ---- The runs' partial sums, first to last

constexpr int kAddThreads = 256;

template <class A>
__global__ void __launch_bounds__(kAddThreads)
    add_partials_kernel(const A* __restrict__ partial, int splits, int64_t n, A weight, A* __restrict__ fisher) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= n) return;
  A sum = 0;
#pragma unroll 4
  for (int split = 0; split < splits; ++split) sum += partial[split * n + i];
  fisher[i] = fused_multiply_add(weight, sum, fisher[i]);
}

// fisher += weight * the sums of `runs` arrays of n.
template <class A>
cudaError_t add_partials(const A* partial, int64_t runs, int64_t n, double weight, A* fisher, const Exec& exec) {
  return simt::launch(add_partials_kernel<A>, dim3(static_cast<unsigned>((n + kAddThreads - 1) / kAddThreads)),
                      dim3(kAddThreads), 0, static_cast<cudaStream_t>(exec.stream), partial, static_cast<int>(runs), n,
                      static_cast<A>(weight), fisher);
}

}  // namespace
}  // namespace unlearn_ext
