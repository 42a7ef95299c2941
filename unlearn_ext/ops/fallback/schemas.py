"""The schemas of the ops, for where the compiled library that defines them is missing.

A copy of the strings in csrc/torch: tests/test_fallback.py holds it against the sources and against the
compiled library.
"""

SCHEMAS = (
    "fisher_accumulate_(Tensor(a!)[] fisher, Tensor[] grads, *, float weight=1.0, float decay=1.0, int "
    "power=2) -> ()",
    "selective_dampen_(Tensor(a!)[] params, Tensor[] importance_full, Tensor[] importance_forget, *, "
    "float alpha, float lambda_, float exponent=1.0, float beta_min=0.0, float beta_max=1.0) -> ()",
    "selected_counts(Tensor[] importance_full, Tensor[] importance_forget, float[] alphas) -> Tensor",
    "ratio_quantile(Tensor[] importance_full, Tensor[] importance_forget, float q) -> Tensor",
    "fisher_linear_(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, *, float weight=1.0, int "
    "power=2) -> ()",
    "fisher_conv_(Tensor(a!) fisher, Tensor inputs, Tensor grad_outputs, *, int[] stride, int[] "
    "padding, int[] dilation, int groups=1, float weight=1.0, int power=2) -> ()",
    "fisher_bias_(Tensor(a!) fisher, Tensor grad_outputs, *, int channel_dim=-1, float weight=1.0, int "
    "power=2) -> ()",
    "fisher_affine_(Tensor(a!) fisher, Tensor normalized, Tensor grad_outputs, *, int channel_dim=-1, "
    "float weight=1.0, int power=2) -> ()",
    "fisher_embedding_(Tensor(a!) fisher, Tensor indices, Tensor grad_outputs, *, int padding_idx=-1, "
    "float weight=1.0, int power=2) -> ()",
    "pack_mask(Tensor mask) -> Tensor",
    "pack_mask.list(Tensor[] masks) -> Tensor[]",
    "unpack_mask(Tensor packed, SymInt[] shape) -> Tensor",
    "unpack_mask.list(Tensor[] packed, int[][] shapes) -> Tensor[]",
    "topk_mask(Tensor[] scores, int k, *, bool largest=True) -> Tensor[]",
    "apply_mask_(Tensor(a!)[] grads, Tensor[] masks) -> ()",
    "masked_sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[] masks, *, "
    "float lr, float momentum=0.0, float dampening=0.0, float weight_decay=0.0, bool nesterov=False, "
    "bool maximize=False) -> ()",
    "masked_adamw_.tensor_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor[] masks, *, Tensor step, float lr, float beta1=0.9, float beta2=0.999, float "
    "eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()",
    "masked_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
    "exp_avg_sqs, Tensor[] masks, *, int step, float lr, float beta1=0.9, float beta2=0.999, float "
    "eps=1e-08, float weight_decay=0.01, bool maximize=False) -> ()",
    "gram_accumulate_(Tensor(a!) gram, Tensor inputs) -> ()",
    "gram_conv_accumulate_(Tensor(a!) gram, Tensor inputs, *, int[] kernel_size, int[] stride, int[] "
    "padding, int[] dilation, int groups=1) -> ()",
    "project_out(Tensor grad, Tensor basis) -> Tensor",
    "project_out_(Tensor(a!) grad, Tensor basis) -> ()",
    "project_out_.list(Tensor(a!)[] grads, Tensor[] bases) -> ()",
    "project_onto(Tensor grad, Tensor basis) -> Tensor",
    "project_onto_(Tensor(a!) grad, Tensor basis) -> ()",
    "project_onto_.list(Tensor(a!)[] grads, Tensor[] bases) -> ()",
)
