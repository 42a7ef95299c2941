// Ops on subspaces of layer inputs: Gram matrices and projections.
#pragma once

#include <ATen/Context.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "kernels/gram.h"
#include "kernels/project.h"
#include "torch/arguments.h"
#include "torch/doors.h"
#include "torch/patches.h"

namespace unlearn_ext {
namespace {

// Products of torch's own library, in the dtype and precision of their inputs: neither autocast nor tf32 may change
// them.
struct AsGiven {
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  at::NoTF32Guard no_tf32;
};

// Rows multiplied by one product of the library on a GPU: few enough for float32 totals within it, and a bounded copy.
constexpr int64_t kProductRows = 4096, kProductBytes = int64_t{64} << 20, kProductColumns = 1024;

#if defined(UNLEARN_CUDA)
// Halves are multiplied as they are: their products are exact in float32, in which the library adds them up unless it
// has been allowed to do that in float16.
at::Tensor product_of(const at::Tensor& a, const at::Tensor& b) {
  const at::ScalarType given = a.scalar_type(), compute = accumulator_type(given);
  const bool may_lose = given == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS();
  at::Tensor product = given == compute ? at::mm(a, b)
                       : may_lose       ? at::mm(a.to(compute), b.to(compute))
                                        : at::mm(a, b, compute);
  TORCH_INTERNAL_ASSERT(product.scalar_type() == compute);
  return product;
}

// Rows of inputs that lie evenly apart are read where they are, others unfolded into a buffer.
void gram_on_device(const char* op, const at::Tensor& inputs, const Patches& patches, int64_t groups,
                    int64_t group_stride, at::Tensor& gram) {
  const int64_t d = patches.columns(), rows = patches.rows();
  if (d == 0) return;
  const AsGiven as_given;
  const auto bytes = static_cast<int64_t>(inputs.element_size());
  const int64_t step = std::clamp<int64_t>(kProductBytes / (bytes * d), 1, kProductRows);
  const std::optional<int64_t> stride = patches.row_stride();
  at::Tensor buffer;
  if (!stride) buffer = at::empty({std::min(step, rows), d}, inputs.options());
  const DType compute = *dtype_of(accumulator_type(inputs.scalar_type())), total = *dtype_of(gram.scalar_type());
  for (int64_t g = 0; g < groups; ++g) {
    Patches group = patches;
    group.data = static_cast<const char*>(patches.data) + g * group_stride * bytes;
    char* out = static_cast<char*>(gram.mutable_data_ptr()) + g * d * d * static_cast<int64_t>(gram.element_size());
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = std::min(step, rows - first);
      at::Tensor x;
      if (stride) {
        x = inputs.as_strided({n, d}, {*stride, patches.channel_stride},
                              inputs.storage_offset() + g * group_stride + first * *stride);
      } else {
        x = buffer.narrow(0, 0, n);
        run_on_cuda(op, gram.device(), [&]<Backend B>(const Exec& exec) {
          return unfold_rows<B>(group, first, n, buffer.mutable_data_ptr(), exec);
        });
      }
      for (int64_t column = 0; column < d; column += kProductColumns) {
        const int64_t width = std::min(kProductColumns, d - column);
        const at::Tensor block = product_of(x.narrow(1, 0, column + width).t(), x.narrow(1, column, width));
        run_on_cuda(op, gram.device(), [&]<Backend B>(const Exec& exec) {
          return add_symmetric<B>(compute, block.const_data_ptr(), column, width, total, out, d, exec);
        });
      }
    }
  }
}
#endif

// gram: [d, d], or [groups, d, d].
void accumulate_gram(const char* op, const at::Tensor& gram, const at::Tensor& inputs, const Patches& patches,
                     int64_t groups, int64_t group_stride) {
  std::vector<Extent> extents;
  require_writable(op, "gram", 0, gram);
  add_extent(extents, "gram", 0, gram, true);
  add_extent(extents, "inputs", 0, inputs, false);
  require_no_aliases(op, extents);
  if (inputs.numel() == 0 || gram.numel() == 0) return;
  const at::Tensor target = gram.detach();
  at::Tensor dense = target.contiguous();
  const at::TensorOptions options = dense.options();
#if defined(UNLEARN_CUDA)
  if (gram.is_cuda()) {
    gram_on_device(op, inputs, patches, groups, group_stride, dense);
  } else
#endif
  {
    const int64_t d = patches.columns(), partials = gram_partials(patches, groups);
    at::Tensor partial;
    if (partials > 1) partial = at::empty({partials, groups, d, d}, options);
    run_on_cpu([&]<Backend B>(const Exec& exec) {
      return gram_accumulate<B>(patches, groups, group_stride, *dtype_of(dense.scalar_type()), dense.mutable_data_ptr(),
                                partials > 1 ? partial.mutable_data_ptr() : nullptr, exec);
    });
  }
  if (!dense.is_same(target) && dense.const_data_ptr() != target.const_data_ptr()) target.copy_(dense);
  bump_version(gram);
}

void require_gram(const char* op, const at::Tensor& gram, const at::Tensor& inputs) {
  require_supported(op, gram.device());
  require_supported(op, inputs.device());
  TORCH_CHECK_VALUE(gram.layout() == at::kStrided && inputs.layout() == at::kStrided, op,
                    ": gram and inputs must be dense (strided), got layouts ", gram.layout(), " and ", inputs.layout());
  TORCH_CHECK_TYPE(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, op,
                   ": gram must be float32 or float64, got ", gram.scalar_type());
  TORCH_CHECK_TYPE(dtype_of(inputs.scalar_type()).has_value(), op,
                   ": inputs must be float32, float64, float16 or bfloat16, got ", inputs.scalar_type());
  TORCH_CHECK_VALUE(gram.device() == inputs.device(), op, ": inputs must be on ", gram.device(), " like gram, got ",
                    inputs.device());
}

void gram_accumulate_(const at::Tensor& gram, const at::Tensor& inputs) {
  const char* op = "gram_accumulate_";
  require_gram(op, gram, inputs);
  TORCH_CHECK_VALUE(inputs.dim() >= 1, op, ": inputs must have at least 1 dimension, got a scalar");
  const int64_t d = inputs.size(-1);
  TORCH_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == d, op, ": gram must have shape [", d, ", ",
                    d, "] for inputs of width ", d, ", got ", gram.sizes());
  const at::Tensor rows = inputs.detach().resolve_neg().reshape({d == 0 ? 0 : -1, d});
  Patches patches{};
  patches.dtype = *dtype_of(rows.scalar_type());
  patches.samples = rows.size(0);
  patches.channels = d;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    patches.in[axis] = patches.out[axis] = patches.kernel[axis] = 1;
    patches.stride[axis] = patches.dilation[axis] = 1;
  }
  patches.sample_stride = rows.stride(0);
  patches.channel_stride = rows.stride(1);
  patches.data = rows.numel() == 0 ? nullptr : rows.const_data_ptr();
  accumulate_gram(op, gram, rows, patches, 1, 0);
}

void gram_conv_accumulate_(const at::Tensor& gram, const at::Tensor& inputs, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const char* op = "gram_conv_accumulate_";
  require_gram(op, gram, inputs);
  const at::Tensor held = inputs.detach().resolve_neg();
  const Patches patches = patches_of(op, held, kernel_size, stride, padding, dilation, groups);
  const int64_t d = patches.columns();
  const bool grouped = gram.dim() == 3;
  TORCH_CHECK_VALUE(
      (grouped ? gram.size(0) == groups : gram.dim() == 2 && groups == 1) && gram.size(-1) == d && gram.size(-2) == d,
      op, ": gram must have shape ", groups == 1 ? "" : "[groups, d, d] = [", groups == 1 ? "[" : "",
      groups == 1 ? "" : std::to_string(groups) + ", ", d, ", ", d, "], got ", gram.sizes());
  accumulate_gram(op, gram, held, patches, groups, patches.channels * patches.channel_stride);
}

// A layer's gradient as [groups, rows, d] beside its basis as [groups, d, k].
struct ProjectionArguments {
  at::Tensor grad, basis;
};

ProjectionArguments view_projection(const char* op, const at::Tensor& grad, const at::Tensor& basis, int64_t index,
                                    bool written) {
  require_usable(op, "grad", index, grad);
  require_usable(op, "basis", index, basis);
  require_supported(op, grad.device());
  require_supported(op, basis.device());
  TORCH_CHECK_TYPE(dtype_of(grad.scalar_type()).has_value(), op, ": grad[", index,
                   "] must be float32, float64, float16 or bfloat16, got ", grad.scalar_type());
  TORCH_CHECK_TYPE(basis.scalar_type() == grad.scalar_type() ||
                       (basis.scalar_type() == at::kFloat && grad.scalar_type() != at::kDouble),
                   op, ": basis[", index, "] must be ", grad.scalar_type(), " like its gradient",
                   grad.scalar_type() == at::kHalf || grad.scalar_type() == at::kBFloat16 ? " or float32" : "",
                   ", got ", basis.scalar_type());
  TORCH_CHECK_VALUE(basis.device() == grad.device(), op, ": basis[", index, "] must be on ", grad.device(),
                    " like its gradient, got ", basis.device());
  TORCH_CHECK_VALUE(grad.dim() >= 1, op, ": grad[", index, "] must have at least 1 dimension, got a scalar");
  TORCH_CHECK_VALUE(basis.dim() == 2 || basis.dim() == 3, op, ": basis[", index,
                    "] must have shape [d, k] or [groups, d, k], got ", basis.sizes());
  const int64_t groups = basis.dim() == 3 ? basis.size(0) : 1, outputs = grad.size(0);
  TORCH_CHECK_VALUE(groups >= 1 && outputs % groups == 0, op, ": basis[", index,
                    "] must have a number of groups that divides the ", outputs, " rows of its gradient, got ",
                    basis.sizes());
  int64_t d = 1;
  for (int64_t axis = 1; axis < grad.dim(); ++axis) d *= grad.size(axis);
  TORCH_CHECK_VALUE(basis.size(-2) == d, op, ": basis[", index, "] must have ", d, " rows for a gradient of shape ",
                    grad.sizes(), ", got ", basis.sizes());
  TORCH_CHECK_VALUE(basis.size(-1) <= d, op, ": basis[", index, "] must have at most ", d, " columns, got ",
                    basis.sizes());
  if (written) require_writable(op, "grad", index, grad);
  const at::Tensor plain = basis.detach().resolve_neg();
  return {grad.detach().resolve_neg().contiguous().view({groups, outputs / groups, d}),
          plain.dim() == 3 ? plain : plain.unsqueeze(0)};
}

// Scalars of a layer's gradient and basis up to which layers of one shape are copied side by side for one batched
// product; larger ones are multiplied where they are. By estimate what copying a MiB each way takes, about as long as
// a launch.
constexpr int64_t kGathered = int64_t{1} << 18;

// Layers of one shape, dtype and device, whose products the library does together.
struct ProjectedTogether {
  std::vector<at::Tensor> grads;
  at::Tensor gradient, basis, coefficients;  // in the compute type; `gradient` is the layer's own where it can be
};

// The coefficients of all layers, and copies where products need them: all the memory that projecting takes.
std::vector<ProjectedTogether> coefficients_of(const std::vector<ProjectionArguments>& layers) {
  const auto together = [](const ProjectionArguments& a, const ProjectionArguments& b) {
    return a.grad.sizes() == b.grad.sizes() && a.basis.sizes() == b.basis.sizes() &&
           a.grad.options().type_equal(b.grad.options()) && a.grad.device() == b.grad.device() &&
           a.basis.scalar_type() == b.basis.scalar_type();
  };
  std::vector<bool> done(layers.size(), false);
  std::vector<ProjectedTogether> all;
  for (size_t i = 0; i < layers.size(); ++i) {
    if (done[i] || layers[i].grad.numel() == 0) continue;
    const bool gathers = layers[i].grad.numel() + layers[i].basis.numel() <= kGathered;
    std::vector<at::Tensor> grads, bases;
    for (size_t j = i; j < layers.size() && (gathers || j == i); ++j) {
      if (done[j] || !together(layers[i], layers[j])) continue;
      done[j] = true;
      grads.push_back(layers[j].grad);
      bases.push_back(layers[j].basis);
    }
    const at::ScalarType compute = accumulator_type(grads[0].scalar_type());
    at::Tensor g = (grads.size() == 1 ? grads[0] : at::cat(grads)).to(compute);
    at::Tensor u = (bases.size() == 1 ? bases[0] : at::cat(bases)).to(compute);
    // The library would copy bases of other strides for every product.
    if (!u.is_contiguous() && !u.transpose(1, 2).is_contiguous()) u = u.contiguous();
    at::Tensor coefficients = at::bmm(g, u);
    all.push_back({std::move(grads), std::move(g), std::move(u), std::move(coefficients)});
  }
  return all;
}

// By products of the library, in place: none is written before all have the memory they need, so that a call that runs
// out of it leaves every gradient as it was.
void project_by_library(const std::vector<ProjectionArguments>& layers, bool onto) {
  const AsGiven as_given;
  for (ProjectedTogether& layer : coefficients_of(layers)) {
    const at::Tensor transposed = layer.basis.transpose(1, 2);
    if (onto)
      at::bmm_out(layer.gradient, layer.coefficients, transposed);
    else
      layer.gradient.baddbmm_(layer.coefficients, transposed, /*beta=*/1, /*alpha=*/-1);
    int64_t first = 0;
    for (at::Tensor& grad : layer.grads) {
      const int64_t groups = grad.size(0);
      if (!grad.is_same(layer.gradient)) grad.copy_(layer.gradient.narrow(0, first, groups));
      first += groups;
    }
  }
}

// Projects grads (dense, each [groups, rows, d]) where they lie.
void project_dense(const std::vector<ProjectionArguments>& layers, bool onto) {
#if defined(UNLEARN_CUDA)
  std::vector<ProjectionArguments> on_device;
  std::copy_if(layers.begin(), layers.end(), std::back_inserter(on_device),
               [](const ProjectionArguments& layer) { return layer.grad.is_cuda(); });
  project_by_library(on_device, onto);
#endif
  std::vector<Projection> cpu[4][2];  // by dtype of gradient, and whether the basis is float32 beside a half gradient
  for (const ProjectionArguments& layer : layers) {
    if (!layer.grad.is_cpu() || layer.grad.numel() == 0) continue;
    const bool float_basis = layer.basis.scalar_type() == at::kFloat;
    cpu[static_cast<int>(*dtype_of(layer.grad.scalar_type()))][float_basis].push_back(
        {layer.grad.mutable_data_ptr(),
         layer.basis.numel() == 0 ? nullptr : layer.basis.const_data_ptr(),
         layer.grad.size(0),
         layer.grad.size(1),
         layer.grad.size(2),
         layer.basis.size(2),
         {layer.basis.stride(0), layer.basis.stride(1), layer.basis.stride(2)}});
  }
  for (const DType dtype : {DType::f32, DType::f64, DType::f16, DType::bf16})
    for (const bool float_basis : {false, true}) {
      const std::vector<Projection>& group = cpu[static_cast<int>(dtype)][float_basis];
      if (group.empty()) continue;
      run_on_cpu([&]<Backend B>(const Exec& exec) {
        return project<B>(dtype, float_basis ? DType::f32 : dtype, group.data(), static_cast<int64_t>(group.size()),
                          onto, exec);
      });
    }
}

void project_in_place(const char* op, at::TensorList grads, at::TensorList bases, bool onto,
                      void (*project_layers)(const std::vector<ProjectionArguments>&, bool) = &project_dense) {
  TORCH_CHECK_VALUE(grads.size() == bases.size(), op, ": bases must have ", grads.size(), " tensors like grads, got ",
                    bases.size());
  std::vector<ProjectionArguments> layers;
  std::vector<Extent> extents;
  for (size_t l = 0; l < grads.size(); ++l) {
    const auto index = static_cast<int64_t>(l);
    layers.push_back(view_projection(op, grads[l], bases[l], index, /*written=*/true));
    add_extent(extents, "grad", index, grads[l], true);
    add_extent(extents, "basis", index, bases[l], false);
  }
  require_no_aliases(op, extents);
  project_layers(layers, onto);
  for (size_t l = 0; l < grads.size(); ++l) {
    if (layers[l].grad.numel() != 0 && layers[l].grad.const_data_ptr() != grads[l].const_data_ptr())
      grads[l].detach().copy_(layers[l].grad.view(grads[l].sizes()));
    bump_version(grads[l]);
  }
}

at::Tensor project_copy(const char* op, const at::Tensor& grad, const at::Tensor& basis, bool onto) {
  for (const at::Tensor* t : {&grad, &basis})
    TORCH_CHECK_NOT_IMPLEMENTED(!t->_fw_grad(/*level=*/0).defined(), op,
                                ": forward-mode differentiation is not implemented; use reverse mode");
  ProjectionArguments layer = view_projection(op, grad, basis, 0, /*written=*/false);
  layer.grad = layer.grad.clone();
  project_dense({layer}, onto);
  return layer.grad.view(grad.sizes());
}

at::Tensor project_out(const at::Tensor& grad, const at::Tensor& basis) {
  return project_copy("project_out", grad, basis, false);
}
void project_out_(const at::Tensor& grad, const at::Tensor& basis) {
  project_in_place("project_out_", grad, basis, false);
}
void project_out_list_(at::TensorList grads, at::TensorList bases) {
  project_in_place("project_out_", grads, bases, false);
}
at::Tensor project_onto(const at::Tensor& grad, const at::Tensor& basis) {
  return project_copy("project_onto", grad, basis, true);
}
void project_onto_(const at::Tensor& grad, const at::Tensor& basis) {
  project_in_place("project_onto_", grad, basis, true);
}
void project_onto_list_(at::TensorList grads, at::TensorList bases) {
  project_in_place("project_onto_", grads, bases, true);
}

using SubspaceOps = OpList<
    Op<"gram_accumulate_(Tensor(a!) gram, Tensor inputs) -> ()", &gram_accumulate_>,
    Op<"gram_conv_accumulate_(Tensor(a!) gram, Tensor inputs, *, int[] kernel_size, int[] stride, int[] padding, "
       "int[] dilation, int groups=1) -> ()",
       &gram_conv_accumulate_>,
    Op<"project_out(Tensor grad, Tensor basis) -> Tensor", &project_out>,
    Op<"project_out_(Tensor(a!) grad, Tensor basis) -> ()", &project_out_>,
    Op<"project_out_.list(Tensor(a!)[] grads, Tensor[] bases) -> ()", &project_out_list_>,
    Op<"project_onto(Tensor grad, Tensor basis) -> Tensor", &project_onto>,
    Op<"project_onto_(Tensor(a!) grad, Tensor basis) -> ()", &project_onto_>,
    Op<"project_onto_.list(Tensor(a!)[] grads, Tensor[] bases) -> ()", &project_onto_list_>>;

}  // namespace
}  // namespace unlearn_ext
