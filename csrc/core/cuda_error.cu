#include "core/cuda_error.h"

#include "core/simt.h"

namespace unlearn_ext {

const char* cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace unlearn_ext
