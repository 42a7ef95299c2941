// What a kernel file is compiled for, and what its launcher needs to run.
//
// One source serves every backend. A launcher is declared once, as a template over Backend; each build of its file
// defines the specialisation for kBackend. Symbols of different instruction sets therefore never share a name.
#pragma once

#include <cstdint>

// Formulas shared by CPU and GPU. Always inlined: an out-of-line copy compiled for AVX-512 could otherwise be the one
// the linker keeps for every CPU.
#if defined(__CUDACC__)
#define UNLEARN_HD __host__ __device__ __forceinline__
#else
#define UNLEARN_HD inline __attribute__((always_inline))
#endif

namespace unlearn_ext {

// No file is compiled for cpu_avx512_bf16 and cpu_amx: they are cpu_avx512 on a CPU that has dot products of bfloat16,
// Exec::bf16_dots, or whose matrix unit may be used, Exec::matrix_unit.
enum class Backend { cpu_baseline, cpu_avx2, cpu_avx512, cpu_avx512_bf16, cpu_amx, cuda };

#if defined(UNLEARN_BACKEND)
inline constexpr Backend kBackend = Backend::UNLEARN_BACKEND;
#endif

// How a launcher runs: a cudaStream_t on a GPU, an injected thread pool on a CPU. `body` is called with disjoint
// ranges that cover [0, n), each at least `grain` long unless n is shorter.
struct Exec {
  void* stream = nullptr;
  void (*parallel_for)(int64_t n, int64_t grain, void (*body)(const void* context, int64_t begin, int64_t end),
                       const void* context) = nullptr;
  int threads = 1;           // of that pool, for how work is cut up; results don't depend on it
  bool bf16_dots = false;    // see Backend::cpu_avx512_bf16
  bool matrix_unit = false;  // see Backend::cpu_amx
};

}  // namespace unlearn_ext
