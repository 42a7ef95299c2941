// Names of CUDA errors for files that see no CUDA header.
#pragma once

namespace unlearn_ext {

const char* cuda_error_string(int error);

}  // namespace unlearn_ext
