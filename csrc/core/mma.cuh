// Tensor cores, asynchronous copies and large shared memory, which CUDA C++ has no portable name for. Everything here
// is in every architecture since sm_80. The CUDA checker has its own version of the same functions (tests/native/simt).
#pragma once

#include "core/simt.h"

#if !defined(UNLEARN_EMULATE)

#include <cstdint>

namespace simt {

// Copies kBytes (4, 8 or 16, both addresses aligned to it) from global to shared memory; zeros if not `valid`, and
// then `from` may be anything. Done when the group that the copy is committed to has been waited for.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, bool valid) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const unsigned bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(kBytes), "r"(bytes));
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last kPending groups of this thread. Other threads see the copies after the next barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements, transposed. Lane l gives the address of row l % 8 of matrix l / 8 and gets from
// matrix i, in r[i], column l / 4 of rows 2 * (l % 4) and the one behind it.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}

// Which part of the depth of its fragments an mma multiplies; the halves by an instruction half as deep.
enum class Part { whole, lower, upper };

// d (16 x 8, float) = a (16 x depth) * b (depth x 8) + c by one warp, laid out as the PTX ISA says for mma.m16n8k*. A
// fragment half as deep is the first half of the registers of a whole one, and so is the second half.
#define UNLEARN_MMA(name, shape, half_shape, type)                                                                   \
  template <Part kPart = Part::whole>                                                                                \
  __device__ __forceinline__ void name(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2],                   \
                                       const float(&c)[4]) {                                                         \
    constexpr int kUpper = kPart == Part::upper ? 1 : 0;                                                             \
    if constexpr (kPart == Part::whole)                                                                              \
      asm("mma.sync.aligned." shape ".row.col.f32." type "." type                                                    \
          ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "                                                                \
          "{%8, %9}, {%10, %11, %12, %13};"                                                                          \
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),       \
            "f"(c[3]));                                                                                              \
    else                                                                                                             \
      asm("mma.sync.aligned." half_shape ".row.col.f32." type "." type                                               \
          ".f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "                                                                  \
          "{%7, %8, %9, %10};"                                                                                       \
          : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                                           \
          : "r"(a[2 * kUpper]), "r"(a[2 * kUpper + 1]), "r"(b[kUpper]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3])); \
  }
UNLEARN_MMA(mma_bf16, "m16n8k16", "m16n8k8", "bf16")
UNLEARN_MMA(mma_f16, "m16n8k16", "m16n8k8", "f16")
UNLEARN_MMA(mma_tf32, "m16n8k8", "m16n8k4", "tf32")
#undef UNLEARN_MMA

// A value to be kept in registers: without this the compiler works the cheaper ones out again wherever they are used.
template <class T>
__device__ __forceinline__ void keep(T& x) {
  if constexpr (sizeof(T) == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
}

}  // namespace simt

#endif

namespace simt {

// launch() with dynamic shared memory beyond the 48 KiB that a kernel has to be allowed to ask for.
template <class... P, class... A>
cudaError_t launch_shared(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          A&&... args) {
#if !defined(UNLEARN_EMULATE)
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)))
    return error;
#endif
  return launch(kernel, grid, block, shared_bytes, stream, std::forward<A>(args)...);
}

// A float for mma_tf32, which ignores the low 13 bits: half of what they can hold is added so that dropping them
// rounds to nearest. (cvt.rna.tf32 also clears them, for twice the instructions.) Infinities and NaNs stay.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return fabsf(x) < __builtin_huge_valf() ? bits + 0x1000u : bits;
}

}  // namespace simt
