#include "kernels/masked.h"

#include "core/apply.h"

namespace unlearn_ext {

template <>
int masked_sgd<kBackend>(DType dtype, const Slice<4>* slices, int64_t count, const SgdConstants& constants,
                         const Exec& exec) {
  return visit(dtype, [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    return apply_masked<Row<T, A, T>>(MaskedSgd<A, true>{constants}, slices, count, exec);
  });
}

template <>
int masked_sgd<kBackend>(DType dtype, const Slice<3>* slices, int64_t count, const SgdConstants& constants,
                         const Exec& exec) {
  return visit(dtype, [&]<class T>(Tag<T>) {
    return apply_masked<Row<T, T>>(MaskedSgd<acc_t<T>, false>{constants}, slices, count, exec);
  });
}

#if defined(__CUDACC__) || defined(UNLEARN_EMULATE)
namespace {
__global__ void adamw_corrections_kernel(AdamwConstants constants, const void* step, bool step_is_double,
                                         AdamwCorrections* corrections) {
  const double t = step_is_double ? *static_cast<const double*>(step) : *static_cast<const float*>(step);
  *corrections = adamw_corrections(constants, t);
}
}  // namespace
#endif

template <>
int masked_adamw<kBackend>(DType dtype, const Slice<5>* slices, int64_t count, const AdamwConstants& constants,
                           double step, const void* device_step, DType step_dtype, AdamwCorrections* scratch,
                           const Exec& exec) {
  if (device_step != nullptr) {
#if defined(__CUDACC__) || defined(UNLEARN_EMULATE)
    if (const cudaError_t error =
            simt::launch(adamw_corrections_kernel, dim3(1), dim3(1), 0, static_cast<cudaStream_t>(exec.stream),
                         constants, device_step, step_dtype == DType::f64, scratch))
      return error;
#else
    step = step_dtype == DType::f64 ? *static_cast<const double*>(device_step)
                                    : static_cast<double>(*static_cast<const float*>(device_step));
    scratch = nullptr;
#endif
  } else {
    scratch = nullptr;
  }
  const AdamwCorrections host = adamw_corrections(constants, step);
  return visit(dtype, [&]<class T>(Tag<T>) {
    using A = acc_t<T>;
    return apply_masked<Row<T, A, A, T>>(MaskedAdamw<A>{constants, host, scratch}, slices, count, exec);
  });
}

template <>
int apply_mask<kBackend>(DType dtype, const Slice<2>* slices, int64_t count, const Exec& exec) {
  return visit(dtype,
               [&]<class T>(Tag<T>) { return apply_masked<Row<T>>(ClearMasked<acc_t<T>>{}, slices, count, exec); });
}

}  // namespace unlearn_ext
