// The CUDA checker must report misuse: every case plants one and names the text it wants to read.
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>

#include "core/simt.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 7)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void early_return(int* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void lane_missing(int* out) {
  if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  __syncthreads();
}

__global__ void wrong_mask(int* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1, 0); }

__global__ void mixed_collectives(int* out) {
  if (threadIdx.x < 16)
    out[threadIdx.x] = static_cast<int>(__ballot_sync(kAll, 1));
  else
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
}

[[maybe_unused]] __global__ void shared_overrun(int* out) {
  SIMT_SHARED(int, tile, [32]);
  int* volatile unchecked = tile;  // the compiler must not see that lane 31 writes tile[32]
  unchecked[threadIdx.x + 1] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

[[maybe_unused]] __global__ void dynamic_overrun(int* out) {
  SIMT_DYN_SHARED(int, tile);
  tile[threadIdx.x] = 1;  // launched with half the bytes
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void uninitialised_shared(float* out) {
  SIMT_SHARED(float, tile, [64]);
  if (threadIdx.x < 32) tile[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void unwaited_copy(const float4* in, float* out) {
  SIMT_SHARED(float4, tile, [64]);
  simt::cp_async16(&tile[threadIdx.x], &in[threadIdx.x]);
  simt::cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x].x;
}

__global__ void trap(int*) {
  if (threadIdx.x == 3) __trap();
  __syncthreads();
}

__global__ void deep_stack(int* out) {
  volatile char frame[40000];
  for (int i = 0; i < 40000; i += 512) frame[i] = 1;
  __syncthreads();
  out[threadIdx.x] = frame[512];
}

int failures = 0;

// `run` returns whether it saw the fault itself; else an error must have been thrown that says `text`.
void expect(const char* name, const char* text, const std::function<bool()>& run) {
  std::string got = "nothing";
  bool ok = false;
  try {
    ok = run();
    if (ok) got = "seen by the test";
  } catch (const simt::error& error) {
    got = error.what();
    ok = text != nullptr && got.find(text) != std::string::npos;
  }
  failures += !ok;
  std::printf("%-4s %-22s %s\n", ok ? "ok" : "MISS", name, got.c_str());
}

template <class... P, class... A>
bool completes(void (*kernel)(P...), unsigned grid, unsigned block, size_t shared_bytes, A... args) {
  return simt::launch(kernel, grid, block, shared_bytes, nullptr, args...) == cudaSuccess;
}

void all() {
  int out[64];
  float floats[64];
  float4 in[64] = {};
  const auto reported = [&](auto kernel, unsigned block, size_t shared_bytes, auto... args) {
    return [=] { return !completes(kernel, 1, block, shared_bytes, args...); };
  };
  int* o = out;
  expect("divergent barrier", "divergent barrier", reported(divergent_barrier, 64, 0, o));
  expect("early return", "returned before the barrier", reported(early_return, 64, 0, o, 40));
  expect("lane missing", "deadlock", reported(lane_missing, 64, 0, o));
  expect("wrong mask", "not in the mask", reported(wrong_mask, 32, 0, o));
  expect("mixed collectives", "warp divergence", reported(mixed_collectives, 32, 0, o));
  expect("trap", "__trap", reported(trap, 64, 0, o));
#if !defined(SIMT_ASAN)  // which stops the program at the write
  expect("shared overrun", "outside a shared array", reported(shared_overrun, 32, 0, o));
  expect("dynamic overrun", "outside a shared array", reported(dynamic_overrun, 64, 128, o));
#endif
  expect("unwaited copy", "cp.async", reported(unwaited_copy, 64, 0, static_cast<const float4*>(in), floats + 0));
  expect("uninitialised shared", nullptr,
         [&] { return completes(uninitialised_shared, 1, 64, 0, floats + 0) && std::isnan(floats[63]); });
  expect("block too large", nullptr,
         [&] { return simt::launch(deep_stack, 1, 2048, 0, nullptr, o) == cudaErrorInvalidConfiguration; });
  expect("healthy afterwards", nullptr, [&] { return completes(deep_stack, 4, 64, 0, o) && out[63] == 1; });
}

}  // namespace

int main() {
  for (const auto order : {simt::Order::fwd, simt::Order::rev, simt::Order::rand}) {
    simt::config().order = order;
    all();
  }
  std::printf("%s\n", failures ? "FAILED" : "every misuse was reported");
  return failures != 0;
}
