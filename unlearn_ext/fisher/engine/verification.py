"""The check: no number is given out that plain autograd on single samples has not agreed with before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.layers import recorded
from unlearn_ext.fisher.engine.layout import MismatchError, NoRuleError
from unlearn_ext.fisher.engine.passes import CANDIDATES, FisherPass, LayoutCandidate, Signature
from unlearn_ext.fisher.engine.sample_losses import (
    PerSampleLoss,
    add_gradient,
    describe,
    in_channels_last,
    pick,
)
from unlearn_ext.fisher.engine.trust import Trust
from unlearn_ext.tasks.batches import Batch

# Groups of samples that are looked at for a parameter that gets no gradient from those before.
_ATTEMPTS = 4
# The losses of a group count differently: in numbers that mix the samples up, it cannot pass unnoticed that
# gradients of different samples, or at different positions, happen to be the same.
_WEIGHTS = (1.0, -1.4, 0.6)

DISAGREES = "disagrees with plain autograd"


class Outcome(Enum):
    """What the check says about the samples as such."""

    APART = "every sample has the loss that it has on its own"
    MIXED = "samples influence each other"
    NOT_FINITE = "a loss is not finite"


class _DisagreementError(MismatchError):
    pass


class Verification:
    """Compares passes over a few samples with plain autograd on each of them.

    A group is two samples, the first of them twice: with a sample in it twice, numbers that mix the samples
    up are wrong even where no two samples' gradients have an entry in common. Squares are compared whatever
    the power, since absolute values add up in the same way for any grouping of gradients of one sign.

    Args:
        loss: The model and its loss.
        chosen: Parameter name to parameter.
    """

    def __init__(self, loss: PerSampleLoss, chosen: Mapping[str, Tensor]) -> None:
        self._loss, self._chosen = loss, chosen
        is_half = loss.is_half
        # On CUDA, float32 convolutions may round to tf32, and not in the same way for all shapes.
        self.tolerance = 0.1 if is_half else 1e-3 if loss.device.type == "cpu" else 1e-2
        # Gradients that vanish in exact arithmetic (key biases of attention) are rounding: a share of the
        # largest gradient.
        self.rounding = (3e-2 if is_half else 1e-5) ** 2

    def run(self, batch: Batch, n: int, names: Iterable[str], trust: Trust) -> tuple[Outcome, Tensor]:
        """Verification some parameters.

        Args:
            batch: A batch on the model's device.
            n: Its number of samples, >= 1.
            names: The parameters.
            trust: Gets what is found out.

        Returns:
            What is found out about the samples, and the losses of the first one or two, each on its own.
        """
        pending = list(names)
        first_losses: Tensor | None = None
        for attempt in range(_ATTEMPTS):
            group = range(2 * attempt, min(2 * attempt + 2, n))
            if first_losses is not None and not (group and pending):
                break
            expected = self._zeros(pending)
            alone = self._add_plain(batch, n, group, expected)
            first_losses = alone if first_losses is None else first_losses
            if not bool(torch.isfinite(alone).all()):
                return Outcome.NOT_FINITE, first_losses
            trust.was_pair = trust.was_pair or len(group) == 2
            comparison = self._try(pick(batch, n, [*group, group[0]]), alone, expected, trust)
            if comparison is None:
                return Outcome.MIXED, first_losses
            comparison.conclude()
            # Another group may have a gradient to show, or be no borderline case of rounding.
            disagrees = {
                name for name, why in comparison.reasons.items() if isinstance(why, _DisagreementError)
            }
            again = comparison.unproven.keys() | (set() if attempt else disagrees)
            pending = [name for name in pending if name in again]
        assert first_losses is not None
        return Outcome.APART, first_losses

    def _try(
        self, batch: Batch, alone: Tensor, expected: Mapping[str, Tensor], trust: Trust
    ) -> _Comparison | None:
        losses = torch.cat([alone, alone[:1]])
        if trust.channels_last is None:
            trust.channels_last = self._has_images()
        while True:
            comparison = _Comparison(self, expected, trust)
            inputs = in_channels_last(batch, len(losses)) if trust.channels_last else batch
            if not comparison.run(self._loss, self._chosen, inputs, losses):
                return None
            if not (comparison.is_broken and trust.channels_last):
                return comparison
            trust.channels_last = False

    def _has_images(self) -> bool:
        # On CPUs it makes convolutions faster, and their patches contiguous. Some models contain views that
        # only the usual order allows: they raise an error.
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        on_cpu = self._loss.device.type == "cpu"
        return on_cpu and any(isinstance(module, kinds) for module in self._loss.model.modules())

    def _zeros(self, names: Iterable[str]) -> dict[str, Tensor]:
        made = {}
        for name in names:
            parameter = self._chosen[name].detach()
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            made[name] = torch.zeros_like(parameter, dtype=wide)
        return made

    def _add_plain(
        self, batch: Batch, n: int, group: Sequence[int], expected: Mapping[str, Tensor]
    ) -> Tensor:
        alone = []
        chosen = {name: self._chosen[name] for name in expected}
        for sample in group:
            loss = self._loss.losses(pick(batch, n, [sample]), 1)
            times = [w for w, s in zip(_WEIGHTS, (*group, group[0]), strict=False) if s == sample]
            if chosen:
                add_gradient(loss.sum(), chosen, expected, 2, sum(w * w for w in times))
            alone.append(loss.detach())
        return torch.cat(alone)


class _Finding(Enum):
    AGREES = 1
    # Both sides are as small as rounding leaves behind what vanishes in exact arithmetic.
    ROUNDING = 2
    NO_GRADIENT = 3
    DISAGREES = 4


class _Comparison:
    """One group, and one candidate after the other.

    Args:
        verification: What it belongs to.
        expected: Parameter name to the sum of squares of the plain gradients.
        trust: Gets what is found out.
    """

    def __init__(self, verification: Verification, expected: Mapping[str, Tensor], trust: Trust) -> None:
        self._verification, self._expected, self._trust = verification, expected, trust
        # Parameter name to why no candidate holds, or to one that nothing speaks for or against.
        self.reasons: dict[str, Exception] = {}
        self.unproven: dict[str, LayoutCandidate] = {}
        self.is_broken = False  # the passes themselves raised an error
        self._is_hopeless: set[tuple[str, int]] = set()
        self._found: dict[str, tuple[_Finding, frozenset[Signature]]] = {}
        self._proven: dict[str, tuple[LayoutCandidate, frozenset[Signature]]] = {}
        for total in expected.values():
            if total.numel():
                trust.scale = max(trust.scale, float(total.nan_to_num(0.0, 0.0).max()))

    def run(self, loss: PerSampleLoss, chosen: Mapping[str, Tensor], batch: Batch, alone: Tensor) -> bool:
        """Run the group.

        Args:
            loss: The model and its loss.
            chosen: Parameter name to parameter.
            batch: The group.
            alone: The losses of its samples on their own.

        Returns:
            False if the samples influence each other.
        """
        n = len(alone)
        pending = list(self._expected)
        for candidate in CANDIDATES:
            tested = [name for name in pending if (name, candidate.reach) not in self._is_hopeless]
            if not tested and candidate is not CANDIDATES[0]:
                continue
            self._found.clear()
            with recorded(loss.model) as recording:
                how = dict.fromkeys(tested, candidate)
                run = FisherPass(n, chosen, how, self._take, recording)
                failures: Mapping[str, Exception] = {}
                try:
                    losses = loss.losses(batch, n)
                    recording.is_open = False
                    if candidate is CANDIDATES[0] and not loss.agree(losses.detach(), alone):
                        return False
                    if losses.requires_grad:
                        failures = run.run(losses, losses.new_tensor(_WEIGHTS[:n]))
                except Exception as error:  # on their own, the samples got through
                    self.is_broken = True
                    for name in pending:
                        self._note(name, candidate, error)
                    return True
            settled = self._settle(tested, candidate, failures, run.places)
            pending = [name for name in pending if name not in settled]
        return True

    def conclude(self) -> None:
        """Write into the trust what has come out."""
        trust = self._trust
        for name in self._expected:
            trust.reasons.pop(name, None)
            if name in self._proven:
                trust.trust(name, *self._proven[name])
            elif name in self.unproven:
                if name not in trust.trusted:
                    trust.unproven[name] = self.unproven[name]
            else:
                trust.unproven.pop(name, None)
                trust.reasons[name] = describe(self.reasons[name])

    def _take(self, name: str, term: PerSampleGradients, signatures: frozenset[Signature]) -> None:
        total = torch.zeros_like(self._expected[name])
        try:
            term.add_to(total, 2)
        except Exception as error:  # say, a dtype that no op takes
            raise MismatchError(describe(error)) from error
        self._found[name] = self._judge(name, total), signatures

    def _judge(self, name: str, total: Tensor) -> _Finding:
        expected = self._expected[name]
        size, error = _norm(expected), _norm(total - expected)
        floor = self._verification.rounding * self._trust.scale * math.sqrt(expected.numel())
        if size and error <= self._verification.tolerance * size:
            return _Finding.AGREES
        if math.isnan(size + error) or size + error == 0:
            return _Finding.NO_GRADIENT
        return _Finding.ROUNDING if size + error <= floor else _Finding.DISAGREES

    def _settle(
        self,
        tested: Iterable[str],
        candidate: LayoutCandidate,
        failures: Mapping[str, Exception],
        places: Mapping[str, set[object]],
    ) -> set[str]:
        """Note what one candidate has brought.

        Args:
            tested: The parameters it was tried on.
            candidate: The candidate.
            failures: Parameter name to why it failed.
            places: Parameter name to the nodes that were read.

        Returns:
            The parameters that need no other one.
        """
        # What holds for a layer's weight at a node holds for its bias.
        proven = {
            place
            for name, (finding, _) in self._found.items()
            if finding is _Finding.AGREES
            for place in places[name]
        }
        settled = set()
        for name in tested:
            failure = failures.get(name)
            if failure is not None:
                self._note(name, candidate, failure)
                continue
            found = self._found.get(name)
            nothing = torch.zeros_like(self._expected[name])
            finding, signatures = found or (self._judge(name, nothing), frozenset[Signature]())
            is_beside_proven = finding is _Finding.ROUNDING and places.get(name, set()) <= proven
            if finding is _Finding.DISAGREES:
                where = "the graph does not show where it is used"
                error = _DisagreementError(DISAGREES) if found else NoRuleError(where)
                self._note(name, candidate, error)
            elif finding is _Finding.AGREES or not found or is_beside_proven:
                self._proven[name] = candidate, signatures
                settled.add(name)
            else:
                self.unproven.setdefault(name, candidate)
                if finding is _Finding.NO_GRADIENT:
                    settled.add(name)
        return settled

    def _note(self, name: str, candidate: LayoutCandidate, failure: Exception) -> None:
        if isinstance(failure, NoRuleError):
            self._is_hopeless.add((name, candidate.reach))
        known = self.reasons.get(name)
        is_news = isinstance(failure, _DisagreementError) and not isinstance(known, NoRuleError)
        if known is None or is_news:
            self.reasons[name] = failure


def _norm(tensor: Tensor) -> float:
    # In float64: squares of squares of small gradients leave the range of float32.
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
