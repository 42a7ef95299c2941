"""All that a call may not leave changed, as plain values that can be compared bit by bit."""

import os
import random
import signal
import threading
import warnings

import numpy as np
import torch
import torch.utils.checkpoint
from torch import nn

from unlearn_ext._internal.dtensors import local_of

_HOOKS = [name for name in vars(nn.Module()) if name.endswith("hooks") or "_hooks_" in name]
# What a pass may watch or replace while it runs.
_PATCHED = {
    "torch": torch,
    "torch.nn.functional": nn.functional,
    "torch.Tensor": torch.Tensor,
    "nn.Module": nn.Module,
    "torch.autograd.graph": torch.autograd.graph,
    "torch.utils.checkpoint": torch.utils.checkpoint,
    "Optimizer": torch.optim.Optimizer,
    "torch.autograd": torch.autograd,
}


def _bits(tensor):
    if tensor is None:
        return None
    plain = tensor.detach().contiguous()
    flat = plain.flatten().view(torch.uint8) if plain.numel() else plain.flatten()
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), flat.numpy().tobytes()


def of_model(model):
    """Values, identities, flags, gradients and hooks of a model, by name."""
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}.training"] = module.training
        found[f"{name}.attributes"] = tuple(vars(module))
        found[f"{name}.class"] = type(module)
        for hooks in _HOOKS:
            found[f"{name}.{hooks}"] = tuple(getattr(module, hooks))
        for key, parameter in module._parameters.items():
            found |= {f"{name}.{key}.{what}": value for what, value in _of_tensor(parameter).items()}
        for key, buffer in module._buffers.items():
            found |= {f"{name}.{key}.{what}": value for what, value in _of_tensor(buffer).items()}
    return found


def _of_tensor(tensor):
    if tensor is None:
        return {"value": None}
    own = local_of(tensor.detach())
    return {
        "identity": id(tensor),
        "storage": own.data_ptr(),
        "value": _bits(own),
        "requires_grad": tensor.requires_grad,
        "grad": id(tensor.grad) if tensor.grad is not None else None,
        "grad value": _bits(None if tensor.grad is None else local_of(tensor.grad)),
        "hooks": len(tensor._backward_hooks or ()),
        "grad hooks": len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ()),
    }


def of_process():
    """Random states, modes, patched functions, threads, files and signals."""
    python, numpy = random.getstate(), np.random.get_state()
    found = {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": python,
        "NumPy's random state": (numpy[0], numpy[1].tobytes(), *numpy[2:]),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "saved tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True) is None,
        "checkpoint early stop": torch.utils.checkpoint._enable_checkpoint_early_stop,
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "mkldnn": torch.backends.mkldnn.enabled,
        "warnings": tuple(map(id, warnings.filters)),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "folder": os.getcwd(),
        "environment": tuple(sorted(os.environ.items())),
        "global hooks": tuple(
            len(value)
            for name, value in sorted(vars(nn.modules.module).items())
            if name.startswith("_global_") and hasattr(value, "__len__")
        ),
    }
    for place, owner in _PATCHED.items():
        for name, value in vars(owner).items():
            if callable(value):
                found[f"{place}.{name}"] = id(value)
    return found


def differences(before, after):
    """Names of what differs; what has come or gone differs too."""
    return [name for name in {**before, **after} if before.get(name, "none") != after.get(name, "none")]
