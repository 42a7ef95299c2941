"""What the check has found out about a model, and for how long that holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.passes import LayoutCandidate, Signature
from unlearn_ext.tasks.batches import Batch, is_per_sample
from unlearn_ext.tasks.losses import LossFn

# Verdicts kept per model: for a few losses, or forms of batches, in turns.
_KEPT = 8


@dataclass
class Trust:
    """How each parameter's importances are computed.

    Attributes:
        trusted: Parameter name to the candidate that has agreed with plain autograd.
        signatures: Parameter name to the nodes that took it when it did.
        unproven: Parameter name to a candidate that nothing speaks against, for want of a gradient.
        reasons: Parameter name to why it falls back.
        sizes: Sizes of batches whose samples have shown the same loss in the batch as on their own.
        was_pair: Two different samples were looked at, not one twice.
        checks_left: How often a parameter that turns up elsewhere is worth another check.
        scale: The largest power of a gradient seen in a check.
        mixed: Sizes of batches whose samples influence each other; 0 for all of them.
        channels_last: Passes run in channels-last order; None as long as nobody has tried.
    """

    trusted: dict[str, LayoutCandidate] = field(default_factory=dict)
    signatures: dict[str, set[Signature]] = field(default_factory=dict)
    unproven: dict[str, LayoutCandidate] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=lambda: {1})
    was_pair: bool = False
    checks_left: int = 4
    scale: float = 0.0
    mixed: set[int] = field(default_factory=set)
    channels_last: bool | None = None

    def trust(self, name: str, candidate: LayoutCandidate, signatures: frozenset[Signature]) -> None:
        """Note that plain autograd agrees.

        Args:
            name: The parameter.
            candidate: Its layout.
            signatures: The nodes that take it.
        """
        if self.trusted.get(name) != candidate:
            self.signatures[name] = set()
        self.trusted[name] = candidate
        self.signatures[name] |= signatures
        self.unproven.pop(name, None)

    @property
    def candidates(self) -> dict[str, LayoutCandidate]:
        """Parameter name to candidate, for the parameters that do not fall back."""
        return {name: how for name, how in (self.unproven | self.trusted).items() if name not in self.reasons}

    def knows(self, name: str, signatures: frozenset[Signature]) -> bool:
        """Say whether the same kinds of nodes took a parameter when it was verified.

        Args:
            name: The parameter.
            signatures: The nodes that take it now.

        Returns:
            True if nothing about it is new.
        """
        known = self.signatures.get(name, set())
        return name in self.trusted and all(
            # What is right where samples have many positions is right where they have one.
            place in known or (*place[:3], True, *place[4:]) in known
            for place in signatures
        )


_caches: WeakKeyDictionary[nn.Module, list[tuple[object, Callable[[], object], Trust]]]
_caches = WeakKeyDictionary()


class TrustCache:
    """The trust on a model and a loss.

    Args:
        model: The model.
        loss_fn: Its loss.
        chosen: Parameter name to parameter.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, chosen: Mapping[str, Tensor]) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._fingerprint = _fingerprint(model, chosen)

    def lookup(self, batch: Batch, n: int) -> Trust:
        """Find what is known about batches of a form.

        Args:
            batch: A batch.
            n: Its number of samples.

        Returns:
            The trust, to be completed in place; a new one if nothing is known.
        """
        key = (self._fingerprint, tuple(_form(batch, n)))
        known = _caches.setdefault(self._model, [])
        known[:] = [entry for entry in known if entry[1]() is not None]
        for found, loss, trust in known:
            if found == key and loss() == self._loss_fn:
                return trust
        trust = Trust()
        known[:] = [*known[-_KEPT + 1 :], (key, _weakly(self._loss_fn), trust)]
        return trust


def _weakly(loss_fn: LossFn) -> Callable[[], object]:
    # The trust must not keep a closure alive that may hold the model, nor take another one for it.
    if hasattr(loss_fn, "__func__"):
        return weakref.WeakMethod(loss_fn)
    try:
        return weakref.ref(loss_fn)
    except TypeError:
        return lambda: None


def _fingerprint(model: nn.Module, chosen: Mapping[str, Tensor]) -> object:
    modules = tuple(
        (
            type(module),
            tuple((key, value) for key, value in vars(module).items() if _is_setting(key, value)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for module in model.modules()
    )
    parameters = tuple(
        (name, id(p), p.shape, p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()
    )
    kinds = {"cpu", *(p.device.type for p in chosen.values())}
    autocast = tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)
    )
    return modules, parameters, tuple(chosen), autocast


def _is_setting(key: str, value: object) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(entry, (bool, int, float, str)) for entry in value)
    return key != "training" and (value is None or isinstance(value, (bool, int, float, str)))


def _form(batch: Any, n: int) -> Iterator[object]:  # noqa: ANN401 - any nesting of anything
    if isinstance(batch, Tensor):
        yield batch.ndim, batch.dtype, is_per_sample(batch, n)
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield key
            yield from _form(value, n)
    elif isinstance(batch, (tuple, list)):
        yield type(batch), len(batch)
        for value in batch:
            yield from _form(value, n)
