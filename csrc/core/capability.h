// Which instruction set the CPU kernels use, decided once per process.
#pragma once

#include <string>
#include <vector>

#include "core/backend.h"

namespace unlearn_ext {

// The best of the compiled-in backends this CPU runs, or the one UNLEARN_CPU_CAPABILITY names if that is no better.
// Throws std::invalid_argument for a name that is unknown.
Backend cpu_backend();

const char* name_of(Backend backend);

// The CPU backends of this build, best first.
const std::vector<Backend>& compiled_cpu_backends();

}  // namespace unlearn_ext
