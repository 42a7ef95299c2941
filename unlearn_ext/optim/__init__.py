"""Optimizers that change only what they may: masked SGD and AdamW, and projected SGD.

Each is a ``torch.optim.Optimizer``: parameter groups, learning-rate schedulers, ``GradScaler``, gradient
clipping, ``add_param_group`` and ``state_dict`` work as they do with ``torch.optim.SGD`` and
``torch.optim.AdamW``, and a checkpoint of those two can be loaded. What is added is one constraint per
parameter, found by the parameter's name: a mask of the scalars that may change, or a basis of the directions
that may not.

Two things differ from ``torch.optim`` on purpose. State is float32 (float64 for double parameters) also where
the parameter is float16 or bfloat16, and it stays so through ``load_state_dict``. Constraints are not part of
``state_dict``: like the parameters themselves, they are given again when a run is resumed.

``clip_grad_norm_`` clips by the norm of the free scalars alone: over all of them, masked training of a few
would be slowed down by the gradients of those that stay as they are.
"""

from unlearn_ext.optim.clipping import clip_grad_norm_
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD
from unlearn_ext.optim.projected import ProjectedSGD

__all__ = ["MaskedAdamW", "MaskedSGD", "ProjectedSGD", "clip_grad_norm_"]
