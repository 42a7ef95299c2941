#include "core/capability.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__) && !defined(UNLEARN_NO_MATRIX_UNIT)
#define UNLEARN_MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace unlearn_ext {
namespace {

#if defined(__x86_64__)
// Whether there is a matrix unit for bfloat16 and the kernel lets this process have its registers, which it has to be
// asked for since they make a thread's state 8 KB larger. Source: Linux, Documentation/arch/x86/xstate.rst.
bool has_matrix_unit() {
#if defined(UNLEARN_EMULATED_MATRIX_UNIT)
  return true;
#elif defined(UNLEARN_MATRIX_UNIT)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBFloat16) == 0 || (d & kTiles) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_bf16_dots() {
#if defined(UNLEARN_EMULATED_MATRIX_UNIT)
  return true;
#elif defined(UNLEARN_MATRIX_UNIT)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kDots = 1u << 5;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kDots) != 0;
#else
  return false;
#endif
}

// Clang's __builtin_cpu_supports() does not know f16c.
bool has_half_conversions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kHalfConversions = 1u << 29;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & kHalfConversions) != 0;
}
#endif

bool runs_here(Backend backend) {
#if defined(__x86_64__)
  if (backend == Backend::cpu_amx) return runs_here(Backend::cpu_avx512) && has_matrix_unit();
  if (backend == Backend::cpu_avx512_bf16) return runs_here(Backend::cpu_avx512) && has_bf16_dots();
  if (backend == Backend::cpu_avx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs_here(Backend::cpu_avx2);
  if (backend == Backend::cpu_avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && has_half_conversions();
#endif
  return backend == Backend::cpu_baseline;
}

Backend choose() {
  const char* wish = std::getenv("UNLEARN_CPU_CAPABILITY");
  bool known = wish == nullptr || *wish == '\0';
  bool reached = known;  // backends better than the wish are passed over
  for (const Backend backend :
       {Backend::cpu_amx, Backend::cpu_avx512_bf16, Backend::cpu_avx512, Backend::cpu_avx2, Backend::cpu_baseline})
    if (!known && name_of(backend) == std::string(wish)) known = true;
  if (!known)
    throw std::invalid_argument("UNLEARN_CPU_CAPABILITY must be amx, avx512_bf16, avx512, avx2 or baseline, got " +
                                std::string(wish));
  for (const Backend backend : compiled_cpu_backends()) {
    reached = reached || name_of(backend) == std::string(wish);
    if (reached && runs_here(backend)) return backend;
  }
  return Backend::cpu_baseline;
}

}  // namespace

const char* name_of(Backend backend) {
  switch (backend) {
    case Backend::cpu_amx:
      return "amx";
    case Backend::cpu_avx512_bf16:
      return "avx512_bf16";
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
  static const std::vector<Backend> backends{
#if defined(UNLEARN_MATRIX_UNIT)
      Backend::cpu_amx, Backend::cpu_avx512_bf16,
#endif
#if defined(__x86_64__)
      Backend::cpu_avx512, Backend::cpu_avx2,
#endif
      Backend::cpu_baseline};
  return backends;
}

Backend cpu_backend() {
  static const Backend chosen = choose();
  return chosen;
}

}  // namespace unlearn_ext
