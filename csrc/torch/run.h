// Where a launcher runs: the CPU backend of this machine, or the device's current stream.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include "core/capability.h"
#include "core/cuda_error.h"

namespace unlearn_ext {

// torch's own thread pool, through the function it exports: the header of at::parallel_for runs on one thread unless
// whoever includes it is compiled with OpenMP, and with torch's OpenMP at that.
inline void parallel_for(int64_t n, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context) {
  struct Task {
    void (*body)(const void*, int64_t, int64_t);
    const void* context;
  } task{body, context};
  const AOTITorchError error = torch_parallel_for(
      0, n, grain,
      [](int64_t begin, int64_t end, void* raw) {
        const Task& t = *static_cast<const Task*>(raw);
        t.body(t.context, begin, end);
      },
      &task);
  TORCH_CHECK(error == 0, "unlearn_ext: a CPU kernel ran out of memory");
}

inline int threads() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return static_cast<int>(std::max(1u, count));
}

inline void require_supported(const char* op, c10::Device device) {
  TORCH_CHECK_NOT_IMPLEMENTED(device.is_cpu() || device.is_cuda(), op, ": tensors must be on cpu or cuda, got ",
                              device);
#if !defined(UNLEARN_CUDA)
  TORCH_CHECK_NOT_IMPLEMENTED(!device.is_cuda(), op,
                              ": unlearn_ext was built without CUDA; rebuild with UNLEARN_CUDA=ON, got a tensor on ",
                              device);
#endif
}

// Each calls launch.operator()<Backend>(exec); require_supported() has passed the device.

template <class F>
void run_on_cpu(const F& launch) {
  const Exec exec{.parallel_for = &parallel_for,
                  .threads = threads(),
                  .bf16_dots = cpu_backend() == Backend::cpu_avx512_bf16,
                  .matrix_unit = cpu_backend() == Backend::cpu_amx};
  int error = 0;
  switch (cpu_backend()) {
#if defined(__x86_64__)
    case Backend::cpu_amx:
    case Backend::cpu_avx512_bf16:
    case Backend::cpu_avx512:
      error = launch.template operator()<Backend::cpu_avx512>(exec);
      break;
    case Backend::cpu_avx2:
      error = launch.template operator()<Backend::cpu_avx2>(exec);
      break;
#endif
    default:
      error = launch.template operator()<Backend::cpu_baseline>(exec);
  }
  TORCH_INTERNAL_ASSERT(error == 0);
}

#if defined(UNLEARN_CUDA)
template <class F>
void run_on_cuda(const char* op, c10::Device device, const F& launch) {
  const c10::DeviceGuard guard(device);
  const Exec exec{
      .stream = reinterpret_cast<void*>(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle())};
  const int error = launch.template operator()<Backend::cuda>(exec);
  TORCH_CHECK(error == 0, op, ": CUDA error: ", cuda_error_string(error));
}
#endif

template <class F>
void run([[maybe_unused]] const char* op, [[maybe_unused]] c10::Device device, const F& launch) {
#if defined(UNLEARN_CUDA)
  if (device.is_cuda()) return run_on_cuda(op, device, launch);
#endif
  run_on_cpu(launch);
}

}  // namespace unlearn_ext
