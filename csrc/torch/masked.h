// Ops on masks: exact top-k selection, masked gradients, masked optimizer steps.
#pragma once

#include "kernels/masked.h"
#include "kernels/select.h"
#include "torch/arguments.h"
#include "torch/doors.h"

namespace unlearn_ext {
namespace {

// On a GPU this would have to wait for the device; there NaN ranks last instead.
void require_ordered(const char* op, at::TensorList scores) {
  for (size_t t = 0; t < scores.size(); ++t)
    TORCH_CHECK_VALUE(!scores[t].is_cpu() || !scores[t].isnan().any().item<bool>(), op, ": scores[",
                      static_cast<int64_t>(t), "] must not be NaN, got a NaN in it");
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
    dense.push_back(score.detach().resolve_neg().contiguous());
    const at::TensorOptions options = score.options().dtype(at::kByte).requires_grad(false);
    masks.push_back(k == 0 ? at::zeros({packed_bytes(score.numel())}, options)
                           : at::empty({packed_bytes(score.numel())}, options));
    slices.push_back(
        {{const_cast<void*>(dense.back().const_data_ptr()), masks.back().mutable_data_ptr()}, score.numel()});
  }
  if (k == 0) {
    require_ordered(op, scores);
    return masks;
  }
  const auto count = static_cast<int64_t>(slices.size());
  at::Tensor scratch = scratch_of(select_scratch_bytes(total, count), scores[0].device());
  int64_t n_nan = 0;
  run(op, scores[0].device(), [&]<Backend B>(const Exec& exec) {
    return topk_mask<B>(*dtype_of(scores[0].scalar_type()), slices.data(), count, k, largest, &n_nan,
                        scratch.mutable_data_ptr(), exec);
  });
  if (n_nan > 0) require_ordered(op, scores);
  return masks;
}

void apply_mask_(at::TensorList grads, at::TensorList masks) {
  for_each_group("apply_mask_", {{"grads", grads, Holds::parameters, true}, {"masks", masks, Holds::bits}},
                 [&](auto& group) {
                   run("apply_mask_", group.device, [&]<Backend B>(const Exec& exec) {
                     return apply_mask<B>(group.dtype(), group.slices.data(), group.count(), exec);
                   });
                 });
}

void masked_sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers, at::TensorList masks,
                 double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  const char* op = "masked_sgd_";
  require_non_negative(op, "lr", lr);
  require_non_negative(op, "momentum", momentum);
  require_finite(op, "dampening", dampening);
  require_non_negative(op, "weight_decay", weight_decay);
  TORCH_CHECK_VALUE(!nesterov || (momentum > 0 && dampening == 0), op,
                    ": nesterov must come with a momentum and no dampening, got momentum ", momentum, " and dampening ",
                    dampening);
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
  const bool on_device = step_tensor != nullptr && step_tensor->is_cuda();
  at::Tensor scratch;
  if (on_device) {
    require_supported(op, step_tensor->device());
    for (const at::Tensor& param : params)
      TORCH_CHECK_VALUE(!param.defined() || param.device() == step_tensor->device(), op, ": step must be on ",
                        param.device(), " like its parameters or on the cpu, got ", step_tensor->device());
  }
  for_each_group(op,
                 {{"params", params, Holds::parameters, true},
                  {"exp_avgs", exp_avgs, Holds::accumulators, true},
                  {"exp_avg_sqs", exp_avg_sqs, Holds::accumulators, true},
                  {"grads", grads, Holds::like},
                  {"masks", masks, Holds::bits}},
                 [&](auto& group) {
                   // For all groups, before the first is stepped and after all have been checked: a call that fails
                   // leaves every tensor alone.
                   if (on_device && !scratch.defined())
                     scratch = scratch_of(sizeof(AdamwCorrections), step_tensor->device());
                   run(op, group.device, [&]<Backend B>(const Exec& exec) {
                     return masked_adamw<B>(
                         group.dtype(), group.slices.data(), group.count(), constants, step,
                         on_device ? step_tensor->const_data_ptr() : nullptr,
                         on_device ? *dtype_of(step_tensor->scalar_type()) : DType::f64,
                         on_device ? static_cast<AdamwCorrections*>(scratch.mutable_data_ptr()) : nullptr, exec);
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

using MaskOps =
    OpList<Op<"topk_mask(Tensor[] scores, int k, *, bool largest=True) -> Tensor[]", &topk_mask>,
           Op<"apply_mask_(Tensor(a!)[] grads, Tensor[] masks) -> ()", &apply_mask_>,
           Op<"masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, *, "
              "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
              "bool maximize=False) -> ()",
              &masked_sgd_>,
           // The tensor overload comes first: pybind11 would take an integer tensor for an int.
           Op<"masked_adamw_.tensor_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
              "Tensor(c!)[] exp_avg_sqs, Tensor[] masks, *, Tensor step, float lr, float beta1=0.9, float beta2=0.999, "
              "float eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()",
              &masked_adamw_at_tensor_step_>,
           Op<"masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
              "Tensor[] masks, *, int step, float lr, float beta1=0.9, float beta2=0.999, float eps=1e-08, "
              "float weight_decay=0.01, bool maximize=False) -> ()",
              &masked_adamw_>>;

}  // namespace
}  // namespace unlearn_ext
