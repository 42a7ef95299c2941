// The CUDA checker must report misuse: every case plants one and names the text it wants to read.
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>

#include "core/mma.cuh"

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
  simt::cp_async<16>(&tile[threadIdx.x], &in[threadIdx.x], true);
  simt::cp_async_commit();
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x].x;
}

__global__ void early_read(const float4* in, float* out) {
  SIMT_SHARED(float4, tile, [32]);
  tile[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  simt::cp_async<16>(&tile[threadIdx.x], &in[threadIdx.x], true);
  simt::cp_async_commit();
  out[threadIdx.x] = tile[threadIdx.x].x;  // may be what was there before, or not
  simt::cp_async_wait<0>();
}

__global__ void misaligned_copy(const float* in, float* out) {
  SIMT_SHARED(float4, tile, [33]);
  simt::cp_async<16>(&tile[threadIdx.x].y, in, true);
  simt::cp_async_commit();
  simt::cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x].y;
}

__global__ void misaligned_ldmatrix(uint32_t* out) {
  SIMT_SHARED(uint4, tile, [33]);
  uint32_t r[4];
  simt::ldmatrix_x4_trans(r, &tile[threadIdx.x].y);
  out[threadIdx.x] = r[0];
}

__global__ void mma_without_lanes(float* out) {
  if (threadIdx.x < 8) return;
  float c[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  simt::mma_bf16(c, a, b, c);
  out[threadIdx.x] = c[0];
}

// c = a^T b for a: [depth][16], b: [depth][8], both in shared memory as ldmatrix wants them.
// Its halves by an instruction each or, what ought to be the same, both by one.
enum class Format { bf16, f16, tf32 };
template <simt::Part kPart, Format kFormat>
void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kFormat == Format::bf16)
    simt::mma_bf16<kPart>(sum, a, b, sum);
  else if constexpr (kFormat == Format::f16)
    simt::mma_f16<kPart>(sum, a, b, sum);
  else
    simt::mma_tf32<kPart>(sum, a, b, sum);
}
template <Format kFormat, bool kInHalves>
__global__ void product(const uint16_t* a, const uint16_t* b, const float* a32, const float* b32, float* c) {
  SIMT_SHARED(uint16_t, a_tile, [16][16]);
  SIMT_SHARED(uint16_t, b_tile, [16][16]);  // in columns 8 to 15 the second half of a pair that is not used
  const int lane = static_cast<int>(threadIdx.x), g = lane / 4, t = lane % 4;
  float sum[4] = {};
  const auto add = [&](const uint32_t(&x)[4], const uint32_t(&y)[2]) {
    if constexpr (kInHalves)
      multiply<simt::Part::upper, kFormat>(sum, x, y), multiply<simt::Part::lower, kFormat>(sum, x, y);
    else
      multiply<simt::Part::whole, kFormat>(sum, x, y);
  };
  if constexpr (kFormat == Format::tf32) {
    uint32_t x[4], y[2];
    for (int i = 0; i < 4; ++i) x[i] = simt::to_tf32(a32[(t + i / 2 * 4) * 16 + g + i % 2 * 8]);
    for (int i = 0; i < 2; ++i) y[i] = simt::to_tf32(b32[(t + i * 4) * 8 + g]);
    add(x, y);
  } else {
    // By asynchronous copies: 16 rows of 32 bytes of a, and of 16 bytes of b beside as many zeros.
    simt::cp_async<16>(&a_tile[lane / 2][lane % 2 * 8], a + lane * 8, true);
    simt::cp_async<16>(&b_tile[lane / 2][lane % 2 * 8], b + lane / 2 * 8, lane % 2 == 0);
    simt::cp_async_commit();
    simt::cp_async_wait<0>();
    __syncwarp();
    uint32_t x[4], y[4];
    simt::ldmatrix_x4_trans(x, &a_tile[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
    simt::ldmatrix_x4_trans(y, &b_tile[lane % 16][lane / 16 * 8]);
    const uint32_t used[] = {y[0], y[1]}, unused[] = {y[2], y[3]};
    add(x, used), add(x, unused);
  }
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
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

// Small integers and halves of them, which every format holds and whose sums are exact.
template <Format kFormat, bool kInHalves>
bool multiplies() {
  alignas(16) uint16_t a[16 * 16], b[16 * 8];
  float a32[16 * 16], b32[16 * 8], c[16 * 8];
  const auto fill = [](uint16_t* bits, float* value, int n, int step) {
    for (int i = 0; i < n; ++i) {
      value[i] = static_cast<float>(i * step % 13 - 6) / 2;
      // 1.5 is 1.1 in binary: the significand's first two bits and the exponent are all there is.
      const uint32_t raw = __builtin_bit_cast(uint32_t, value[i]);
      const uint32_t f16 =
          (raw >> 16 & 0x8000) | (value[i] == 0 ? 0 : (raw >> 23 & 0xff) - 112) << 10 | (raw >> 13 & 0x3ff);
      bits[i] = static_cast<uint16_t>(kFormat == Format::bf16 ? raw >> 16 : f16);
    }
  };
  fill(a, a32, 16 * 16, 7), fill(b, b32, 16 * 8, 5);
  constexpr int kDepth = kFormat == Format::tf32 ? 8 : 16;
  if (simt::launch(product<kFormat, kInHalves>, 1, 32, 0, nullptr, a, b, a32, b32, c) != cudaSuccess) return false;
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < kDepth; ++k) want += a32[k * 16 + i] * b32[k * 8 + j];
      if (c[i * 8 + j] != want) return false;
    }
  return true;
}

bool rounds_to_tf32() {
  const auto rounded = [](float x) { return __builtin_bit_cast(float, simt::to_tf32(x) & 0xffffe000u); };
  return rounded(1 + 0x1p-11f) == 1 + 0x1p-10f && rounded(1 + 0x1.8p-12f) == 1 &&
         rounded(-1 - 0x1p-11f) == -1 - 0x1p-10f && rounded(0x1.fffp0f) == 2 && rounded(INFINITY) == INFINITY &&
         rounded(-INFINITY) == -INFINITY && std::isnan(rounded(NAN)) &&
         std::isnan(rounded(__builtin_bit_cast(float, 0x7fffffffu)));
}

void all() {
  int out[64];
  uint32_t words[64];
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
  expect("read before the wait", nullptr, [&] {
    return completes(early_read, 1, 32, 0, static_cast<const float4*>(in), floats + 0) && std::isnan(floats[0]);
  });
  expect("misaligned copy", "not aligned", reported(misaligned_copy, 32, 0, floats + 0, floats + 0));
  expect("misaligned ldmatrix", "not 16-byte aligned", reported(misaligned_ldmatrix, 32, 0, words + 0));
  expect("mma without lanes", "missing lanes", reported(mma_without_lanes, 32, 0, floats + 0));
  expect("mma bf16", nullptr, multiplies<Format::bf16, false>);
  expect("mma bf16, in halves", nullptr, multiplies<Format::bf16, true>);
  expect("mma f16", nullptr, multiplies<Format::f16, false>);
  expect("mma f16, in halves", nullptr, multiplies<Format::f16, true>);
  expect("mma tf32", nullptr, multiplies<Format::tf32, false>);
  expect("mma tf32, in halves", nullptr, multiplies<Format::tf32, true>);
  expect("rounding to tf32", nullptr, rounds_to_tf32);
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
