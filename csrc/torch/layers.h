// Ops on layers: Fisher diagonals, sample by sample, from inputs and output gradients.
#pragma once

#include <ATen/Context.h>
#include <ATen/TensorUtils.h>

#include "kernels/fisher_layers.h"
#include "torch/doors.h"
#include "torch/patches.h"

namespace unlearn_ext {
namespace {

// What every op of this family takes. The lists of other ops have indices in their messages; here there is one of each.
struct LayerArguments {
  const char* op;
  const at::Tensor& fisher;
  const char* read_name;
  const at::Tensor& read;  // inputs, normalized or indices; grads where an op has none
  const at::Tensor& grads;
  double weight;
  int64_t power;
};

void require_layer_arguments(const LayerArguments& args) {
  const char* op = args.op;
  const std::pair<const char*, const at::Tensor*> all[] = {
      {"fisher", &args.fisher}, {args.read_name, &args.read}, {"grad_outputs", &args.grads}};
  for (const auto& [name, t] : all) {
    TORCH_CHECK_VALUE(t->layout() == at::kStrided, op, ": ", name, " must be dense (strided), got layout ",
                      t->layout());
    require_supported(op, t->device());
  }
  const at::ScalarType type = args.grads.scalar_type(), wanted = accumulator_type(type);
  TORCH_CHECK_TYPE(dtype_of(type).has_value(), op, ": grad_outputs must be float32, float64, float16 or bfloat16, got ",
                   type);
  TORCH_CHECK_TYPE(args.fisher.scalar_type() == wanted, op, ": fisher must be ", wanted, " for ", type,
                   " gradients, got ", args.fisher.scalar_type());
  for (const auto& [name, t] : all)
    TORCH_CHECK_VALUE(t->device() == args.fisher.device(), op, ": ", name, " must be on ", args.fisher.device(),
                      " like fisher, got ", t->device());
  require_finite(op, "weight", args.weight);
  TORCH_CHECK_VALUE(args.power == 1 || args.power == 2, op, ": power must be 1 or 2, got ", args.power);
  TORCH_CHECK_VALUE(!args.fisher.is_neg(), op, ": fisher must hold its values, got a lazily negated view");
  TORCH_CHECK_VALUE(!overlaps_itself(args.fisher), op, ": fisher must not overlap itself, got strides ",
                    args.fisher.strides());
  if (args.fisher.numel() != 0) args.fisher.mutable_data_ptr();  // as require_writable
  std::vector<Extent> extents;
  for (const auto& [name, t] : all) add_extent(extents, name, 0, *t, t == &args.fisher);
  require_no_aliases(op, extents);
}

void require_like_gradients(const LayerArguments& args) {
  TORCH_CHECK_TYPE(args.read.scalar_type() == args.grads.scalar_type(), args.op, ": ", args.read_name, " must be ",
                   args.grads.scalar_type(), " like grad_outputs, got ", args.read.scalar_type());
}

// Runs launch(data of a dense F) and brings the result home.
template <class F>
void on_dense(const at::Tensor& fisher, const F& launch) {
  const at::Tensor target = fisher.detach();
  const at::Tensor dense = target.contiguous();
  launch(dense.mutable_data_ptr(), dense.options());
  if (dense.const_data_ptr() != target.const_data_ptr()) target.copy_(dense);
  bump_version(fisher);
}

// [N, *, C] -> [N, up to three axes, C], as views where strides allow, all tensors alike; none is empty.
template <class... Tensors>
void collapse(Tensors&... tensors) {
  const auto viewable = [](const at::Tensor& t) {
    const int64_t sizes[] = {t.size(0), c10::multiply_integers(t.sizes().slice(1, static_cast<size_t>(t.dim() - 2))),
                             t.size(-1)};
    return at::detail::computeStride(t.sizes(), t.strides(), at::DimVector(sizes, sizes + 3)).has_value();
  };
  const int64_t dims = std::get<0>(std::tie(tensors...)).dim();
  if (!(viewable(tensors) && ...) && dims <= 2 + kMaxSpatial) return;
  const auto flat = [](at::Tensor& t) { t = t.reshape({t.size(0), -1, t.size(-1)}); };
  (flat(tensors), ...);
}

// t: [N, at most three axes, C].
Positions positions_of(const at::Tensor& t) {
  Positions p{};
  p.dtype = *dtype_of(t.scalar_type());
  p.samples = t.size(0);
  p.channels = t.size(-1);
  p.sample_stride = t.stride(0);
  p.channel_stride = t.stride(-1);
  p.data = t.numel() == 0 ? nullptr : t.const_data_ptr();
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    const int64_t at = t.dim() - 1 - (kMaxSpatial - axis);
    p.extent[axis] = at < 1 ? 1 : t.size(at);
    p.space_stride[axis] = at < 1 ? 0 : t.stride(at);
  }
  return p;
}

// One switch for all layers: torch lets convolutions use tf32 unasked, and exactness comes first here.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

// Tensor cores are fed by 16-byte copies along the channels: a copy of one layer's images in that order costs less than
// gathering them scalar by scalar.
at::Tensor for_tensor_cores(const at::Tensor& images) {
  const at::ScalarType type = images.scalar_type();
  const bool used = type == at::kHalf || type == at::kBFloat16 || (type == at::kFloat && allows_tf32());
  if (!images.is_cuda() || !used || images.dim() < 4 || images.size(1) % 8 != 0) return images;
  return images.contiguous(images.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d);
}

void run_product(const LayerArguments& args, LayerProduct& layer) {
  layer.weight = args.weight;
  layer.power = static_cast<int>(args.power);
  layer.tf32 = allows_tf32();
  if (args.read.numel() == 0 || args.grads.numel() == 0 || args.fisher.numel() == 0) return;
  on_dense(args.fisher, [&](void* fisher, const at::TensorOptions& options) {
    run(args.op, args.fisher.device(), [&]<Backend B>(const Exec& exec) {
      const int64_t partials = fisher_weight_partials<B>(layer);
      at::Tensor partial;
      if (partials > 0) partial = at::empty({partials, args.fisher.numel()}, options);
      return fisher_weight<B>(layer, fisher, partials > 0 ? partial.mutable_data_ptr() : nullptr, exec);
    });
  });
}

void fisher_linear_(const at::Tensor& fisher, const at::Tensor& inputs, const at::Tensor& grad_outputs, double weight,
                    int64_t power) {
  const LayerArguments args{"fisher_linear_", fisher, "inputs", inputs, grad_outputs, weight, power};
  require_layer_arguments(args);
  require_like_gradients(args);
  TORCH_CHECK_VALUE(inputs.dim() >= 2, args.op, ": inputs must have shape [N, ..., I], got ", inputs.sizes());
  TORCH_CHECK_VALUE(
      grad_outputs.dim() == inputs.dim() && grad_outputs.sizes().slice(0, static_cast<size_t>(inputs.dim() - 1)) ==
                                                inputs.sizes().slice(0, static_cast<size_t>(inputs.dim() - 1)),
      args.op, ": grad_outputs must have the leading shape of inputs ", inputs.sizes(), ", got ", grad_outputs.sizes());
  TORCH_CHECK_VALUE(fisher.dim() == 2 && fisher.size(0) == grad_outputs.size(-1) && fisher.size(1) == inputs.size(-1),
                    args.op, ": fisher must have shape [O, I] = [", grad_outputs.size(-1), ", ", inputs.size(-1),
                    "], got ", fisher.sizes());
  if (inputs.numel() == 0 || grad_outputs.numel() == 0) return;
  at::Tensor seen = inputs.detach().resolve_neg(), given = grad_outputs.detach().resolve_neg();
  collapse(seen, given);
  const Positions rows = positions_of(seen);
  LayerProduct layer{};
  layer.grads = positions_of(given);
  layer.groups = 1;
  Patches& patches = layer.inputs;
  patches.dtype = rows.dtype, patches.samples = rows.samples, patches.channels = rows.channels;
  patches.sample_stride = rows.sample_stride, patches.channel_stride = rows.channel_stride, patches.data = rows.data;
  for (int axis = 0; axis < kMaxSpatial; ++axis) {
    patches.in[axis] = patches.out[axis] = rows.extent[axis];
    patches.kernel[axis] = patches.stride[axis] = patches.dilation[axis] = 1;
    patches.space_stride[axis] = rows.space_stride[axis];
  }
  run_product(args, layer);
}

void fisher_conv_(const at::Tensor& fisher, const at::Tensor& inputs, const at::Tensor& grad_outputs,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups,
                  double weight, int64_t power) {
  const LayerArguments args{"fisher_conv_", fisher, "inputs", inputs, grad_outputs, weight, power};
  require_layer_arguments(args);
  require_like_gradients(args);
  TORCH_CHECK_VALUE(
      fisher.dim() >= 3 && fisher.dim() <= 2 + kMaxSpatial && c10::multiply_integers(fisher.sizes().slice(2)) > 0,
      args.op, ": fisher must have shape [O, C / groups, kernel] with 1 to 3 positive kernel sizes, got ",
      fisher.sizes());
  const at::Tensor seen = for_tensor_cores(inputs.detach().resolve_neg()),
                   given = for_tensor_cores(grad_outputs.detach().resolve_neg());
  LayerProduct layer{};
  layer.inputs = patches_of(args.op, seen, fisher.sizes().slice(2), stride, padding, dilation, groups);
  layer.groups = groups;
  layer.group_stride = layer.inputs.channels * layer.inputs.channel_stride;
  TORCH_CHECK_VALUE(fisher.size(1) == layer.inputs.channels, args.op,
                    ": fisher must have shape [O, C / groups = ", layer.inputs.channels, ", kernel], got ",
                    fisher.sizes());
  TORCH_CHECK_VALUE(fisher.size(0) % groups == 0, args.op, ": groups must divide the ", fisher.size(0),
                    " outputs, got ", groups);
  std::vector<int64_t> wanted{inputs.size(0), fisher.size(0)};
  for (int axis = kMaxSpatial - static_cast<int>(fisher.dim() - 2); axis < kMaxSpatial; ++axis)
    wanted.push_back(layer.inputs.out[axis]);
  TORCH_CHECK_VALUE(grad_outputs.sizes() == at::IntArrayRef(wanted), args.op, ": grad_outputs must have shape ",
                    at::IntArrayRef(wanted), " as the convolution's output, got ", grad_outputs.sizes());
  layer.grads = positions_of(given.movedim(1, -1));
  run_product(args, layer);
}

// The axis of the channels, counted from the front.
int64_t channel_axis(const LayerArguments& args, int64_t channel_dim) {
  const int64_t dims = args.grads.dim(), axis = channel_dim < 0 ? channel_dim + dims : channel_dim;
  TORCH_CHECK_VALUE(dims >= 2, args.op, ": grad_outputs must have a sample and a channel dimension, got shape ",
                    args.grads.sizes());
  TORCH_CHECK_VALUE(axis >= 1 && axis < dims, args.op, ": channel_dim must lie in [1, ", dims,
                    ") or be negative alike (0 is the samples), got ", channel_dim);
  return axis;
}

void run_channels(const LayerArguments& args, int64_t channel_dim, bool scaled) {
  require_layer_arguments(args);
  const int64_t axis = channel_axis(args, channel_dim);
  TORCH_CHECK_VALUE(args.fisher.dim() == 1 && args.fisher.size(0) == args.grads.size(axis), args.op,
                    ": fisher must have shape [", args.grads.size(axis), "], one per channel of grad_outputs, got ",
                    args.fisher.sizes());
  if (args.grads.numel() == 0) return;
  at::Tensor given = args.grads.detach().resolve_neg().movedim(axis, -1);
  at::Tensor seen = scaled ? args.read.detach().resolve_neg().movedim(axis, -1) : given;
  collapse(given, seen);
  const Positions grads = positions_of(given), normalized = positions_of(seen);
  on_dense(args.fisher, [&](void* fisher, const at::TensorOptions& options) {
    run(args.op, args.fisher.device(), [&]<Backend B>(const Exec& exec) {
      const Positions* scales = scaled ? &normalized : nullptr;
      const int64_t partials = fisher_channels_partials<B>(grads, scales);
      at::Tensor partial;
      if (partials > 1) partial = at::empty({partials, args.fisher.numel()}, options);
      return fisher_channels<B>(grads, scales, args.weight, static_cast<int>(args.power), fisher,
                                partials > 1 ? partial.mutable_data_ptr() : nullptr, exec);
    });
  });
}

void fisher_bias_(const at::Tensor& fisher, const at::Tensor& grad_outputs, int64_t channel_dim, double weight,
                  int64_t power) {
  run_channels({"fisher_bias_", fisher, "grad_outputs", grad_outputs, grad_outputs, weight, power}, channel_dim, false);
}

void fisher_affine_(const at::Tensor& fisher, const at::Tensor& normalized, const at::Tensor& grad_outputs,
                    int64_t channel_dim, double weight, int64_t power) {
  const LayerArguments args{"fisher_affine_", fisher, "normalized", normalized, grad_outputs, weight, power};
  require_like_gradients(args);
  TORCH_CHECK_VALUE(normalized.sizes() == grad_outputs.sizes(), args.op, ": normalized must have the shape ",
                    grad_outputs.sizes(), " of grad_outputs, got ", normalized.sizes());
  run_channels(args, channel_dim, true);
}

void fisher_embedding_(const at::Tensor& fisher, const at::Tensor& indices, const at::Tensor& grad_outputs,
                       int64_t padding_idx, double weight, int64_t power) {
  const LayerArguments args{"fisher_embedding_", fisher, "indices", indices, grad_outputs, weight, power};
  require_layer_arguments(args);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong || indices.scalar_type() == at::kInt, args.op,
                   ": indices must be int64 or int32, got ", indices.scalar_type());
  TORCH_CHECK_VALUE(indices.dim() >= 1 && grad_outputs.dim() == indices.dim() + 1 &&
                        grad_outputs.sizes().slice(0, static_cast<size_t>(indices.dim())) == indices.sizes(),
                    args.op, ": grad_outputs must have shape [N, ..., D] for indices [N, ...] of shape ",
                    indices.sizes(), ", got ", grad_outputs.sizes());
  TORCH_CHECK_VALUE(fisher.dim() == 2 && fisher.size(1) == grad_outputs.size(-1), args.op,
                    ": fisher must have shape [V, D = ", grad_outputs.size(-1), "], got ", fisher.sizes());
  TORCH_CHECK_VALUE(padding_idx >= -1 && padding_idx < fisher.size(0), args.op, ": padding_idx must lie in [-1, ",
                    fisher.size(0), "), got ", padding_idx);
  if (indices.numel() == 0) return;
  const auto [sorted, order] = indices.detach().reshape({-1}).to(at::kLong).sort(std::optional<bool>(true), /*dim=*/0);
  if (indices.is_cpu()) {  // elsewhere it would have to wait for the device
    const auto* values = sorted.const_data_ptr<int64_t>();
    const int64_t least = values[0], most = values[sorted.numel() - 1];
    TORCH_CHECK_VALUE(least >= 0 && most < fisher.size(0), args.op, ": indices must lie in [0, ", fisher.size(0),
                      "), got ", least < 0 ? least : most);
  }
  if (grad_outputs.numel() == 0) return;
  at::Tensor given = grad_outputs.detach().resolve_neg();
  if (given.dim() == 2) given = given.unsqueeze(1);
  collapse(given);
  const Positions grads = positions_of(given);
  on_dense(fisher, [&](void* data, const at::TensorOptions&) {
    run(args.op, fisher.device(), [&]<Backend B>(const Exec& exec) {
      return fisher_embedding<B>(grads, sorted.const_data_ptr<int64_t>(), order.const_data_ptr<int64_t>(),
                                 fisher.size(0), padding_idx, weight, static_cast<int>(power), data, exec);
    });
  });
}

using LayerOps =
    OpList<Op<"fisher_linear_(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, *, float weight=1.0, "
              "int power=2) -> ()",
              &fisher_linear_>,
           Op<"fisher_conv_(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, *, int[] stride, int[] padding, "
              "int[] dilation, int groups=1, float weight=1.0, int power=2) -> ()",
              &fisher_conv_>,
           Op<"fisher_bias_(Tensor(a!) fisher, Tensor grad_outputs, *, int channel_dim=-1, float weight=1.0, "
              "int power=2) -> ()",
              &fisher_bias_>,
           Op<"fisher_affine_(Tensor(a!) fisher, Tensor normalized, Tensor grad_outputs, *, int channel_dim=-1, "
              "float weight=1.0, int power=2) -> ()",
              &fisher_affine_>,
           Op<"fisher_embedding_(Tensor(a!) fisher, Tensor indices, Tensor grad_outputs, *, int padding_idx=-1, "
              "float weight=1.0, int power=2) -> ()",
              &fisher_embedding_>>;

}  // namespace
}  // namespace unlearn_ext
