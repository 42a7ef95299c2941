// CUDA C++ for a CPU compiler: the names a kernel file uses, executed by engine.h. Tests only; core/simt.h includes it
// under UNLEARN_EMULATE. Needs nothing of the CUDA toolkit.
//
// What the values of a run cannot show: timing, the weak memory order of a GPU, the last bit of fused or approximate
// arithmetic. A block that spins on a later block hangs. Branches under __CUDA_ARCH__ are not compiled.
#pragma once

#include <cmath>
#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>

#include "engine.h"

// ---- Language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::cur->tid)
#define blockIdx (::simt::machine.bid)
#define blockDim (::simt::machine.block)
#define gridDim (::simt::machine.grid)
#define warpSize 32

// Last parameters of every collective: where it was called.
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

#define SIMT_SHARED(type, name, dims) \
  static char simt_key_##name;        \
  typedef type simt_type_##name dims; \
  simt_type_##name& name =            \
      *static_cast<simt_type_##name*>(::simt::shared_alloc(&simt_key_##name, sizeof(simt_type_##name)))
#define SIMT_DYN_SHARED(type, name) type* name = static_cast<type*>(::simt::shared_dynamic())

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- The runtime calls a launcher may make

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };

inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes) std::memset(p, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace simt {

// The signature of core/simt.h. Throws simt::error on a misuse the engine can see.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t, A&&... args) {
  const uint64_t n_threads = uint64_t{block.x} * block.y * block.z;
  if (!n_threads || n_threads > kMaxThreads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > 227 * 1024)
    return cudaErrorInvalidConfiguration;
  static_assert((sizeof(std::decay_t<P>) + ... + 0) <= 4096, "kernel parameters exceed what every driver takes");
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
  } call{kernel, std::tuple<std::decay_t<P>...>(std::forward<A>(args)...)};
  run_grid(
      grid, block, shared_bytes,
      [](void* c) { std::apply(static_cast<Call*>(c)->kernel, static_cast<Call*>(c)->args); }, &call);
  return cudaSuccess;
}

// ---- Warp collectives

template <class T>
struct ShuffleArg {
  T in, out;
  int source;
};
template <class T>
void shuffle_op(Rendezvous& r) {
  for (uint32_t m = r.arrived; m; m &= m - 1) {
    auto* a = static_cast<ShuffleArg<T>*>(r.arg[__builtin_ctz(m)]);
    if (r.arrived >> a->source & 1)
      std::memcpy(&a->out, &static_cast<ShuffleArg<T>*>(r.arg[a->source])->in, sizeof(T));
    else
      std::memset(static_cast<void*>(&a->out), kPoison, sizeof(T));  // undefined on the device
  }
}
template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what, const char* file, int line) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8));
  ShuffleArg<T> a{value, value, source & 31};
  collective(mask, &a, &shuffle_op<T>, what, file, line);
  return a.out;
}

struct VoteArg {
  uint64_t in;
  uint32_t out;
};
inline void ballot_op(Rendezvous& r) {
  uint32_t set = 0;
  for (uint32_t m = r.arrived; m; m &= m - 1)
    if (static_cast<VoteArg*>(r.arg[__builtin_ctz(m)])->in) set |= m & -m;
  for (uint32_t m = r.arrived; m; m &= m - 1) static_cast<VoteArg*>(r.arg[__builtin_ctz(m)])->out = set;
}
inline void match_op(Rendezvous& r) {
  for (uint32_t m = r.arrived; m; m &= m - 1) {
    auto* a = static_cast<VoteArg*>(r.arg[__builtin_ctz(m)]);
    a->out = 0;
    for (uint32_t n = r.arrived; n; n &= n - 1)
      if (static_cast<VoteArg*>(r.arg[__builtin_ctz(n)])->in == a->in) a->out |= n & -n;
  }
}
inline void sync_op(Rendezvous&) {}
inline uint32_t vote(uint32_t mask, uint64_t value, void (*op)(Rendezvous&), const char* what, const char* file,
                     int line) {
  VoteArg a{value, 0};
  collective(mask, &a, op, what, file, line);
  return a.out;
}
inline void warp_sync(uint32_t mask, const char* file, int line) {
  collective(mask, nullptr, &sync_op, "__syncwarp", file, line, true);
}
template <class T>
struct ReduceArg {
  T in, out;
};
template <class T, T (*F)(T, T)>
void reduce_op(Rendezvous& r) {
  T total = static_cast<ReduceArg<T>*>(r.arg[__builtin_ctz(r.arrived)])->in;
  for (uint32_t m = r.arrived & (r.arrived - 1); m; m &= m - 1)
    total = F(total, static_cast<ReduceArg<T>*>(r.arg[__builtin_ctz(m)])->in);
  for (uint32_t m = r.arrived; m; m &= m - 1) static_cast<ReduceArg<T>*>(r.arg[__builtin_ctz(m)])->out = total;
}
template <auto F, class T>
T reduce(uint32_t mask, T value, const char* what, const char* file, int line) {
  ReduceArg<T> a{value, value};
  collective(mask, &a, &reduce_op<T, F>, what, file, line);
  return a.out;
}
template <class T>
T sum_of(T a, T b) {
  return a + b;
}
template <class T>
T larger_of(T a, T b) {
  return a > b ? a : b;
}
template <class T>
T smaller_of(T a, T b) {
  return a < b ? a : b;
}

// ---- Matrix instructions and asynchronous copies: core/mma.cuh has the same for a GPU

enum class Part { whole, lower, upper };

struct MmaArg {
  float* d;
  const uint32_t *a, *b;
  const float* c;
};
inline float bf16_at(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }
inline float f16_at(uint16_t x) {
  const float magnitude = __builtin_bit_cast(float, (x & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = (x & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u, sign = (x & 0x8000u) << 16;
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, magnitude) | special | sign);
}
inline float tf32_at(uint32_t x) { return __builtin_bit_cast(float, x & 0xffffe000u); }

inline void need_all_lanes(const Rendezvous& r) {  // some may have returned, before or after the others arrived
  if (~r.arrived) fail(std::string(r.what) + " in a warp with exited or missing lanes, at " + at(r.file, r.line));
}

// Elements 0 and 1 of what a register holds: two of 16 bits, or one of 32.
template <auto F, int kWhole>
float element_of(uint32_t x, [[maybe_unused]] int high) {
  if constexpr (kWhole == 16)
    return F(static_cast<uint16_t>(high ? x >> 16 : x));
  else
    return F(x);
}

// Fragment layouts of mma.m16n8k16, m16n8k8 and m16n8k4, PTX ISA: F and kWhole are those of the whole depth.
template <auto F, int kWhole, Part kPart>
void mma_op(Rendezvous& r) {
  need_all_lanes(r);
  constexpr int kHalves = kPart == Part::whole ? 2 : 1, kUpper = kPart == Part::upper ? 1 : 0;
  stats().half_mmas += kHalves;
  constexpr int kDepth = kWhole / 2 * kHalves, kPer = kWhole / 8;  // kPer: elements of a register
  float A[16][kDepth], B[kDepth][8], D[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<MmaArg*>(r.arg[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int h = 0; h < kPer; ++h)
      for (int half = 0; half < kHalves; ++half) {
        const int k = t * kPer + half * 4 * kPer + h, from = half + kUpper;
        A[g][k] = element_of<F, kWhole>(x->a[2 * from], h);
        A[g + 8][k] = element_of<F, kWhole>(x->a[2 * from + 1], h);
        B[k][g] = element_of<F, kWhole>(x->b[from], h);
      }
    for (int h = 0; h < 2; ++h) D[g][2 * t + h] = x->c[h], D[g + 8][2 * t + h] = x->c[2 + h];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* x = static_cast<MmaArg*>(r.arg[lane]);
    const int g = lane >> 2, t = lane & 3;
    for (int h = 0; h < 2; ++h) x->d[h] = D[g][2 * t + h], x->d[2 + h] = D[g + 8][2 * t + h];
  }
}
template <auto F, int kWhole, Part kPart>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], const char* what,
         const char* file, int line) {
  MmaArg x{d, a, b, c};
  collective(~0u, &x, &mma_op<F, kWhole, kPart>, what, file, line);
}
template <Part kPart = Part::whole>
void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], SIMT_SITE) {
  mma<bf16_at, 16, kPart>(d, a, b, c, "mma_bf16", file, line);
}
template <Part kPart = Part::whole>
void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], SIMT_SITE) {
  mma<f16_at, 16, kPart>(d, a, b, c, "mma_f16", file, line);
}
template <Part kPart = Part::whole>
void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], SIMT_SITE) {
  mma<tf32_at, 8, kPart>(d, a, b, c, "mma_tf32", file, line);
}

struct MatrixArg {
  uint16_t row[8];
  uint32_t* r;
};
inline void ldmatrix_trans_op(Rendezvous& r) {
  need_all_lanes(r);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const auto row = [&](int k) -> uint32_t {
        return static_cast<MatrixArg*>(r.arg[8 * i + 2 * (lane & 3) + k])->row[lane >> 2];
      };
      static_cast<MatrixArg*>(r.arg[lane])->r[i] = row(0) | row(1) << 16;
    }
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_SITE) {
  if (reinterpret_cast<uintptr_t>(row) & 15) fail("ldmatrix: a row is not 16-byte aligned, at " + at(file, line));
  MatrixArg x{{}, r};
  std::memcpy(x.row, row, 16);  // read by the lane that named it, in the sight of the sanitizers
  collective(~0u, &x, &ldmatrix_trans_op, "ldmatrix", file, line);
}

template <class T>
void keep(T&) {}

// Performed at the wait, so that a missing one shows. Until then the destination holds NaN: the copy may arrive at any
// time after its start, so nobody may still want what was there.
template <int kBytes>
void cp_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if ((reinterpret_cast<uintptr_t>(to) | (valid ? reinterpret_cast<uintptr_t>(from) : 0)) & (kBytes - 1))
    fail("cp.async: not aligned to its " + std::to_string(kBytes) + " bytes");
#ifdef SIMT_TRAFFIC
  if (valid) traffic::touch(from, kBytes, traffic::Access::load);
  traffic::touch(to, kBytes, traffic::Access::store);
  const traffic::Uncounted filled_in_advance;
#endif
  std::memset(to, kPoison, kBytes);
  Quiet q;
  cur->copies.push_back({to, valid ? from : nullptr, kBytes, cur->copy_group});
}
inline void cp_async_commit() {
  Quiet q;
  ++cur->copy_group;
}
template <int kPending>
void cp_async_wait() {
  for (;;) {
    AsyncCopy c{};
    {
      Quiet q;
      auto& pending = cur->copies;
      if (pending.empty() || pending.front().group >= cur->copy_group - kPending) return;
      c = pending.front();
      pending.erase(pending.begin());
    }
    if (c.from != nullptr)
      std::memcpy(c.to, c.from, c.bytes);
    else
      std::memset(c.to, 0, c.bytes);
  }
}

// Atomic although no two fibers run at once: ThreadSanitizer must see atomics to tell them from plain accesses.
template <class T, class F>
T read_modify_write(T* p, F f) {
  using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == sizeof(U));
  order_atomic(p);
#ifdef SIMT_TRAFFIC
  traffic::touch(p, sizeof(T), traffic::Access::atomic);
#endif
  U bits = __atomic_load_n(reinterpret_cast<U*>(p), __ATOMIC_RELAXED), updated;
  T old;
  do {
    std::memcpy(&old, &bits, sizeof(T));
    const T wanted = f(old);
    std::memcpy(&updated, &wanted, sizeof(T));
  } while (
      !__atomic_compare_exchange_n(reinterpret_cast<U*>(p), &bits, updated, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace simt

// ---- Device functions

inline void __syncthreads(SIMT_SITE) { simt::barrier(0, file, line); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::barrier(p, file, line); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::barrier(p, file, line) != 0; }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::barrier(!p, file, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::warp_sync(mask, file, line); }
inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
[[noreturn]] inline void __trap() { simt::fail("__trap()"); }
unsigned __activemask() = delete;  // means nothing under independent scheduling: pass masks explicitly

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::cur->lane);
  return simt::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::cur->lane), source = lane ^ lane_mask;
  return simt::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, "__shfl_xor_sync", file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::cur->lane), d = static_cast<int>(delta);
  return simt::shuffle(mask, value, (lane & (width - 1)) + d < width ? lane + d : lane, "__shfl_down_sync", file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int lane = static_cast<int>(simt::cur->lane), d = static_cast<int>(delta);
  return simt::shuffle(mask, value, (lane & (width - 1)) >= d ? lane - d : lane, "__shfl_up_sync", file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::vote(mask, p != 0, &simt::ballot_op, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::vote(mask, p != 0, &simt::ballot_op, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, SIMT_SITE) {
  return simt::vote(mask, p == 0, &simt::ballot_op, "__all_sync", file, line) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::vote(mask, bits, &simt::match_op, "__match_any_sync", file, line);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce<simt::sum_of<T>>(mask, value, "__reduce_add_sync", file, line);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce<simt::larger_of<T>>(mask, value, "__reduce_max_sync", file, line);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, SIMT_SITE) {
  return simt::reduce<simt::smaller_of<T>>(mask, value, "__reduce_min_sync", file, line);
}

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return old + value; });
}
template <class T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return old - value; });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T old) { return old & value; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::read_modify_write(p, [expected, value](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  return simt::read_modify_write(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> value) {
  *p = value;
}
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
