// apply() and apply_masked() of the backend this file is compiled for. Both return a cudaError_t, 0 on a CPU.
#pragma once

#if defined(__CUDACC__) || defined(UNLEARN_EMULATE)
#include "core/apply_cuda.cuh"
#else
#include "core/apply_cpu.h"
#endif
