"""The engine's face: adds the per-sample powers of gradients of a batch, by whichever way is exact."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.environment import prepared
from unlearn_ext.fisher.engine.fallback import Fallback
from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.layers import Recording, recorded
from unlearn_ext.fisher.engine.layout import MismatchError
from unlearn_ext.fisher.engine.passes import FisherPass, LayoutCandidate, Signature
from unlearn_ext.fisher.engine.sample_losses import (
    NotPerSampleError,
    PerSampleLoss,
    describe,
    in_channels_last,
    pick,
)
from unlearn_ext.fisher.engine.totals import Totals
from unlearn_ext.fisher.engine.trust import Trust, TrustCache
from unlearn_ext.fisher.engine.verification import Outcome, Verification
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
        self._loss = PerSampleLoss(model, loss_fn)
        self._trust_cache = TrustCache(model, loss_fn, chosen)
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
            trust = self._trust_cache.lookup(batch, n)
            if not trust.mixed & {0, n}:
                outcome, alone = self._check(batch, n, trust)
                if outcome is Outcome.NOT_FINITE and alone is not None:
                    return alone
                if outcome is Outcome.APART:
                    losses = self._add(batch, n, trust, alone)
                    if losses is not None:
                        return losses
            return self._add_on_their_own(batch, n)

    def finish(self) -> None:
        """Complete the accumulators after the last batch."""
        with torch.no_grad():
            self._totals.finish()

    def _check(self, batch: Batch, n: int, trust: Trust) -> tuple[Outcome, Tensor | None]:
        known = trust.candidates | trust.reasons
        names = [name for name in self._chosen if name not in known]
        if n > 1 and not trust.was_pair:
            names = list(self._chosen)
        if not names:
            return Outcome.APART, None
        try:
            outcome, alone = Verification(self._loss, self._chosen).run(batch, n, names, trust)
        except NotPerSampleError:
            self._loss.losses(batch, n, is_whole=True)  # fails as well, and with the user's numbers
            raise
        if outcome is Outcome.MIXED:
            trust.mixed.add(0)
        return outcome, alone

    def _add(self, batch: Batch, n: int, trust: Trust, alone: Tensor | None) -> Tensor | None:
        """Add one batch of samples that do not influence each other.

        Args:
            batch: The batch.
            n: Its number of samples.
            trust: What is known about it.
            alone: The losses of its first samples on their own, if known.

        Returns:
            The losses, or None if the samples do influence each other, and nothing was added.
        """
        candidates = trust.candidates
        losses: Tensor | None = None
        failures: dict[str, Exception] = {}
        if candidates or n not in trust.sizes:
            with recorded(self._model) as recording:
                inputs = in_channels_last(batch, n) if trust.channels_last else batch
                whole = self._loss.losses(inputs, n, is_whole=True)
                recording.is_open = False
                losses = whole.detach()
                if n not in trust.sizes:
                    if not self._are_apart(batch, n, losses, alone):
                        trust.mixed.add(n)
                        return None
                    trust.sizes.add(n)
                failures = self._backward(whole, n, candidates, trust, recording)
            del whole
        again = [name for name, error in failures.items() if isinstance(error, _UnknownPlaceError)]
        if again and trust.checks_left:
            failures = self._add_again(batch, n, trust, failures, again)
        reasons = {name: describe(error) for name, error in failures.items()}
        reasons |= {name: why for name, why in trust.reasons.items() if name in self._chosen}
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
            values = [self._loss.losses(pick(batch, n, [sample]), 1).detach() for sample in firsts]
            alone = torch.cat(values)
        return self._loss.agree(alone, losses)

    def _backward(
        self, losses: Tensor, n: int, how: Mapping[str, LayoutCandidate], trust: Trust, recording: Recording
    ) -> dict[str, Exception]:
        def accumulate(name: str, term: PerSampleGradients, signatures: frozenset[Signature]) -> None:
            if name in trust.unproven:
                if term.is_zero():
                    return
                raise _UnknownPlaceError("no sample that was checked had a gradient")
            if not trust.knows(name, signatures):
                raise _UnknownPlaceError("it is not used as it was when it was verified")
            self._totals.add(name, term)

        if not how or not losses.requires_grad:
            return {}
        return FisherPass(n, self._chosen, how, accumulate, recording).run(losses)

    def _add_again(
        self, batch: Batch, n: int, trust: Trust, failures: dict[str, Exception], names: Iterable[str]
    ) -> dict[str, Exception]:
        # Nothing was added for these: check how they are used now, and run the batch for them once more.
        trust.checks_left -= 1
        Verification(self._loss, self._chosen).run(batch, n, names, trust)
        proven = trust.trusted.keys() - trust.reasons.keys()
        how = {name: trust.trusted[name] for name in names if name in proven}
        with recorded(self._model) as recording:
            inputs = in_channels_last(batch, n) if trust.channels_last else batch
            losses = self._loss.losses(inputs, n)
            recording.is_open = False
            still = self._backward(losses, n, how, trust, recording)
        return {name: error for name, error in failures.items() if name not in how} | still

    def _fall_back(self, batch: Batch, n: int, reasons: Mapping[str, str]) -> Tensor:
        names = tuple(name for name in self._chosen if name in reasons)
        fallback = self._fallbacks.get(names)
        if fallback is None:
            chosen = {name: self._chosen[name] for name in names}
            fallback = self._fallbacks[names] = Fallback(self._loss, chosen, self._power)
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
