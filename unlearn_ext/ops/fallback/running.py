"""How kernels in plain PyTorch run: with nothing of the caller's modes, and in parts of bounded size."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Most memory that the per-sample gradients or patches of one part of a batch may take.
_PART_BYTES = 64 << 20


class _Precise:
    """Products in the precision of their inputs while some kernel runs, in whatever thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.before: list[tuple[Any, str]] = []

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
                self.before = [
                    (backend, backend.fp32_precision)
                    for backend in backends
                    if backend.fp32_precision not in ("ieee", "none")
                ]
                for backend, _ in self.before:
                    backend.fp32_precision = "ieee"
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for backend, precision in self.before:
                    backend.fp32_precision = precision


_PRECISE = _Precise()


@contextlib.contextmanager
def as_given(written: Iterable[Tensor] = ()) -> Iterator[None]:
    """Let neither autograd, nor autocast, nor reduced precision take part.

    Args:
        written: Tensors to write, of inference mode among them.

    Yields:
        None.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(_PRECISE)
        if not torch.is_inference_mode_enabled() and any(tensor.is_inference() for tensor in written):
            stack.enter_context(torch.inference_mode())
        yield


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Say whether a device knows float64.

    Args:
        device: The device.

    Returns:
        Whether it does.
    """
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def needs_cpu(tensors: Sequence[Tensor]) -> bool:
    """Say whether a decision that takes float64 cannot be taken where the tensors are.

    Args:
        tensors: Tensors of one device, or none.

    Returns:
        Whether they have to be copied to the CPU for it.
    """
    return bool(tensors) and not has_float64(tensors[0].device)


def copies(*lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Copy to the CPU.

    Args:
        *lists: Lists of tensors.

    Returns:
        The lists of their copies.
    """
    return [[tensor.cpu() for tensor in tensors] for tensors in lists]


def parts(scalars_per_sample: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split along the samples, so that temporaries of a part have a bounded size.

    Args:
        scalars_per_sample: Of the temporaries.
        *tensors: Of all samples, along the first axis.

    Yields:
        The tensors of some samples; of none once, if there are none.
    """
    bytes_each = max(1, scalars_per_sample) * max(4, tensors[0].element_size())
    step = max(1, _PART_BYTES // bytes_each)
    yield from zip(*(tensor.split(step) for tensor in tensors), strict=True)
