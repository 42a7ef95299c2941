// Kernels whose traffic can be worked out by hand: the counters must agree. Compiled like a kernel file.
#include <cstdio>

#include "core/mma.cuh"
#include "traffic.h"

namespace {

struct alignas(16) Four {
  float lane[4];
};
struct alignas(16) Eight {
  float lane[8];
};

constexpr int kThreads = 64, kBlocks = 2;

__device__ int here() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

__global__ void copy(const float* in, float* out) { out[here()] = in[here()]; }
__global__ void copy_strided(const float* in, float* out) { out[2 * here()] = in[2 * here()]; }
__global__ void copy_four(const Four* in, Four* out) { out[here()] = in[here()]; }
__global__ void copy_eight(const Eight* in, Eight* out) {
  Eight x = in[here()];
  x.lane[3] += 1;
  out[here()] = x;
}
__global__ void same_for_all(const float* in, float* out) { out[here()] = in[0]; }
// Lanes take part or not, one after the other: the rounds of a loop must not be mixed up after they met.
__global__ void in_turns(const float* in, float* out) {
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    if (static_cast<int>(threadIdx.x % 2) == i) sum += in[64 * i + here() % 64];
    __syncwarp();
  }
  out[here()] = sum;
}
__global__ void shared_rows(const float* in, float* out) {
  SIMT_SHARED(float, tile, [64]);
  tile[threadIdx.x] = in[here()];
  __syncthreads();
  out[here()] = tile[63 - threadIdx.x];
}
__global__ void shared_columns(const float* in, float* out) {
  SIMT_SHARED(float, tile, [64 * 32]);
  tile[32 * threadIdx.x] = in[here()];  // all lanes in one bank
  __syncthreads();
  out[here()] = tile[32 * threadIdx.x];
}
__global__ void shared_chunks(const Four* in, Four* out) {
  SIMT_SHARED(Four, tile, [64]);
  simt::cp_async<16>(&tile[threadIdx.x], &in[here()], true);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  __syncthreads();
  out[here()] = tile[threadIdx.x];
}
__global__ void shared_counter(const float*, float* out) {
  SIMT_SHARED(unsigned, sum, [1]);
  if (threadIdx.x == 0) sum[0] = 0;
  __syncthreads();
  atomicAdd(&sum[0], 1u);  // 32 lanes, one after the other
  __syncthreads();
  out[here()] = static_cast<float>(sum[0]);
}
__global__ void add_atomically(const float*, float* out) { atomicAdd(&out[here()], 1.f); }

struct Want {
  uint64_t load_instructions, load_useful, load_sectors, store_instructions, store_useful, store_sectors, distinct;
  uint64_t wavefronts = 0, least = 0;
};

// 4 warps; per lane `bytes` are asked for.
template <class T>
bool agrees(const char* name, void (*kernel)(const T*, T*), int n, int64_t offset, const Want& want) {
  simt::traffic::forget();
  auto* in =
      static_cast<T*>(simt::traffic::array("in", static_cast<uint64_t>(n) * sizeof(T), static_cast<uint64_t>(offset)));
  auto* out =
      static_cast<T*>(simt::traffic::array("out", static_cast<uint64_t>(n) * sizeof(T), static_cast<uint64_t>(offset)));
  simt::launch(kernel, dim3(kBlocks), dim3(kThreads), 0, nullptr, in, out);
  const auto& loads = simt::traffic::arrays().at("in").loads;
  const auto& stores = simt::traffic::arrays().at("out").stores;
  const auto& shared = simt::traffic::shared();
  const uint64_t got[] = {loads.instructions, loads.useful,    loads.sectors,     stores.instructions, stores.useful,
                          stores.sectors,     stores.distinct, shared.wavefronts, shared.least};
  const uint64_t wanted[] = {want.load_instructions,  want.load_useful,  want.load_sectors,
                             want.store_instructions, want.store_useful, want.store_sectors,
                             want.distinct,           want.wavefronts,   want.least};
  bool same = true;
  for (int i = 0; i < 9; ++i) same = same && got[i] == wanted[i];
  if (same) return true;
  std::printf("FAIL counters, %s:", name);
  for (int i = 0; i < 9; ++i)
    std::printf(" %llu/%llu", static_cast<unsigned long long>(got[i]), static_cast<unsigned long long>(wanted[i]));
  std::printf(" (got/want)\n");
  return false;
}

}  // namespace

bool counters_are_right() {
  bool right = true;
  right &= agrees<float>("copy", copy, 128, 0, {4, 512, 16, 4, 512, 16, 16});
  right &= agrees<float>("copy, misaligned", copy, 128, 4, {4, 512, 20, 4, 512, 20, 17});
  right &= agrees<float>("every second", copy_strided, 256, 0, {4, 512, 32, 4, 512, 32, 32});
  right &= agrees<Four>("16 bytes", copy_four, 128, 0, {4, 2048, 64, 4, 2048, 64, 64});
  right &= agrees<Eight>("32 bytes", copy_eight, 128, 0, {8, 4096, 256, 8, 4096, 256, 128});
  right &= agrees<float>("one value", same_for_all, 128, 0, {4, 16, 4, 4, 512, 16, 16});
  right &= agrees<float>("in turns", in_turns, 128, 0, {8, 512, 32, 4, 512, 16, 16});
  right &= agrees<float>("shared rows", shared_rows, 128, 0, {4, 512, 16, 4, 512, 16, 16, 8, 8});
  right &= agrees<float>("shared columns", shared_columns, 128, 0, {4, 512, 16, 4, 512, 16, 16, 256, 8});
  right &= agrees<Four>("asynchronous chunks", shared_chunks, 128, 0, {4, 2048, 64, 4, 2048, 64, 64, 32, 32});
  right &= agrees<float>("shared counter", shared_counter, 128, 0, {0, 0, 0, 4, 512, 16, 16, 134, 10});
  right &= agrees<float>("atomics", add_atomically, 128, 0, {0, 0, 0, 4, 512, 16, 16});
  simt::traffic::forget();
  return right;
}
