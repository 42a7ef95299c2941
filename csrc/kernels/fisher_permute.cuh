// Adds up the partial sums of a GPU's Fisher products, first to last, where their columns run over channels, then taps.
// Included by fisher_weight.cu only.
#pragma once

#include "kernels/fisher_task.cuh"

namespace unlearn_ext {
namespace {

constexpr unsigned kPermuteThreads = 128, kPermuteChannels = 32, kPermuteTaps = 64;

// A block adds up some channels of a row, under some taps, in the order they were stored in, and turns the sums in
// shared memory into the order of F: all accesses to global memory are to neighbours. Bytes: the partial sums once, F
// twice.
template <class A>
__global__ void __launch_bounds__(kPermuteThreads, 8)
    add_permuted_kernel(const A* __restrict__ partial, int splits, int64_t n, unsigned channels, unsigned window,
                        A weight, A* __restrict__ fisher) {
  // An odd pitch: neighbouring channels lie in different banks.
  SIMT_SHARED(A, sums, [kPermuteChannels * (kPermuteTaps + 1)]);
  const unsigned channel_blocks = (channels + kPermuteChannels - 1) / kPermuteChannels;
  const unsigned tap_blocks = (window + kPermuteTaps - 1) / kPermuteTaps;
  const unsigned first_channel = blockIdx.x % channel_blocks * kPermuteChannels, rest = blockIdx.x / channel_blocks;
  const unsigned first_tap = rest % tap_blocks * kPermuteTaps;
  const unsigned width = min(kPermuteChannels, channels - first_channel);
  const unsigned taps = min(kPermuteTaps, window - first_tap), pitch = taps | 1u;
  const int64_t row = static_cast<int64_t>(rest / tap_blocks) * channels * window;
  for (unsigned i = threadIdx.x; i < width * taps; i += kPermuteThreads) {
    const unsigned tap = i / width, channel = i % width;
    const A* from = partial + row + static_cast<int64_t>(first_tap + tap) * channels + first_channel + channel;
    A sum = 0;
#pragma unroll 4
    for (int split = 0; split < splits; ++split, from += n) sum += *from;
    sums[channel * pitch + tap] = sum;
  }
  __syncthreads();
  for (unsigned i = threadIdx.x; i < width * taps; i += kPermuteThreads) {
    const unsigned channel = i / taps, tap = i % taps;
    A& f = fisher[row + static_cast<int64_t>(first_channel + channel) * window + first_tap + tap];
    f = fused_multiply_add(weight, sums[channel * pitch + tap], f);
  }
}

template <class A>
cudaError_t add_permuted(const A* partial, int64_t runs, int64_t n, const Task& task, A* fisher, const Exec& exec) {
  const int64_t channels = task.layer.inputs.channels, window = task.layer.inputs.window();
  const int64_t blocks = n / task.columns * ((channels + kPermuteChannels - 1) / kPermuteChannels) *
                         ((window + kPermuteTaps - 1) / kPermuteTaps);
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return simt::launch(add_permuted_kernel<A>, dim3(static_cast<unsigned>(blocks)), dim3(kPermuteThreads), 0,
                      static_cast<cudaStream_t>(exec.stream), partial, static_cast<int>(runs), n,
                      static_cast<unsigned>(channels), static_cast<unsigned>(window), static_cast<A>(task.layer.weight),
                      fisher);
}

}  // namespace
}  // namespace unlearn_ext
