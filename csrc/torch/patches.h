// The patches that a convolution sees of its input.
#pragma once

#include <c10/util/safe_numerics.h>

#include "core/patches.h"
#include "torch/arguments.h"

namespace unlearn_ext {
namespace {

// Of one axis: sums and products of such numbers fit into 64 bits.
constexpr int64_t kMostSteps = int64_t{1} << 31;

// inputs: [N, C, spatial], detached and not lazily negated; the patches are those of the first group and point into it.
// padding: one entry per spatial dimension, or two (before, after).
Patches patches_of(const char* op, const at::Tensor& inputs, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const auto spatial = static_cast<int64_t>(kernel_size.size());
  TORCH_CHECK_VALUE(spatial >= 1 && spatial <= kMaxSpatial, op, ": kernel_size must have 1 to 3 entries, got ",
                    kernel_size);
  TORCH_CHECK_VALUE(inputs.dim() == spatial + 2, op, ": inputs must have shape [N, C, ", spatial, " spatial], got ",
                    inputs.sizes());
  const auto axes = static_cast<size_t>(spatial);
  TORCH_CHECK_VALUE(stride.size() == axes, op, ": stride must have ", spatial, " entries, got ", stride);
  TORCH_CHECK_VALUE(dilation.size() == axes, op, ": dilation must have ", spatial, " entries, got ", dilation);
  TORCH_CHECK_VALUE(padding.size() == axes || padding.size() == 2 * axes, op, ": padding must have ", spatial,
                    " entries, or two per dimension, got ", padding);
  TORCH_CHECK_VALUE(groups >= 1 && inputs.size(1) % groups == 0, op, ": groups must be at least 1 and divide the ",
                    inputs.size(1), " channels, got ", groups);
  Patches patches{};
  patches.dtype = *dtype_of(inputs.scalar_type());
  patches.samples = inputs.size(0);
  patches.channels = inputs.size(1) / groups;
  patches.sample_stride = inputs.stride(0);
  patches.channel_stride = inputs.stride(1);
  patches.data = inputs.numel() == 0 ? nullptr : inputs.const_data_ptr();
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    const int64_t at = axis - (kMaxSpatial - spatial);  // in the op's arguments
    patches.in[axis] = patches.out[axis] = patches.kernel[axis] = patches.stride[axis] = patches.dilation[axis] = 1;
    if (at < 0) continue;
    const auto i = static_cast<size_t>(at);
    const bool pairs = padding.size() == 2 * axes;
    const int64_t before = padding[pairs ? 2 * i : i], after = padding[pairs ? 2 * i + 1 : i];
    TORCH_CHECK_VALUE(kernel_size[i] >= 1, op, ": kernel_size must be positive, got ", kernel_size);
    TORCH_CHECK_VALUE(stride[i] >= 1, op, ": stride must be positive, got ", stride);
    TORCH_CHECK_VALUE(dilation[i] >= 1, op, ": dilation must be positive, got ", dilation);
    TORCH_CHECK_VALUE(before >= 0 && after >= 0, op, ": padding must be non-negative, got ", padding);
    const std::pair<const char*, int64_t> steps[] = {{"kernel_size", kernel_size[i]},
                                                     {"stride", stride[i]},
                                                     {"dilation", dilation[i]},
                                                     {"padding", std::max(before, after)}};
    for (const auto& [name, value] : steps)
      TORCH_CHECK_VALUE(value < kMostSteps, op, ": ", name, " must be below ", kMostSteps, ", got ", value);
    patches.in[axis] = inputs.size(at + 2);
    patches.kernel[axis] = kernel_size[i];
    patches.stride[axis] = stride[i];
    patches.dilation[axis] = dilation[i];
    patches.padding[axis] = before;
    patches.space_stride[axis] = inputs.stride(at + 2);
    const int64_t room = patches.in[axis] + before + after - dilation[i] * (kernel_size[i] - 1) - 1;
    TORCH_CHECK_VALUE(room >= 0, op, ": inputs must be at least as large as the dilated kernel, got ", inputs.sizes(),
                      " for kernel_size ", kernel_size, " and dilation ", dilation);
    patches.out[axis] = room / stride[i] + 1;
  }
  int64_t scalars = patches.channels;
  bool is_huge = c10::mul_overflows(scalars, patches.samples, &scalars);
  for (int axis = 0; axis < kMaxSpatial; ++axis)
    is_huge = is_huge || c10::mul_overflows(scalars, patches.kernel[axis], &scalars) ||
              c10::mul_overflows(scalars, patches.out[axis], &scalars);
  TORCH_CHECK_VALUE(!is_huge, op, ": the patches must have fewer than 2^63 scalars, got kernel_size ", kernel_size,
                    ", padding ", padding, " for inputs ", inputs.sizes());
  return patches;
}

}  // namespace
}  // namespace unlearn_ext
