"""The engine's face: adds the per-sample powers of gradients of a batch, by whichever way is exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.check import Check, Outcome
from unlearn_ext.fisher.engine.fallback import Fallback
from unlearn_ext.fisher.engine.layers import Recording, recorded
from unlearn_ext.fisher.engine.layout import MismatchError
from unlearn_ext.fisher.engine.passes import FisherPass, Hypothesis, Signature
from unlearn_ext.fisher.engine.samples import (
    NotPerSampleError,
    Objective,
    describe,
    in_channels_last,
    pick,
)
from unlearn_ext.fisher.engine.surroundings import prepared
from unlearn_ext.fisher.engine.totals import Totals
from unlearn_ext.fisher.engine.uses import Use
from unlearn_ext.fisher.engine.verdicts import Register, Verdict
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.losses import LossFn


class _UnknownPlaceError(MismatchError):
    pass


class PerSample:
    """Adds up every sample's |gradient|^power, inside ``borrowed(model)``.

    One backward pass gives the whole batch's where plain autograd has agreed with it; the rest is computed
    sample by sample.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> Tensor[n]``.
        chosen: Parameter name to parameter.
        fisher: Parameter name to accumulator, written in place; complete after ``finish``.
        power: 1 or 2.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        chosen: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        power: int,
    ) -> None:
        self._model, self._chosen, self._fisher, self._power = model, chosen, fisher, power
        self._objective = Objective(model, loss_fn)
        self._register = Register(model, loss_fn, chosen)
        self._fallbacks: dict[tuple[str, ...], Fallback] = {}
        self._has_warned = False
        self._totals = Totals(fisher, power)
        self._how: dict[str, str] = {}

    @property
    def coverage(self) -> dict[str, str]:
        """Parameter name to "fused", or to why not and how instead if a single batch had to fall back."""
        return {name: self._how[name] for name in self._chosen if name in self._how}

    def accumulate(self, batch: Batch, n: int) -> Tensor:
        """Add one batch.

        Args:
            batch: A batch on the model's device.
            n: Its number of samples, >= 1.

        Returns:
            The samples' losses, ``[n]``, detached.
        """
        with prepared(self._model):
            verdict = self._register.verdict_on(batch, n)
            if not verdict.mixed & {0, n}:
                outcome, alone = self._check(batch, n, verdict)
                if outcome is Outcome.NOT_FINITE and alone is not None:
                    return alone
                if outcome is Outcome.APART:
                    losses = self._add(batch, n, verdict, alone)
                    if losses is not None:
                        return losses
            return self._add_on_their_own(batch, n)

    def finish(self) -> None:
        """Complete the accumulators after the last batch."""
        with torch.no_grad():
            self._totals.finish()

    def _check(self, batch: Batch, n: int, verdict: Verdict) -> tuple[Outcome, Tensor | None]:
        known = verdict.hypotheses | verdict.reasons
        names = [name for name in self._chosen if name not in known]
        if n > 1 and not verdict.was_pair:
            names = list(self._chosen)
        if not names:
            return Outcome.APART, None
        try:
            outcome, alone = Check(self._objective, self._chosen).run(batch, n, names, verdict)
        except NotPerSampleError:
            self._objective.losses(batch, n, is_whole=True)  # fails as well, and with the user's numbers
            raise
        if outcome is Outcome.MIXED:
            verdict.mixed.add(0)
        return outcome, alone

    def _add(self, batch: Batch, n: int, verdict: Verdict, alone: Tensor | None) -> Tensor | None:
        """Add one batch of samples that do not influence each other.

        Args:
            batch: The batch.
            n: Its number of samples.
            verdict: What is known about it.
            alone: The losses of its first samples on their own, if known.

        Returns:
            The losses, or None if the samples do influence each other, and nothing was added.
        """
        hypotheses = verdict.hypotheses
        losses: Tensor | None = None
        failures: dict[str, Exception] = {}
        if hypotheses or n not in verdict.sizes:
            with recorded(self._model) as recording:
                inputs = in_channels_last(batch, n) if verdict.channels_last else batch
                whole = self._objective.losses(inputs, n, is_whole=True)
                recording.is_open = False
                losses = whole.detach()
                if n not in verdict.sizes:
                    if not self._are_apart(batch, n, losses, alone):
                        verdict.mixed.add(n)
                        return None
                    verdict.sizes.add(n)
                failures = self._backward(whole, n, hypotheses, verdict, recording)
            del whole
        again = [name for name, error in failures.items() if isinstance(error, _UnknownPlaceError)]
        if again and verdict.checks_left:
            failures = self._add_again(batch, n, verdict, failures, again)
        reasons = {name: describe(error) for name, error in failures.items()}
        reasons |= {name: why for name, why in verdict.reasons.items() if name in self._chosen}
        for name in self._chosen:
            if name not in reasons:
                self._how.setdefault(name, "fused")
        if reasons:
            values = self._fall_back(batch, n, reasons)
            losses = values if losses is None else losses
        assert losses is not None
        return losses

    def _are_apart(self, batch: Batch, n: int, losses: Tensor, alone: Tensor | None) -> bool:
        if alone is None:
            firsts = range(min(n, 2))
            values = [self._objective.losses(pick(batch, n, [sample]), 1).detach() for sample in firsts]
            alone = torch.cat(values)
        return self._objective.agree(alone, losses)

    def _backward(
        self, losses: Tensor, n: int, how: Mapping[str, Hypothesis], verdict: Verdict, recording: Recording
    ) -> dict[str, Exception]:
        def sink(name: str, use: Use, signatures: frozenset[Signature]) -> None:
            if name in verdict.unproven:
                if use.is_zero():
                    return
                raise _UnknownPlaceError("no sample that was checked had a gradient")
            if not verdict.knows(name, signatures):
                raise _UnknownPlaceError("it is not used as it was when it was checked")
            self._totals.add(name, use)

        if not how or not losses.requires_grad:
            return {}
        return FisherPass(n, self._chosen, how, sink, recording).run(losses)

    def _add_again(
        self, batch: Batch, n: int, verdict: Verdict, failures: dict[str, Exception], names: Iterable[str]
    ) -> dict[str, Exception]:
        # Nothing was added for these: check how they are used now, and run the batch for them once more.
        verdict.checks_left -= 1
        Check(self._objective, self._chosen).run(batch, n, names, verdict)
        proven = verdict.trusted.keys() - verdict.reasons.keys()
        how = {name: verdict.trusted[name] for name in names if name in proven}
        with recorded(self._model) as recording:
            inputs = in_channels_last(batch, n) if verdict.channels_last else batch
            losses = self._objective.losses(inputs, n)
            recording.is_open = False
            still = self._backward(losses, n, how, verdict, recording)
        return {name: error for name, error in failures.items() if name not in how} | still

    def _fall_back(self, batch: Batch, n: int, reasons: Mapping[str, str]) -> Tensor:
        names = tuple(name for name in self._chosen if name in reasons)
        fallback = self._fallbacks.get(names)
        if fallback is None:
            chosen = {name: self._chosen[name] for name in names}
            fallback = self._fallbacks[names] = Fallback(self._objective, chosen, self._power)
        values = fallback.accumulate(batch, n, self._fisher)
        for name in names:
            self._how[name] = f"fallback: {reasons[name]}; {fallback.how}"
        return values

    def _add_on_their_own(self, batch: Batch, n: int) -> Tensor:
        if not self._has_warned:
            warnings.warn(
                "fisher_diagonal: a sample on its own has another loss than in its batch: samples influence "
                "each other, the model is random in eval mode, or a tensor that the samples share is as long "
                "as the batch and was taken apart; the importances are those of samples on their own",
                stacklevel=4,
            )
            self._has_warned = True
        return self._fall_back(batch, n, dict.fromkeys(self._chosen, Outcome.MIXED.value))
