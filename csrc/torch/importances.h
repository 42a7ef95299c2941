// Ops on importances: accumulation, selective dampening, and the counts and quantiles its thresholds come from.
#pragma once

#include "kernels/dampen.h"
#include "kernels/fisher.h"
#include "kernels/select.h"
#include "torch/arguments.h"
#include "torch/doors.h"

namespace unlearn_ext {
namespace {

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

void selective_dampen_(at::TensorList params, at::TensorList importance_full, at::TensorList importance_forget,
                       double alpha, double lambda, double exponent, double beta_min, double beta_max) {
  const char* op = "selective_dampen_";
  require_non_negative(op, "alpha", alpha);
  require_non_negative(op, "lambda_", lambda);
  TORCH_CHECK_VALUE(is_float(exponent) && exponent > 0, op, ": exponent must be finite and positive, got ", exponent);
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
                     // One by one: indices would have to come from the host, which graph capture forbids.
                     for (int64_t i = 0; i < group.count(); ++i)
                       counts.select(1, group.positions[static_cast<size_t>(i)]).copy_(part.select(1, i));
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
  for_each_group(
      op,
      {{"importance_full", importance_full, Holds::importances},
       {"importance_forget", importance_forget, Holds::importances}},
      [&](auto& group) {
        TORCH_CHECK_VALUE(!result.defined(), op,
                          ": importance_full must be on one device and of one dtype, got a mixed list");
        const at::TensorOptions options(group.device);
        result = at::empty({}, options.dtype(group.type));
        at::Tensor n_finite = at::zeros({}, options.dtype(at::kLong));
        at::Tensor scratch = scratch_of(select_scratch_bytes(total_scalars(group), group.count()), group.device);
        run(op, group.device, [&]<Backend B>(const Exec& exec) {
          return ratio_quantile<B>(group.dtype(), group.slices.data(), group.count(), q, result.mutable_data_ptr(),
                                   n_finite.mutable_data_ptr<int64_t>(), scratch.mutable_data_ptr(), exec);
        });
        // The one host synchronisation of the package's ops: an error cannot wait.
        if (n_finite.template item<int64_t>() == 0) result = at::Tensor();
      });
  TORCH_CHECK_VALUE(result.defined(), op,
                    ": importance_full and importance_forget must have a finite ratio somewhere, got none");
  return result;
}

using ImportanceOps = OpList<
    Op<"fisher_accumulate_(Tensor(a!)[] fisher, Tensor[] grads, *, float weight=1.0, float decay=1.0, "
       "int power=2) -> ()",
       &fisher_accumulate_>,
    Op<"selective_dampen_(Tensor(a!)[] params, Tensor[] importance_full, Tensor[] importance_forget, *, "
       "float alpha, float lambda_, float exponent=1.0, float beta_min=0.0, float beta_max=1.0) -> ()",
       &selective_dampen_>,
    Op<"selected_counts(Tensor[] importance_full, Tensor[] importance_forget, float[] alphas) -> Tensor",
       &selected_counts>,
    Op<"ratio_quantile(Tensor[] importance_full, Tensor[] importance_forget, float q) -> Tensor", &ratio_quantile>>;

}  // namespace
}  // namespace unlearn_ext
