"""All or nothing: a model is changed in one run, which keeps a record and can put everything back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import Buffers, restored
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.batches import device_of


class Run:
    """One unlearning run in progress: the model as it was, and the record so far. Made by ``unlearning``."""

    def __init__(self, model: nn.Module, method: str, hyperparameters: Mapping[str, object]) -> None:
        self.model = model
        self.method = method
        self.hyperparameters = dict(hyperparameters)
        self.history: list[dict[str, object]] = []
        self.seconds: dict[str, float] = {}
        self._before = {name: p.detach().clone() for name, p in model.named_parameters()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; phases of one name add up.

        Args:
            name: The phase, as it appears in ``seconds``.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if device_of(self.model).type == "cuda":
                torch.cuda.synchronize(device_of(self.model))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def record(self, phase: str, **facts: object) -> None:
        """Add an entry to the history.

        Args:
            phase: The phase it belongs to.
            **facts: What happened: plain numbers and strings.
        """
        self.history.append({"phase": phase, **facts})

    def original(self, name: str) -> Tensor:
        """Return a parameter's value from before the run.

        Args:
            name: Its name in ``model.named_parameters()``.

        Returns:
            The value; not to be written.
        """
        return self._before[name]

    def result(self) -> UnlearnResult:
        """Compare the model with what it was.

        Returns:
            The record; a scalar counts as changed if its value differs.
        """
        counts = {
            name: (int((p.detach() != self._before[name]).sum()), p.numel())
            for name, p in self.model.named_parameters()
        }
        total = sum(size for _, size in counts.values())
        return UnlearnResult(
            method=self.method,
            hyperparameters=self.hyperparameters,
            seconds=dict(self.seconds),
            changed=sum(changed for changed, _ in counts.values()) / max(1, total),
            changed_per_parameter={name: changed / max(1, size) for name, (changed, size) in counts.items()},
            history=tuple(self.history),
        )


@contextmanager
def unlearning(
    model: nn.Module,
    method: str,
    hyperparameters: Mapping[str, object],
    *,
    generator: torch.Generator | None = None,
) -> Iterator[Run]:
    """Change a model all or nothing.

    If the body raises, or is interrupted, every parameter and buffer gets back its value. In any case
    training flags, ``requires_grad``, ``.grad`` and the global random states are as before afterwards;
    parameters keep their storage throughout.

    Args:
        model: The user's model.
        method: Name for the record.
        hyperparameters: What the method was called with, for the record.
        generator: Decides every random choice inside, those of data loaders and dropout too. Without one the
            global random state does, and is put back.

    Yields:
        The run; call ``result()`` on it inside the body, or after it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with unlearning(model, "zero", {}) as run, torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> run.result().changed_per_parameter
        {'weight': 1.0, 'bias': 0.0}
    """
    run = Run(model, method, hyperparameters)
    parameters = list(model.named_parameters())
    buffers = Buffers(model)
    try:
        with restored(model):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            yield run
    except BaseException:
        with torch.no_grad():
            for name, p in parameters:
                p.copy_(run.original(name))
        buffers.put_back()
        raise
