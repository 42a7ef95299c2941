#include "core/capability.h"

#include <cstdlib>
#include <stdexcept>

namespace unlearn_ext {
namespace {

bool runs_here(Backend backend) {
#if defined(__x86_64__)
  if (backend == Backend::cpu_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(Backend::cpu_avx2);
  if (backend == Backend::cpu_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#endif
  return backend == Backend::cpu_baseline;
}

Backend choose() {
  const char* wish = std::getenv("UNLEARN_CPU_CAPABILITY");
  bool known = wish == nullptr || *wish == '\0';
  bool reached = known;  // backends better than the wish are passed over
  for (const Backend backend : {Backend::cpu_avx512, Backend::cpu_avx2, Backend::cpu_baseline})
    if (!known && name_of(backend) == std::string(wish)) known = true;
  if (!known)
    throw std::invalid_argument("UNLEARN_CPU_CAPABILITY must be avx512, avx2 or baseline, got " + std::string(wish));
  for (const Backend backend : compiled_cpu_backends()) {
    reached = reached || name_of(backend) == std::string(wish);
    if (reached && runs_here(backend)) return backend;
  }
  return Backend::cpu_baseline;
}

}  // namespace

const char* name_of(Backend backend) {
  switch (backend) {
    case Backend::cpu_avx512:
      return "avx512";
    case Backend::cpu_avx2:
      return "avx2";
    case Backend::cuda:
      return "cuda";
    default:
      return "baseline";
  }
}

const std::vector<Backend>& compiled_cpu_backends() {
#if defined(__x86_64__)
  static const std::vector<Backend> backends{Backend::cpu_avx512, Backend::cpu_avx2, Backend::cpu_baseline};
#else
  static const std::vector<Backend> backends{Backend::cpu_baseline};
#endif
  return backends;
}

Backend cpu_backend() {
  static const Backend chosen = choose();
  return chosen;
}

}  // namespace unlearn_ext
