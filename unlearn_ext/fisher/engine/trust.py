"""What was proven about a model, and for how long that holds."""

from __future__ import annotations

import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.graph import Node, kind_of
from unlearn_ext.fisher.engine.layout import Axis, Layout
from unlearn_ext.fisher.engine.passes import Read, Signature
from unlearn_ext.fisher.engine.proof import Place, Proven
from unlearn_ext.fisher.engine.rules import Reach
from unlearn_ext.fisher.engine.selections import Key, Selection
from unlearn_ext.fisher.engine.verification import Tolerance
from unlearn_ext.tasks.batches import Batch, is_per_sample
from unlearn_ext.tasks.losses import LossFn

# Verdicts kept per model: for a few losses, or forms of batches, in turns.
_KEPT = 8
# Nodes that say themselves, from their data, which of their rows belong together.
_RAGGED = {"EmbeddingBag", "GroupedMm"}


@dataclass
class Trust:
    """What is known about a model, a loss and a form of batches.

    Attributes:
        reaches: Parameter name to how far it is followed.
        places: Parameter name to what was proven of the places where it is read.
        evident: Parameters whose implied gradients have agreed with plain ones that did not vanish.
        reasons: Parameter name to why it always falls back.
        refutations: Parameter name to how often a batch has refuted its layout, or gave none.
        edges: Kinds of edges of the graphs that were verified.
        kept_axes: Kind of node that may move entries to the axis of the samples along which it moves nothing,
            to None if there is none.
        sizes: Sizes of batches of which a sample was compared with itself on its own.
        is_mixed: Samples have another loss in a batch than on their own.
        tolerance: What counts as rounding.
        may_couple: In some batches they might; None if nobody has looked.
        channels_last: Passes run in channels-last order; None as long as nobody has tried.
        seconds: Time that passes have taken since a sample was compared with itself on its own.
        price: Time that this comparison takes.
        certificates: How many there were.
        tried_fewer: Layouts were proven on a few samples too.
    """

    reaches: dict[str, Reach] = field(default_factory=dict)
    places: dict[str, dict[Signature, Place]] = field(default_factory=dict)
    evident: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    refutations: Counter[str] = field(default_factory=Counter)
    edges: set[tuple[str, int, str]] = field(default_factory=set)
    kept_axes: dict[Key, int | None] = field(default_factory=dict)
    sizes: set[int] = field(default_factory=set)
    is_mixed: bool = False
    tolerance: Tolerance = field(default_factory=Tolerance)
    may_couple: bool | None = None
    channels_last: bool | None = None
    seconds: float = 0.0
    price: float = 0.0
    certificates: int = 0
    tried_fewer: bool = False

    def unsettled(self, names: Iterable[str]) -> list[str]:
        """Return the parameters with a place that more than one regular layout explains.

        Args:
            names: Parameters.

        Returns:
            Those of them.
        """
        return [
            name
            for name in names
            if name not in self.reasons
            if any(
                not place.is_settled and place.axis is not Axis.MEASURED
                for place in self.places.get(name, {}).values()
            )
        ]

    def learn(self, name: str, proven: Proven) -> None:
        """Note what a proof has shown of a parameter; what was proven before is not given up for less.

        Args:
            name: The parameter.
            proven: Its layout on one batch.
        """
        if self.reaches.setdefault(name, proven.reach) is not proven.reach:
            self.reaches[name] = proven.reach
            self.places[name] = {}
        known = self.places.setdefault(name, {})
        for signature, place in proven.places.items():
            known[signature] = known[signature].joined(place) if signature in known else place

    def learn_axes(self, axes: Mapping[Key, int | None]) -> None:
        """Note along which axes nodes move nothing.

        Args:
            axes: Kind of node to axis, or None.
        """
        for key, axis in axes.items():
            known = self.kept_axes.setdefault(key, axis)
            if known != axis:
                self.kept_axes[key] = None

    def keeps_samples(self, selection: Selection, n: int) -> bool:
        """Say whether a node is known to move nothing from sample to sample.

        Args:
            selection: The node.
            n: Number of samples.

        Returns:
            True if the samples lie along an axis that it leaves alone.
        """
        axis = self.kept_axes.get(selection.key)
        if axis is None:
            return False
        sizes = [entry.shape[axis] for entry in selection.node._input_metadata]
        return all(size == n or (axis == 0 and size % n == 0) for size in sizes)

    def layouts(
        self, name: str, reads: Iterable[Read], n: int, moved: Collection[Node]
    ) -> dict[Read, Layout] | None:
        """Say how a parameter is to be read in a batch.

        Args:
            name: The parameter.
            reads: Its places.
            n: Number of samples.
            moved: Nodes whose rows may lie elsewhere in every batch.

        Returns:
            The layout of each place; or None if this batch needs
            a proof of its own.
        """
        known = self.places.get(name, {})
        found: dict[Read, Layout] = {}
        for read in reads:
            place = known.get(read.signature)
            if place is None or not place.is_settled:
                return None
            if place.axis is None:
                found[read] = Layout(n, Axis.ROWS, may_be_nonzero=False)
                continue
            if n > 1 and (read.node in moved or kind_of(read.node) in _RAGGED):
                return None
            found[read] = Layout(n, place.axis, may_spread=place.is_spread)
        return found


_caches: WeakKeyDictionary[nn.Module, list[tuple[object, Callable[[], object], Trust]]]
_caches = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Drop what has been found out about a model: the next pass over it starts as the first one did.

    Args:
        model: The model.
    """
    _caches.pop(model, None)


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
        # A batch of one sample shows nothing about those of several.
        key = (self._fingerprint, tuple(_form(batch, n)), n == 1)
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
            tuple(
                [
                    (key, value)
                    for key, value in vars(module).items()
                    if type(value) not in _NO_SETTINGS and _is_setting(key, value)
                ]
            ),
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


# Of what every module holds ten: asked first, since a small network has little else to do.
_NO_SETTINGS = frozenset({dict, OrderedDict, set})


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
