// Host functions of every op, checks first; the list of ops; both doors. The only file that sees torch.
#include <ATen/ExpandUtils.h>

#include <cmath>
#include <limits>

#include "kernels/dampen.h"
#include "kernels/fisher.h"
#include "kernels/gram.h"
#include "kernels/masked.h"
#include "kernels/pack.h"
#include "kernels/project.h"
#include "kernels/select.h"
#include "torch/doors.h"
#include "torch/marshal.h"
#include "torch/run.h"

namespace unlearn_ext {
namespace {

// ---- scalar arguments

void require_finite(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), op, ": ", name, " must be finite, got ", value);
}

void require_non_negative(const char* op, const char* name, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value >= 0, op, ": ", name, " must be finite and non-negative, got ",
                    value);
}

// ---- masks

at::Tensor pack_mask(const at::Tensor& mask) {
  require_supported("pack_mask", mask.device());
  TORCH_CHECK_TYPE(mask.scalar_type() == at::kBool, "pack_mask: mask must be bool, got ", mask.scalar_type());
  TORCH_CHECK_VALUE(mask.layout() == at::kStrided, "pack_mask: mask must be dense (strided), got layout ",
                    mask.layout());
  const at::Tensor flags = mask.contiguous();
  at::Tensor packed = at::empty({packed_bytes(mask.numel())}, mask.options().dtype(at::kByte));
  run("pack_mask", mask.device(), [&]<Backend B>(const Exec& exec) {
    return pack_mask<B>(static_cast<const uint8_t*>(flags.const_data_ptr()), packed.mutable_data_ptr<uint8_t>(),
                        flags.numel(), exec);
  });
  return packed;
}

at::Tensor unpack_mask(const at::Tensor& packed, at::IntArrayRef shape) {
  require_supported("unpack_mask", packed.device());
  TORCH_CHECK_TYPE(packed.scalar_type() == at::kByte, "unpack_mask: packed must be uint8, got ", packed.scalar_type());
  TORCH_CHECK_VALUE(packed.layout() == at::kStrided, "unpack_mask: packed must be dense (strided), got layout ",
                    packed.layout());
  int64_t numel = 1;
  for (const int64_t extent : shape) {
    TORCH_CHECK_VALUE(extent >= 0, "unpack_mask: shape must be non-negative, got ", shape);
    TORCH_CHECK_VALUE(!__builtin_mul_overflow(numel, extent, &numel), "unpack_mask: shape must be addressable, got ",
                      shape);
  }
  TORCH_CHECK_VALUE(packed.dim() == 1 && packed.numel() == packed_bytes(numel), "unpack_mask: packed must have shape [",
                    packed_bytes(numel), "] for ", numel, " scalars, got ", packed.sizes());
  const at::Tensor bits = packed.contiguous();
  at::Tensor mask = at::empty(shape, packed.options().dtype(at::kBool));
  run("unpack_mask", packed.device(), [&]<Backend B>(const Exec& exec) {
    return unpack_mask<B>(bits.const_data_ptr<uint8_t>(), static_cast<uint8_t*>(mask.mutable_data_ptr()), numel, exec);
  });
  return mask;
}

// Row-major mask bits in the memory order of `order`.
at::Tensor repack(const at::Tensor& bits, const at::Tensor& order) {
  at::Tensor flags = at::empty_strided(order.sizes(), order.strides(), bits.options().dtype(at::kBool));
  flags.copy_(unpack_mask(bits, order.sizes()));
  return pack_mask(flags.as_strided({flags.numel()}, {1}));
}

// Every tensor's device is looked at before the lists are paired, so that a call on an unsupported one says so.
template <size_t N, class F>
void for_each_group(const char* op, const List (&lists)[N], const F& f) {
  std::array<List, N> all;
  std::copy_n(lists, N, all.begin());
  for (const List& list : all)
    for (const at::Tensor& t : list.tensors)
      if (t.defined()) require_supported(op, t.device());
  Paired<static_cast<int>(N)> paired(op, all, &repack);
  for (auto& group : paired.groups()) f(group);
  paired.finish();
}

void apply_mask_(at::TensorList grads, at::TensorList masks) {
  for_each_group("apply_mask_", {{"grads", grads, Holds::parameters, true}, {"masks", masks, Holds::bits}},
                 [&](auto& group) {
                   run("apply_mask_", group.device, [&]<Backend B>(const Exec& exec) {
                     return apply_mask<B>(group.dtype(), group.slices.data(), group.count(), exec);
                   });
                 });
}

// ---- Fisher diagonal

void fisher_accumulate_(at::TensorList fisher, at::TensorList grads, double weight, double decay, int64_t power) {
  require_finite("fisher_accumulate_", "weight", weight);
  require_non_negative("fisher_accumulate_", "decay", decay);
  TORCH_CHECK_VALUE(power == 1 || power == 2, "fisher_accumulate_: power must be 1 or 2, got ", power);
  for_each_group("fisher_accumulate_",
                 {{"fisher", fisher, Holds::accumulators, true}, {"grads", grads, Holds::parameters}},
                 [&](auto& group) {
                   run("fisher_accumulate_", group.device, [&]<Backend B>(const Exec& exec) {
                     return fisher_accumulate<B>(group.dtype(), group.slices.data(), group.count(), weight, decay,
                                                 static_cast<int>(power), exec);
                   });
                 });
}

// ---- selective dampening

void selective_dampen_(at::TensorList params, at::TensorList importance_full, at::TensorList importance_forget,
                       double alpha, double lambda, double exponent, double beta_min, double beta_max) {
  const char* op = "selective_dampen_";
  require_non_negative(op, "alpha", alpha);
  require_non_negative(op, "lambda_", lambda);
  TORCH_CHECK_VALUE(std::isfinite(exponent) && exponent > 0, op, ": exponent must be finite and positive, got ",
                    exponent);
  require_non_negative(op, "beta_min", beta_min);
  TORCH_CHECK_VALUE(beta_max >= beta_min, op, ": beta_max must be at least beta_min = ", beta_min, ", got ", beta_max);
  for_each_group(op,
                 {{"params", params, Holds::parameters, true},
                  {"importance_full", importance_full, Holds::accumulators},
                  {"importance_forget", importance_forget, Holds::accumulators}},
                 [&](auto& group) {
                   run(op, group.device, [&]<Backend B>(const Exec& exec) {
                     return selective_dampen<B>(group.dtype(), group.slices.data(), group.count(),
                                                {alpha, lambda, exponent, beta_min, beta_max}, exec);
                   });
                 });
}

at::Tensor selected_counts(at::TensorList importance_full, at::TensorList importance_forget,
                           at::ArrayRef<double> alphas) {
  const char* op = "selected_counts";
  for (const double alpha : alphas) require_non_negative(op, "alphas", alpha);
  const auto n_alphas = static_cast<int64_t>(alphas.size()), n_tensors = static_cast<int64_t>(importance_full.size());
  const c10::Device device = n_tensors == 0 ? c10::Device(at::kCPU) : importance_full[0].device();
  at::Tensor counts;
  for_each_group(op,
                 {{"importance_full", importance_full, Holds::importances},
                  {"importance_forget", importance_forget, Holds::importances}},
                 [&](auto& group) {
                   TORCH_CHECK_VALUE(group.device == device, op, ": importance_full must be on one device, got ",
                                     device, " and ", group.device);
                   at::Tensor part = at::zeros({n_alphas, group.count()}, at::TensorOptions(device).dtype(at::kLong));
                   run(op, device, [&]<Backend B>(const Exec& exec) {
                     return selected_counts<B>(group.dtype(), group.slices.data(), group.count(), alphas.data(),
                                               n_alphas, part.mutable_data_ptr<int64_t>(), exec);
                   });
                   if (group.count() == n_tensors) {
                     counts = part;
                   } else {  // lists of both dtypes
                     if (!counts.defined()) counts = at::zeros({n_alphas, n_tensors}, part.options());
                     counts.index_copy_(1, at::tensor(group.positions, at::kLong).to(device), part);
                   }
                 });
  return counts.defined() ? counts : at::zeros({n_alphas, 0}, at::TensorOptions(device).dtype(at::kLong));
}

at::Tensor scratch_of(int64_t bytes, c10::Device device) {
  return at::empty({(bytes + 7) / 8}, at::TensorOptions(device).dtype(at::kLong));
}

template <int N>
int64_t total_scalars(const Group<N>& group) {
  int64_t total = 0;
  for (const Slice<N>& slice : group.slices) total += slice.numel;
  return total;
}

at::Tensor ratio_quantile(at::TensorList importance_full, at::TensorList importance_forget, double q) {
  const char* op = "ratio_quantile";
  TORCH_CHECK_VALUE(q >= 0 && q <= 1, op, ": q must be in [0, 1], got ", q);
  at::Tensor result;
  for_each_group(op,
                 {{"importance_full", importance_full, Holds::importances},
                  {"importance_forget", importance_forget, Holds::importances}},
                 [&](auto& group) {
                   TORCH_CHECK_VALUE(!result.defined(), op,
                                     ": importance_full must be on one device and of one dtype, got a mixed list");
                   const at::TensorOptions options(group.device);
                   result = at::empty({}, options.dtype(group.type));
                   at::Tensor n_finite = at::zeros({}, options.dtype(at::kLong));
                   at::Tensor scratch =
                       scratch_of(select_scratch_bytes(total_scalars(group), group.count()), group.device);
                   run(op, group.device, [&]<Backend B>(const Exec& exec) {
                     return ratio_quantile<B>(group.dtype(), group.slices.data(), group.count(), q,
                                              result.mutable_data_ptr(), n_finite.mutable_data_ptr<int64_t>(),
                                              scratch.mutable_data_ptr(), exec);
                   });
                   // The one host synchronisation of the package's ops: an error cannot wait.
                   if (n_finite.template item<int64_t>() == 0) result = at::Tensor();
                 });
  TORCH_CHECK_VALUE(result.defined(), op,
                    ": importance_full and importance_forget must have a finite ratio somewhere, got none");
  return result;
}

std::vector<at::Tensor> topk_mask(at::TensorList scores, int64_t k, bool largest) {
  const char* op = "topk_mask";
  int64_t total = 0;
  for (size_t t = 0; t < scores.size(); ++t) {
    const auto index = static_cast<int64_t>(t);
    require_usable(op, "scores", index, scores[t]);
    require_supported(op, scores[t].device());
    TORCH_CHECK_TYPE(dtype_of(scores[t].scalar_type()).has_value(), op, ": scores[", index,
                     "] must be float32, float64, float16 or bfloat16, got ", scores[t].scalar_type());
    TORCH_CHECK_TYPE(scores[t].scalar_type() == scores[0].scalar_type(), op, ": scores[", index, "] must be ",
                     scores[0].scalar_type(), " like scores[0], got ", scores[t].scalar_type());
    TORCH_CHECK_VALUE(scores[t].device() == scores[0].device(), op, ": scores[", index, "] must be on ",
                      scores[0].device(), " like scores[0], got ", scores[t].device());
    total += scores[t].numel();
  }
  TORCH_CHECK_VALUE(k >= 0 && k <= total, op, ": k must be between 0 and the ", total, " scores, got ", k);
  std::vector<at::Tensor> dense, masks;  // dense: row-major, in which order ties are broken
  std::vector<Slice<2>> slices;
  for (const at::Tensor& score : scores) {
    dense.push_back(score.contiguous());
    const at::TensorOptions options = score.options().dtype(at::kByte).requires_grad(false);
    masks.push_back(k == 0 ? at::zeros({packed_bytes(score.numel())}, options)
                           : at::empty({packed_bytes(score.numel())}, options));
    slices.push_back({{const_cast<void*>(dense.back().const_data_ptr()), masks.back().mutable_data_ptr()},
                      score.numel()});
  }
  if (k == 0) return masks;
  const auto count = static_cast<int64_t>(slices.size());
  at::Tensor scratch = scratch_of(select_scratch_bytes(total, count), scores[0].device());
  int64_t n_nan = 0;
  run(op, scores[0].device(), [&]<Backend B>(const Exec& exec) {
    return topk_mask<B>(*dtype_of(scores[0].scalar_type()), slices.data(), count, k, largest, &n_nan,
                        scratch.mutable_data_ptr(), exec);
  });
  for (size_t t = 0; n_nan > 0 && t < scores.size(); ++t)
    TORCH_CHECK_VALUE(!scores[t].isnan().any().item<bool>(), op, ": scores[", static_cast<int64_t>(t),
                      "] must not be NaN, got ", n_nan, " NaN in all scores");
  return masks;
}

// ---- masked optimizer steps

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList masks,
                 double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  const char* op = "masked_sgd_";
  require_non_negative(op, "lr", lr);
  require_non_negative(op, "momentum", momentum);
  require_finite(op, "dampening", dampening);
  require_non_negative(op, "weight_decay", weight_decay);
  TORCH_CHECK_VALUE(!nesterov || (momentum > 0 && dampening == 0), op,
                    ": nesterov must come with a momentum and no dampening, got momentum ", momentum,
                    " and dampening ", dampening);
  const SgdConstants constants{lr, momentum, dampening, weight_decay, nesterov, maximize};
  const auto step = [&](auto& group) {
    run(op, group.device, [&]<Backend B>(const Exec& exec) {
      return masked_sgd<B>(group.dtype(), group.slices.data(), group.count(), constants, exec);
    });
  };
  if (momentum == 0)
    return for_each_group(
        op, {{"params", params, Holds::parameters, true}, {"grads", grads, Holds::like}, {"masks", masks, Holds::bits}},
        step);
  for_each_group(op,
                 {{"params", params, Holds::parameters, true},
                  {"momentum_buffers", momentum_buffers, Holds::accumulators, true},
                  {"grads", grads, Holds::like},
                  {"masks", masks, Holds::bits}},
                 step);
}

void adamw(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
           at::TensorList masks, double step, const at::Tensor* step_tensor, const AdamwConstants& constants) {
  const char* op = "masked_adamw_";
  require_non_negative(op, "lr", constants.lr);
  TORCH_CHECK_VALUE(constants.beta1 >= 0 && constants.beta1 < 1, op, ": beta1 must be in [0, 1), got ",
                    constants.beta1);
  TORCH_CHECK_VALUE(constants.beta2 >= 0 && constants.beta2 < 1, op, ": beta2 must be in [0, 1), got ",
                    constants.beta2);
  require_non_negative(op, "eps", constants.eps);
  require_non_negative(op, "weight_decay", constants.weight_decay);
  for_each_group(
      op,
      {{"params", params, Holds::parameters, true},
       {"exp_avgs", exp_avgs, Holds::accumulators, true},
       {"exp_avg_sqs", exp_avg_sqs, Holds::accumulators, true},
       {"grads", grads, Holds::like},
       {"masks", masks, Holds::bits}},
      [&](auto& group) {
        const bool on_device = step_tensor != nullptr && step_tensor->is_cuda();
        at::Tensor scratch;
        if (on_device) {
          TORCH_CHECK_VALUE(group.device == step_tensor->device(), op, ": step must be on ", group.device,
                            " like its parameters or on the cpu, got ", step_tensor->device());
          scratch = scratch_of(sizeof(AdamwCorrections), group.device);
        }
        run(op, group.device, [&]<Backend B>(const Exec& exec) {
          return masked_adamw<B>(group.dtype(), group.slices.data(), group.count(), constants, step,
                                 on_device ? step_tensor->const_data_ptr() : nullptr,
                                 on_device ? *dtype_of(step_tensor->scalar_type()) : DType::f64,
                                 on_device ? static_cast<AdamwCorrections*>(scratch.mutable_data_ptr()) : nullptr,
                                 exec);
        });
      });
}

void masked_adamw_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::TensorList masks, int64_t step, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize) {
  TORCH_CHECK_VALUE(step >= 1, "masked_adamw_: step must be at least 1, got ", step);
  adamw(params, grads, exp_avgs, exp_avg_sqs, masks, static_cast<double>(step), nullptr,
        {lr, beta1, beta2, eps, weight_decay, maximize});
}

void masked_adamw_at_tensor_step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                                  at::TensorList exp_avg_sqs, at::TensorList masks, const at::Tensor& step, double lr,
                                  double beta1, double beta2, double eps, double weight_decay, bool maximize) {
  TORCH_CHECK_VALUE(step.dim() == 0, "masked_adamw_: step must be 0-dimensional, got shape ", step.sizes());
  TORCH_CHECK_TYPE(step.scalar_type() == at::kFloat || step.scalar_type() == at::kDouble,
                   "masked_adamw_: step must be float32 or float64, got ", step.scalar_type());
  double value = 1;  // of a step on a device the kernel reads its own
  if (step.is_cpu()) {
    value = step.item<double>();
    TORCH_CHECK_VALUE(value >= 1, "masked_adamw_: step must be at least 1, got ", value);
  }
  adamw(params, grads, exp_avgs, exp_avg_sqs, masks, value, &step, {lr, beta1, beta2, eps, weight_decay, maximize});
}

// ---- Gram matrices

// Rows multiplied by one product of the library on a GPU: few enough for float32 totals within it, and a bounded copy.
constexpr int64_t kProductRows = 4096, kProductBytes = int64_t{64} << 20, kProductColumns = 1024;

#if defined(UNLEARN_CUDA)
void gram_on_device(const char* op, const Patches& patches, int64_t groups, int64_t group_stride, at::Tensor& gram,
                    const at::TensorOptions& compute) {
  const int64_t d = patches.columns(), rows = patches.rows();
  if (d == 0) return;
  const int64_t bytes = static_cast<int64_t>(compute.dtype().itemsize());
  const int64_t step = std::clamp<int64_t>(kProductBytes / (bytes * d), 1, kProductRows);
  at::Tensor buffer = at::empty({std::min(step, rows), d}, compute);
  const DType compute_type = *dtype_of(compute.dtype().toScalarType()), gram_type = *dtype_of(gram.scalar_type());
  for (int64_t g = 0; g < groups; ++g) {
    Patches group = patches;
    group.data = static_cast<const char*>(patches.data) +
                 g * group_stride * static_cast<int64_t>(patches.dtype == DType::f64   ? 8
                                                         : patches.dtype == DType::f32 ? 4
                                                                                       : 2);
    char* out = static_cast<char*>(gram.mutable_data_ptr()) + g * d * d * static_cast<int64_t>(gram.element_size());
    for (int64_t first = 0; first < rows; first += step) {
      const int64_t n = std::min(step, rows - first);
      run_on_cuda(op, gram.device(), [&]<Backend B>(const Exec& exec) {
        return unfold_rows<B>(group, first, n, buffer.mutable_data_ptr(), exec);
      });
      const at::Tensor x = buffer.narrow(0, 0, n);
      for (int64_t column = 0; column < d; column += kProductColumns) {
        const int64_t width = std::min(kProductColumns, d - column);
        const at::Tensor block = at::mm(x.narrow(1, 0, column + width).t(), x.narrow(1, column, width));
        run_on_cuda(op, gram.device(), [&]<Backend B>(const Exec& exec) {
          return add_symmetric<B>(compute_type, block.const_data_ptr(), column, width, gram_type, out, d, exec);
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
  const at::Tensor target = gram.detach();
  at::Tensor dense = target.contiguous();
  const at::TensorOptions options = dense.options();
#if defined(UNLEARN_CUDA)
  if (gram.is_cuda()) {
    gram_on_device(op, patches, groups, group_stride, dense,
                   options.dtype(accumulator_type(inputs.scalar_type())));
  } else
#endif
  {
    const int64_t d = patches.columns(), partials = gram_partials(patches.rows(), d, groups);
    at::Tensor partial;
    if (partials > 1) partial = at::empty({partials, groups, d, d}, options);
    run_on_cpu([&]<Backend B>(const Exec& exec) {
      return gram_accumulate<B>(patches, groups, group_stride, *dtype_of(dense.scalar_type()),
                                dense.mutable_data_ptr(), partials > 1 ? partial.mutable_data_ptr() : nullptr, exec);
    });
  }
  if (!dense.is_same(target) && dense.const_data_ptr() != target.const_data_ptr()) target.copy_(dense);
  bump_version(gram);
}

void require_gram(const char* op, const at::Tensor& gram, const at::Tensor& inputs) {
  require_supported(op, gram.device());
  require_supported(op, inputs.device());
  TORCH_CHECK_VALUE(gram.layout() == at::kStrided && inputs.layout() == at::kStrided, op,
                    ": gram and inputs must be dense (strided), got layouts ", gram.layout(), " and ",
                    inputs.layout());
  TORCH_CHECK_TYPE(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, op,
                   ": gram must be float32 or float64, got ", gram.scalar_type());
  TORCH_CHECK_TYPE(dtype_of(inputs.scalar_type()).has_value(), op,
                   ": inputs must be float32, float64, float16 or bfloat16, got ", inputs.scalar_type());
  TORCH_CHECK_VALUE(gram.device() == inputs.device(), op, ": inputs must be on ", gram.device(),
                    " like gram, got ", inputs.device());
}

void gram_accumulate_(const at::Tensor& gram, const at::Tensor& inputs) {
  const char* op = "gram_accumulate_";
  require_gram(op, gram, inputs);
  TORCH_CHECK_VALUE(inputs.dim() >= 1, op, ": inputs must have at least 1 dimension, got a scalar");
  const int64_t d = inputs.size(-1);
  TORCH_CHECK_VALUE(gram.dim() == 2 && gram.size(0) == d && gram.size(1) == d, op, ": gram must have shape [", d, ", ",
                    d, "] for inputs of width ", d, ", got ", gram.sizes());
  const at::Tensor rows = inputs.detach().reshape({d == 0 ? 0 : -1, d});
  if (rows.numel() == 0) return;
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
  patches.data = rows.const_data_ptr();
  accumulate_gram(op, gram, rows, patches, 1, 0);
}

void gram_conv_accumulate_(const at::Tensor& gram, const at::Tensor& inputs, at::IntArrayRef kernel_size,
                           at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const char* op = "gram_conv_accumulate_";
  require_gram(op, gram, inputs);
  const auto spatial = static_cast<int64_t>(kernel_size.size());
  TORCH_CHECK_VALUE(spatial >= 1 && spatial <= kMaxSpatial, op, ": kernel_size must have 1 to 3 entries, got ",
                    kernel_size);
  TORCH_CHECK_VALUE(inputs.dim() == spatial + 2, op, ": inputs must have shape [N, C, ", spatial,
                    " spatial], got ", inputs.sizes());
  const auto axes = static_cast<size_t>(spatial);
  TORCH_CHECK_VALUE(stride.size() == axes, op, ": stride must have ", spatial, " entries, got ", stride);
  TORCH_CHECK_VALUE(dilation.size() == axes, op, ": dilation must have ", spatial, " entries, got ", dilation);
  TORCH_CHECK_VALUE(padding.size() == axes || padding.size() == 2 * axes, op, ": padding must have ", spatial,
                    " entries, or two per dimension, got ", padding);
  TORCH_CHECK_VALUE(groups >= 1 && inputs.size(1) % groups == 0, op,
                    ": groups must be at least 1 and divide the ", inputs.size(1), " channels, got ", groups);
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
  const int64_t d = patches.columns();
  const bool grouped = gram.dim() == 3;
  TORCH_CHECK_VALUE((grouped ? gram.size(0) == groups : gram.dim() == 2 && groups == 1) && gram.size(-1) == d &&
                        gram.size(-2) == d,
                    op, ": gram must have shape ", groups == 1 ? "" : "[groups, d, d] = [", groups == 1 ? "[" : "",
                    groups == 1 ? "" : std::to_string(groups) + ", ", d, ", ", d, "], got ", gram.sizes());
  if (inputs.numel() == 0 || gram.numel() == 0) return;
  accumulate_gram(op, gram, inputs.detach(), patches, groups, patches.channels * patches.channel_stride);
}

// ---- projections

// A layer's gradient as [groups, rows, d] beside its basis as [groups, d, k].
struct ProjectionArguments {
  at::Tensor grad, basis;
};

ProjectionArguments view_projection(const char* op, const at::Tensor& grad, const at::Tensor& basis, int64_t index) {
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
  TORCH_CHECK_VALUE(groups >= 1 && outputs % groups == 0, op, ": basis[", index, "] must have a number of groups that divides the ",
                    outputs, " rows of its gradient, got ", basis.sizes());
  int64_t d = 1;
  for (int64_t axis = 1; axis < grad.dim(); ++axis) d *= grad.size(axis);
  TORCH_CHECK_VALUE(basis.size(-2) == d, op, ": basis[", index, "] must have ", d, " rows for a gradient of shape ",
                    grad.sizes(), ", got ", basis.sizes());
  TORCH_CHECK_VALUE(basis.size(-1) <= d, op, ": basis[", index, "] must have at most ", d, " columns, got ",
                    basis.sizes());
  const at::Tensor plain = basis.detach();
  return {grad.detach().contiguous().view({groups, outputs / groups, d}),
          plain.dim() == 3 ? plain : plain.unsqueeze(0)};
}

// Projects grads (dense, each [groups, rows, d]) where they lie.
void project_dense(const std::vector<ProjectionArguments>& layers, bool onto) {
#if defined(UNLEARN_CUDA)
  // Layers of one shape and dtype go through one batched product.
  const auto together = [](const ProjectionArguments& a, const ProjectionArguments& b) {
    return a.grad.sizes() == b.grad.sizes() && a.basis.sizes() == b.basis.sizes() &&
           a.grad.options().type_equal(b.grad.options()) && a.grad.device() == b.grad.device() &&
           a.basis.scalar_type() == b.basis.scalar_type();
  };
  std::vector<bool> done(layers.size(), false);
  for (size_t i = 0; i < layers.size(); ++i) {
    if (done[i] || !layers[i].grad.is_cuda() || layers[i].grad.numel() == 0) continue;
    std::vector<at::Tensor> grads, bases;
    for (size_t j = i; j < layers.size(); ++j) {
      if (done[j] || !together(layers[i], layers[j])) continue;
      done[j] = true;
      grads.push_back(layers[j].grad);
      bases.push_back(layers[j].basis);
    }
    const at::ScalarType compute = accumulator_type(grads[0].scalar_type());
    const at::Tensor g = grads.size() == 1 ? grads[0].to(compute) : at::cat(grads).to(compute);
    const at::Tensor u = bases.size() == 1 ? bases[0].to(compute) : at::cat(bases).to(compute);
    const at::Tensor coefficients = at::bmm(g, u);
    const at::Tensor result = onto ? at::bmm(coefficients, u.transpose(1, 2))
                                   : at::baddbmm(g, coefficients, u.transpose(1, 2), /*beta=*/1, /*alpha=*/-1);
    int64_t first = 0;
    for (const at::Tensor& grad : grads) {
      grad.copy_(result.narrow(0, first, grad.size(0)));
      first += grad.size(0);
    }
  }
#endif
  std::vector<Projection> cpu[4][2];  // by dtype of gradient, and whether the basis is float32 beside a half gradient
  for (const ProjectionArguments& layer : layers) {
    if (!layer.grad.is_cpu() || layer.grad.numel() == 0) continue;
    const bool float_basis = layer.basis.scalar_type() == at::kFloat;
    cpu[static_cast<int>(*dtype_of(layer.grad.scalar_type()))][float_basis].push_back(
        {layer.grad.mutable_data_ptr(), layer.basis.numel() == 0 ? nullptr : layer.basis.const_data_ptr(),
         layer.grad.size(0), layer.grad.size(1), layer.grad.size(2), layer.basis.size(2),
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

void project_in_place(const char* op, at::TensorList grads, at::TensorList bases, bool onto) {
  TORCH_CHECK_VALUE(grads.size() == bases.size(), op, ": bases must have ", grads.size(),
                    " tensors like grads, got ", bases.size());
  std::vector<ProjectionArguments> layers;
  std::vector<Extent> extents;
  for (size_t l = 0; l < grads.size(); ++l) {
    const auto index = static_cast<int64_t>(l);
    layers.push_back(view_projection(op, grads[l], bases[l], index));
    require_writable(op, "grad", index, grads[l]);
    add_extent(extents, "grad", index, grads[l], true);
    add_extent(extents, "basis", index, bases[l], false);
  }
  require_no_aliases(op, extents);
  project_dense(layers, onto);
  for (size_t l = 0; l < grads.size(); ++l) {
    if (layers[l].grad.numel() != 0 && layers[l].grad.const_data_ptr() != grads[l].const_data_ptr())
      grads[l].detach().copy_(layers[l].grad.view(grads[l].sizes()));
    bump_version(grads[l]);
  }
}

at::Tensor project_copy(const char* op, const at::Tensor& grad, const at::Tensor& basis, bool onto) {
  const at::Tensor copy = grad.detach().clone(at::MemoryFormat::Contiguous);
  project_dense({view_projection(op, copy, basis, 0)}, onto);
  return copy;
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

// Every op of the package.
using Ops = OpList<
    Op<"fisher_accumulate_(Tensor(a!)[] fisher, Tensor[] grads, *, float weight=1.0, float decay=1.0, "
       "int power=2) -> ()",
       &fisher_accumulate_>,
    Op<"selective_dampen_(Tensor(a!)[] params, Tensor[] importance_full, Tensor[] importance_forget, *, "
       "float alpha, float lambda_, float exponent=1.0, float beta_min=0.0, float beta_max=1.0) -> ()",
       &selective_dampen_>,
    Op<"selected_counts(Tensor[] importance_full, Tensor[] importance_forget, float[] alphas) -> Tensor",
       &selected_counts>,
    Op<"ratio_quantile(Tensor[] importance_full, Tensor[] importance_forget, float q) -> Tensor", &ratio_quantile>,
    Op<"pack_mask(Tensor mask) -> Tensor", &pack_mask>,
    Op<"unpack_mask(Tensor packed, SymInt[] shape) -> Tensor", &unpack_mask>,
    Op<"topk_mask(Tensor[] scores, int k, *, bool largest=True) -> Tensor[]", &topk_mask>,
    Op<"apply_mask_(Tensor(a!)[] grads, Tensor[] masks) -> ()", &apply_mask_>,
    Op<"masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, *, "
       "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
       "bool maximize=False) -> ()",
       &masked_sgd_>,
    Op<"masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
       "Tensor[] masks, *, int step, float lr, float beta1=0.9, float beta2=0.999, float eps=1e-08, "
       "float weight_decay=0.01, bool maximize=False) -> ()",
       &masked_adamw_>,
    Op<"masked_adamw_.tensor_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
       "Tensor(c!)[] exp_avg_sqs, Tensor[] masks, *, Tensor step, float lr, float beta1=0.9, float beta2=0.999, "
       "float eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()",
       &masked_adamw_at_tensor_step_>,
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

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = UNLEARN_VERSION;
  info["torch"] = UNLEARN_TORCH_VERSION;
  info["python"] = UNLEARN_PYTHON_VERSION;
  info["compiler"] = UNLEARN_COMPILER;
#if defined(UNLEARN_CUDA)
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  info["cuda_reason"] = UNLEARN_CUDA_REASON;
  info["cuda_architectures"] = std::string(UNLEARN_CUDA_ARCHITECTURES);
  info["cpu_capability"] = name_of(cpu_backend());
  std::vector<std::string> capabilities;
  for (const Backend backend : compiled_cpu_backends()) capabilities.emplace_back(name_of(backend));
  info["cpu_capabilities"] = capabilities;
  info["schemas"] = Ops::schemas();
  return info;
}

}  // namespace

TORCH_LIBRARY(unlearn_ext, m) {
  m.set_python_module("unlearn_ext.ops");
  Ops::define(m);
}
TORCH_LIBRARY_IMPL(unlearn_ext, CPU, m) { Ops::implement(m); }
TORCH_LIBRARY_IMPL(unlearn_ext, CUDA, m) { Ops::implement(m); }
TORCH_LIBRARY_IMPL(unlearn_ext, Autograd, m) { Ops::without_autograd(m, {"project_out", "project_onto"}); }

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info, "How this module was built, and which CPU kernels it chose.");
  Ops::define_direct(m);
}

}  // namespace unlearn_ext
