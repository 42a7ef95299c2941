// The one CUDA include of a kernel file: launches, shared memory and the instructions C++ has no name for.
//
// Under UNLEARN_EMULATE the same kernels run on a CPU, one fiber per CUDA thread, for tests (tests/native).
#pragma once

#if defined(UNLEARN_EMULATE)

#include "simt_cpu.h"

#else

#include <utility>

#include <cuda_runtime.h>

// Static shared memory, SIMT_SHARED(float, tile, [32][33]); a macro so that the CPU build can hand every block a fresh
// poisoned copy.
#define SIMT_SHARED(type, name, dims) __shared__ type name dims

// The block's dynamic shared memory, as many bytes as its launch asks for.
#define SIMT_DYN_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char simt_dynamic[]; \
  type* name = reinterpret_cast<type*>(simt_dynamic)

namespace simt {

// The only launch of the package.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, A&&... args) {
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<A>(args)...);
  return cudaGetLastError();
}

}  // namespace simt

#endif
