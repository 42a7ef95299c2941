"""The proof of a layout: which sample every row of a tensor belongs to, measured on the batch itself.

Two backward passes over one graph, the second with the losses multiplied by *codes*: powers of two, with
either sign, another one for every sample. Row r of a node's output gradient is then multiplied by the code of
the sample whose loss r influences, bit for bit, since powers of two commute with rounding. A row that
influences several losses is multiplied by no code at all. This shows, for the batch at hand and with nothing
assumed, where the samples are, however the model got them there, and whether they are coupled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.graph import Node
from unlearn_ext.fisher.engine.layers import RecordedCall
from unlearn_ext.fisher.engine.layout import Axis, Layout, MismatchError, NoRuleError
from unlearn_ext.fisher.engine.passes import Arrived, Read, Signature, Trace
from unlearn_ext.fisher.engine.rules import Reach
from unlearn_ext.fisher.engine.sample_losses import describe
from unlearn_ext.fisher.engine.selections import Key, Selection

AXES = (Axis.FIRST, Axis.SECOND, Axis.INNER)
# Codes are powers of four: a row that two or three samples share alike, say one that stands for equal
# samples, is multiplied by the mean of their codes, and no mean of a few powers of four is another one.
# float16 has few.
_LARGEST_POWER, _LARGEST_HALF_POWER = 10, 2
DISAGREES = "disagrees with plain autograd"
_NEAR = 0.1


class Place(NamedTuple):
    """What holds for places of one signature.

    Attributes:
        axis: Where the samples are; None if no gradient has ever come by.
        is_spread: A sample had several entries there when this was proven.
        is_settled: No other axis explains what was seen.
    """

    axis: Axis | None
    is_spread: bool
    is_settled: bool

    def joined(self, other: Place) -> Place:
        """Join what two places, or two batches, have shown; what is proven is not given up for less.

        Args:
            other: Of the same signature.

        Returns:
            What holds for both.
        """
        if self.axis is None or other.axis is None:
            return other if self.axis is None else self
        is_spread = self.is_spread or other.is_spread
        if self.axis is other.axis:
            return Place(self.axis, is_spread, self.is_settled or other.is_settled)
        # Without several entries per sample, all axes are the same.
        if self.is_spread and other.is_spread:
            return Place(self.axis, True, False)
        return self if self.is_spread else other


@dataclass
class Proven:
    """What a proof says of one parameter on one batch.

    Attributes:
        reach: How far it was followed.
        layouts: What to read in which layout.
        places: Signature to what holds in general, wherever no node moves entries as the data say.
        error: Why there is no layout.
        coupling: Share of the gradient that no layout explains, where there is none.
    """

    reach: Reach = Reach.NEAR
    layouts: dict[Read, Layout] = field(default_factory=dict)
    places: dict[Signature, Place] = field(default_factory=dict)
    error: Exception | None = None
    coupling: float = 0.0

    def learn(self, signature: Signature, place: Place) -> None:
        """Note what one place has shown.

        Args:
            signature: The place's.
            place: What it has shown.
        """
        known = self.places.get(signature)
        self.places[signature] = place if known is None else known.joined(place)


def tolerance_of(dtype: torch.dtype, device: torch.device) -> float:
    """Say how far two backward passes of one graph may differ.

    Args:
        dtype: Of the gradients.
        device: Where they are.

    Returns:
        A share of the gradient's norm. Rounding commutes with codes; what is left is an order of sums that
        changes with the alignment of memory, or on GPUs from run to run.
    """
    if dtype == torch.float64:
        return 1e-10
    if dtype == torch.float32:
        return 1e-5 if device.type == "cpu" else 1e-4
    return 2e-2


class _Codes:
    """Factors of the losses, as few passes as tell all samples apart."""

    def __init__(self, losses: Tensor, n: int, *, is_float16: bool) -> None:
        largest = _LARGEST_HALF_POWER if is_float16 else _LARGEST_POWER
        powers = range(-largest, largest + 1)
        # Small ones first, so that few samples need no large ones.
        values = [sign * 4.0**e for e in sorted(powers, key=abs) for sign in (1.0, -1.0)]
        values = [value for value in values if value != 1.0]
        base = len(values)
        self.digits: list[Tensor] = []
        rest = torch.arange(n)
        while True:
            self.digits.append(rest % base)
            rest = rest // base
            if not bool(rest.any()):
                break
        table = losses.new_tensor(values)
        self.values = [table[digit.to(losses.device)][: len(losses)] for digit in self.digits]
        self.table, self.base = table, base

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class _Digest:
    # Of one place in one layout: of every pass, and at the end how well the codes explain it.
    values: list[Tensor] = field(default_factory=list)
    is_spread: bool = False
    along: set[Axis] = field(default_factory=set)
    error: float = float("inf")


class LayoutProof:
    """Finds the layout of parameters on one batch.

    Args:
        trace: The forward pass; its graph is kept.
        parameters: Parameter name to parameter.
        watched: Nodes to look at on the way.
    """

    def __init__(
        self, trace: Trace, parameters: Mapping[str, Tensor], watched: Sequence[Selection] = ()
    ) -> None:
        self._trace, self._parameters, self._n = trace, parameters, trace.n
        self._watched = watched
        self._digests: dict[tuple[str, Read, Axis], _Digest] = {}
        self._failures: dict[tuple[str, Read, Axis], Exception] = {}
        self._dtypes: dict[tuple[str, Read], torch.dtype] = {}
        self._axes: dict[Selection, dict[int, list[Tensor]]] = {}
        is_float16 = any(p.dtype == torch.float16 for p in parameters.values()) or (
            torch.is_autocast_enabled(trace.losses.device.type)
            and torch.get_autocast_dtype(trace.losses.device.type) == torch.float16
        )
        # As many passes as the rank with the most samples needs.
        most = trace.lockstep.most(self._n)
        self._codes = _Codes(trace.losses.detach(), most, is_float16=is_float16)

    def run(self, names: Iterable[str]) -> dict[str, Proven]:
        """Prove.

        Args:
            names: The parameters.

        Returns:
            What is found out about each.
        """
        found: dict[str, Proven] = {}
        pending = list(names)
        for reach in Reach:
            reads: dict[str, list[Read]] = {}
            for name in pending:
                try:
                    reads[name] = self._trace.reads(self._parameters[name], reach)
                except NoRuleError as error:
                    found[name] = _better(found.get(name), Proven(reach, error=error))
            self._measure({name: places for name, places in reads.items() if places})
            for name, places in reads.items():
                found[name] = _better(found.get(name), self._conclude(name, places, reach))
            self._learn_from_others(found, pending, reach)
            pending = [name for name in pending if found[name].error is not None]
            if not pending:
                break
        return found

    @property
    def axes_kept(self) -> dict[Key, int | None]:
        """Kind of watched node to the axis of the samples along which it moves nothing, or to None.

        Nodes that had no gradient are left out.
        """
        kept: dict[Key, int | None] = {}
        for selection, by_axis in self._axes.items():
            count = 1 + len(self._codes)
            digests = {axis: values for axis, values in by_axis.items() if len(values) == count and axis >= 0}
            if not any(bool(values[0].any()) for values in digests.values()):
                continue
            clean = []
            for axis, values in digests.items():
                tolerance = tolerance_of(values[0].dtype, values[0].device)
                if self._mismatch([value.unsqueeze(1) for value in values]) <= tolerance:
                    clean.append(axis)
            only = clean[0] if len(clean) == 1 and selection.keeps(clean[0]) else None
            if only is not None and int(digests[only][0].count_nonzero()) < min(2, self._n):
                continue
            known = kept.setdefault(selection.key, only)
            if known != only:
                kept[selection.key] = None
        return kept

    def _learn_from_others(self, found: dict[str, Proven], names: Iterable[str], reach: Reach) -> None:
        # What cannot be read on one rank is not read on any.
        own = {name: describe(error) for name in names if (error := found[name].error) is not None}
        for name, why in self._trace.lockstep.reasons(own).items():
            if name not in own:
                found[name] = Proven(reach, error=MismatchError(why))

    def _measure(self, reads: Mapping[str, Sequence[Read]]) -> None:
        if not reads and self._trace.lockstep.is_alone:
            return
        ones = torch.ones_like(self._trace.losses)
        for number, weights in enumerate([ones, *self._codes.values]):
            arrivals: list[tuple[Node, int, Arrived]] = []
            for name, places in reads.items():
                for place in places:
                    arrivals.append((place.node, place.output, functools.partial(self._take, name, place)))
            watched: list[tuple[Node, Arrived]] = []
            for selection in self._watched:
                if len(self._axes.get(selection, {}).get(-1, ())) <= number:
                    watched.append((selection.node, functools.partial(self._watch, selection)))
            self._trace.backward(arrivals, weights.detach(), watched=watched, retain_graph=True)

    def _take(self, name: str, place: Read, grads: Sequence[Tensor | None]) -> None:
        grad = grads[place.output]
        if grad is None:
            return
        self._dtypes[name, place] = grad.dtype
        is_rule = isinstance(place.what, RecordedCall)  # which gets the samples first
        for axis in (Axis.FIRST,) if is_rule else (*AXES, Axis.ROWS):
            known = self._digests.setdefault((name, place, axis), _Digest())
            if (name, place, axis) in self._failures:
                continue
            layout = Layout(self._n, axis)
            try:
                digest = place.gradients(self._parameters[name], grad, layout).digest()
            except Exception as error:
                self._failures[name, place, axis] = error.with_traceback(None)
                continue
            if axis is Axis.ROWS:
                digest = digest.T.reshape(-1) if digest.ndim == 2 else digest
            known.values.append(digest)
            known.is_spread |= layout.is_spread
            known.along |= layout.along

    def _watch(self, selection: Selection, grads: Sequence[Tensor | None]) -> None:
        digests = self._axes.setdefault(selection, {})
        digests.setdefault(-1, []).append(torch.empty(0))  # counts the passes
        found: dict[int, Tensor] = {}
        for grad in grads:
            if grad is None:
                continue
            for axis in (0, 1):
                size = grad.shape[axis] if grad.ndim > axis else 0
                if size == self._n or (axis == 0 and size and size % self._n == 0):
                    rows = grad.transpose(0, axis).reshape(self._n, -1)
                    rows = rows if rows.dtype == torch.float64 else rows.float()
                    numbers = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=rows.dtype)
                    digest = rows @ torch.sin(numbers * 12.9898)
                    found[axis] = found[axis] + digest if axis in found else digest
        for axis, digest in found.items():
            digests.setdefault(axis, []).append(digest)

    def _mismatch(self, values: Sequence[Tensor]) -> float:
        # Share of [n, positions] that is not explained by the samples' codes.
        first, *coded = values
        size = torch.linalg.vector_norm(first, dtype=torch.float64)
        shares = []
        for value, codes in zip(coded, self._codes.values, strict=True):
            left = value / codes.to(value.dtype).unsqueeze(1) - first
            shares.append(torch.linalg.vector_norm(left, dtype=torch.float64) / size)
        worst = float(torch.stack(shares).amax())  # which keeps what is no number
        return worst if worst == worst else float("inf")

    def _conclude(self, name: str, places: Sequence[Read], reach: Reach) -> Proven:
        proven = Proven(reach)
        for place in places:
            tried = {axis: self._digests.get((name, place, axis)) for axis in (*AXES, Axis.ROWS)}
            readable = {
                axis: digest
                for axis, digest in tried.items()
                if digest and digest.values and (name, place, axis) not in self._failures
            }
            rows = readable.pop(Axis.ROWS, None)
            some = next(iter(readable.values()), rows)
            if some is None and any(tried.values()):
                return Proven(reach, error=self._failures[name, place, Axis.FIRST])
            if some is None or not any(bool(value.any()) for value in some.values):
                proven.layouts[place] = Layout(self._n, Axis.ROWS, may_be_nonzero=False)
                proven.learn(place.signature, Place(None, is_spread=False, is_settled=True))
                continue
            tolerance = tolerance_of(self._dtypes[name, place], some.values[0].device)
            for digest in readable.values():
                digest.error = self._mismatch(digest.values)
            right = [axis for axis, digest in readable.items() if digest.error <= tolerance]
            if right:
                self._settle(proven, place, right, readable)
                continue
            samples = self._samples_of_rows(rows.values, tolerance) if rows else None
            if samples is None:
                error = self._failures.get((name, place, Axis.FIRST))
                coupling = min((digest.error for digest in readable.values()), default=0.0)
                if readable and not isinstance(error, NoRuleError):
                    error = MismatchError(f"{DISAGREES}: samples are coupled (by {coupling:.1e})")
                elif error is None:
                    error = MismatchError("no axis holds the samples where it is combined with the data")
                return Proven(reach, error=error, coupling=coupling)
            proven.layouts[place] = Layout(self._n, Axis.MEASURED, samples)
            proven.learn(place.signature, Place(Axis.MEASURED, is_spread=True, is_settled=False))
        return proven

    def _settle(
        self, proven: Proven, place: Read, right: Sequence[Axis], readable: Mapping[Axis, _Digest]
    ) -> None:
        # Two names for one way to read it, in rows [T * N, E] of a sequence [T, N, E], are one layout.
        every = {frozenset(readable[other].along) for other in right}
        axis = Axis.INNER if every == {frozenset({Axis.INNER})} and Axis.INNER in right else right[0]
        digest = readable[axis]
        proven.layouts[place] = Layout(self._n, axis)
        is_told_apart = len(every) == 1 or not any(readable[other].is_spread for other in right)
        enough = int(digest.values[0].any(1).sum()) >= min(2, self._n)
        is_settled = self._n == 1 or (is_told_apart and enough)
        proven.learn(place.signature, Place(axis, digest.is_spread, is_settled))

    def _samples_of_rows(self, values: Sequence[Tensor], tolerance: float) -> Tensor | None:
        # The sample of each row, -1 for those without a gradient; None if some row has none.
        first, *coded = values
        size = first.abs()
        has_some = size > torch.finfo(first.dtype).eps * size.max()
        samples = torch.zeros(len(first), dtype=torch.long, device=first.device)
        place = 1
        table = self._codes.table.to(first.dtype)
        for value in coded:
            ratios = torch.where(has_some, value / first, table[0])
            nearest = ((ratios[:, None] / table) - 1).abs()
            distance, digit = nearest.min(1)
            if bool((distance > _NEAR).any()):
                return None
            # Where samples cancel each other, the codes show what the plain pass does not.
            left = torch.where(has_some, value / table[digit] - first, value)
            if not float(torch.linalg.vector_norm(left)) <= tolerance * float(
                torch.linalg.vector_norm(first)
            ):
                return None
            samples += place * digit
            place *= self._codes.base
        if bool((samples[has_some] >= self._n).any()):
            return None
        samples[~has_some] = -1
        return samples


def _better(known: Proven | None, new: Proven) -> Proven:
    # What is closest to the parameter says most about why it failed.
    return new if known is None or new.error is None else known
