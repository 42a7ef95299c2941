"""The engine's face: adds the per-sample powers of gradients of a batch, by whichever way is exact."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine.combine import needs_graph
from unlearn_ext.fisher.engine.coupling import Watch, may_couple
from unlearn_ext.fisher.engine.environment import prepared
from unlearn_ext.fisher.engine.fallback import Fallback
from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.layers import RecordedCall
from unlearn_ext.fisher.engine.layout import Layout, MismatchError, NoRuleError, UnprovenError
from unlearn_ext.fisher.engine.lockstep import Lockstep
from unlearn_ext.fisher.engine.passes import FisherPass, Read, Trace, traced
from unlearn_ext.fisher.engine.proof import LayoutProof
from unlearn_ext.fisher.engine.sample_losses import (
    NotPerSampleError,
    PerSampleLoss,
    Samples,
    Select,
    describe,
    in_channels_last,
    taken_apart,
)
from unlearn_ext.fisher.engine.selections import below, selections
from unlearn_ext.fisher.engine.settled import SettledTotals
from unlearn_ext.fisher.engine.trust import Trust, TrustCache
from unlearn_ext.fisher.engine.verification import Alone, Tolerance, Verification, tolerance_of
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.losses import LossFn

# Share of the passes' time that later comparisons with plain autograd may take.
CERTIFICATES = 0.01
# Batches that may refute the layout of a parameter before it falls back for good.
_REFUTATIONS = 4
# Numbers of samples on which layouts are told apart that look alike in a whole batch.
_FEWER = (3, 5)
# Samples of which a change of the memory format is checked.
_FORMATTED = 8

_MIXED = "samples influence each other"


@dataclass
class _Plan:
    # How a batch is computed.
    layouts: dict[str, dict[Read, Layout]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    # Parameters with a rule of the user's that has not shown yet that it is right.
    unseen: set[str] = field(default_factory=set)

    @property
    def is_blind(self) -> bool:
        """Some gradient vanishes altogether, so that losses may not depend on what comes before it."""
        return any(not layout.may_be_nonzero for of in self.layouts.values() for layout in of.values())


class PerSample:
    """Adds up every sample's |gradient|^power, inside ``borrowed(model)``.

    One backward pass gives the whole batch's, wherever the layout of the samples is proven and plain autograd
    has agreed (README.md beside this file says when); the rest is computed sample by sample.

    Args:
        model: The model.
        loss_fn: ``loss_fn(model, batch) -> Tensor[n]``.
        chosen: Parameter name to parameter.
        fisher: Parameter name to accumulator, written in place; complete after ``finish``.
        power: 1 or 2.
        select: ``select(batch, samples) -> batch`` for batches whose samples do not lie along a leading
            dimension; by default they do.
        lockstep: Decides together with the other ranks of a sharded model, whose gathered parameters
            ``chosen`` are.
        guard: What the forward passes of a model that nothing is known about run inside.

    Raises:
        NotImplementedError: If parameters are sharded, or not there.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        chosen: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        power: int,
        select: Select | None = None,
        lockstep: Lockstep | None = None,
        guard: AbstractContextManager[object] | None = None,
    ) -> None:
        check_parameters(chosen)
        self._model, self._chosen, self._fisher, self._power = model, chosen, fisher, power
        self._select, self._guard = select, guard
        self._lockstep = Lockstep() if lockstep is None else lockstep
        self._loss = PerSampleLoss(model, loss_fn, self._lockstep)
        self._trust_cache = TrustCache(model, loss_fn, chosen)
        self._verification = Verification(self._loss, chosen)
        self._fallbacks: dict[tuple[str, ...], Fallback] = {}
        self._has_warned = False
        self._has_run = self._is_used = self._has_mixed = False
        self._totals = self._lockstep.totals(fisher, power)
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
            The samples' losses, ``[n]``, detached. If one is not finite, nothing was added.
        """
        with prepared(self._model):
            samples = Samples(batch, n, self._select)
            trust = self._trust_cache.lookup(batch, n)
            self._loss.surroundings = None if trust.sizes else self._guard
            self._guard = None  # what a model does not write in its first batch, it hardly will
            is_mixed = self._lockstep.any(trust.is_mixed)
            losses = None if is_mixed else self._add(samples, trust)
            return self._add_on_their_own(samples) if losses is None else losses

    def finish(self) -> None:
        """Complete the accumulators after the last batch.

        Raises:
            ValueError: If no parameter was used by the losses of any batch, or samples have no gradients but
                together.
        """
        with torch.no_grad():
            self._totals.finish()
        if self._lockstep.any(self._has_run) and not self._lockstep.any(self._is_used):
            raise ValueError(
                "fisher_diagonal: the losses must depend on the chosen parameters, got losses that depend on "
                "none of them as they are (a wrapper such as FSDP may put others in their place: pass the "
                "model before it is wrapped)"
            )

        lockstep = self._lockstep
        if lockstep.any(self._has_mixed) and not lockstep.any(
            any(bool(t.any()) for t in self._fisher.values())
        ):
            raise ValueError(
                "fisher_diagonal: a sample on its own must have a loss that depends on the parameters, got "
                "losses that only samples together have (contrastive, ranking or survival losses); "
                "estimator='batch' squares gradients of whole batches, or pass a task whose samples are sets"
            )

    def _add(self, samples: Samples, trust: Trust) -> Tensor | None:
        """Add one batch of samples that do not influence each other.

        Args:
            samples: The batch.
            trust: What is known about its like.

        Returns:
            The losses, or None if the samples do influence each other, and nothing was added.
        """
        n, start = samples.n, time.perf_counter()
        lockstep = self._lockstep
        if trust.channels_last is None:
            trust.channels_last = self._may_be_formatted(samples) and self._is_alike_formatted(samples, trust)
        batch, watch = self._formatted(samples, trust), None
        if not trust.edges and lockstep.is_alone:  # a watched pass that fails is run again
            watch = Watch(batch, n, is_leading=samples.is_leading)
        with traced(self._loss, batch, n, is_whole=True, watch=watch) as trace:
            losses = trace.losses.detach()
            if not lockstep.all(bool(torch.isfinite(losses).all())):
                return losses
            self._has_run |= trace.losses.requires_grad
            self._is_used |= any(trace.graph.has_leaf(parameter) for parameter in self._chosen.values())
            is_new = lockstep.any(not trace.graph.edges <= trust.edges)
            was_known = lockstep.all(bool(trust.edges))
            if is_new:
                trust.tolerance = tolerance_of(self._loss, losses, trace.graph)
            if lockstep.any(is_new or n not in trust.sizes):
                trust.may_couple = lockstep.any(bool(trust.may_couple)) or lockstep.any(
                    watch.is_mixed if watch is not None else may_couple(self._loss, samples)
                )
            trust.reasons.update(lockstep.reasons(trust.reasons))
            if self._chosen.keys() - trust.reasons.keys():
                plan = self._plan(trace, trust)
            else:
                plan = _Plan(reasons={name: trust.reasons[name] for name in self._chosen})
            tolerance, spent = trust.tolerance, time.perf_counter()
            is_blind = lockstep.any(plan.is_blind)
            alone = self._alone(samples, losses, trust, is_new=is_new, is_blind=is_blind)
            if not self._verification.is_apart(self._as_run(samples, trust), losses, alone, tolerance):
                trust.is_mixed = not was_known or trust.refutations[_MIXED] >= _REFUTATIONS
                trust.refutations[_MIXED] += 1
                return None
            compared = [found for found in alone if found.has_gradients]
            if compared:
                trust.price, trust.seconds = time.perf_counter() - spent, 0.0
                start += trust.price
            failures = self._run(trace, trust, plan, compared, tolerance, is_new=is_new)
        unproven = {name for name, error in failures.items() if isinstance(error, UnprovenError)}
        joined = lockstep.names(unproven)
        again = [name for name in self._chosen if name in joined]
        if again:
            failures = {name: error for name, error in failures.items() if name not in again}
            failures |= self._add_again(samples, trust, again, compared, tolerance)
        trust.edges |= trace.graph.edges
        trust.sizes.add(n)
        for name, error in failures.items():
            plan.reasons[name] = describe(error)
            self._refute(trust, name, plan.reasons[name], for_good=is_new)
        for name in self._chosen:
            if name not in plan.reasons:
                self._how.setdefault(name, "fused")
        if plan.reasons:
            self._fall_back(samples, plan.reasons)
        if not is_new:
            trust.seconds += time.perf_counter() - start
        if lockstep.any(not trust.tried_fewer) and lockstep.all(n > max(_FEWER)):
            trust.tried_fewer = True
            self._tell_apart(samples, trust)
        return losses

    def _tell_apart(self, samples: Samples, trust: Trust) -> None:
        # Where one position of many has a gradient (a class token), two layouts may explain what is seen in a
        # batch of one size, such as 65 positions of 32 samples, and hardly in those of others.
        for n in _FEWER:
            joined = self._lockstep.names(trust.unsettled(self._chosen))
            names = [name for name in self._chosen if name in joined]
            if not names:
                return
            fewer = Samples(samples.take(range(n)), n, self._select)
            with traced(self._loss, self._formatted(fewer, trust), n) as trace:
                is_finite = self._lockstep.all(bool(torch.isfinite(trace.losses).all()))
                if not trace.losses.requires_grad or not is_finite:
                    return
                for name, proven in LayoutProof(trace, self._chosen).run(names).items():
                    if proven.error is None and proven.reach is trust.reaches.get(name):
                        trust.learn(name, proven)

    def _formatted(self, samples: Samples, trust: Trust) -> Batch:
        return in_channels_last(samples.batch, samples.n) if trust.channels_last else samples.batch

    def _as_run(self, samples: Samples, trust: Trust) -> Samples:
        # Another order of memory means other kernels, which round otherwise: that is no influence of samples.
        return Samples(self._formatted(samples, trust), samples.n, self._select)

    def _alone(
        self, samples: Samples, losses: Tensor, trust: Trust, *, is_new: bool, is_blind: bool
    ) -> list[Alone]:
        """Run some samples on their own.

        Args:
            samples: The batch.
            losses: Its losses.
            trust: What is known about its like.
            is_new: Nothing is known about graphs like this one.
            is_blind: The losses may not depend on some of what the model computes.

        Returns:
            What was found.

        Raises:
            NotPerSampleError: If the loss is not one value per sample.
        """
        n, lockstep = samples.n, self._lockstep
        is_due = lockstep.any(trust.seconds * CERTIFICATES >= trust.price)
        is_due = lockstep.any(n not in trust.sizes) or is_due
        is_coupled = lockstep.any(bool(trust.may_couple))
        chosen: list[int] = []
        if is_coupled and is_blind:
            chosen = list(range(n))
        elif is_new or lockstep.any(not trust.certificates):
            # The largest losses have gradients to show; two batches, since all samples of one may be alike.
            trust.certificates += not is_new
            chosen = losses.abs().argsort(descending=True, stable=True)[: 1 + is_new].tolist()
        elif is_due:
            chosen = [trust.certificates * 40503 % n]
            if n > max(trust.sizes, default=0):  # nothing was ever at the last place
                chosen = sorted({*chosen, n - 1})
            trust.certificates += 1
        chosen += [0] * (lockstep.most(len(chosen)) - len(chosen))
        found = []
        try:
            explained = (
                taken_apart(samples.batch, n) if samples.is_leading and lockstep.is_alone else nullcontext()
            )
            with explained:
                found = [self._verification.alone(samples, sample) for sample in chosen]
            if is_blind and len(chosen) > 1:
                found.append(self._verification.among_copies(self._as_run(samples, trust), chosen[0]))
            if is_coupled:
                rest = [sample for sample in range(n) if sample not in chosen]
                rest += [0] * (lockstep.most(len(rest)) - len(rest))
                for sample in rest:
                    value = self._loss.losses(samples.take([sample]), 1)
                    # Without a graph it has no gradients, which is known as well as if they were computed.
                    found.append(Alone(sample, value.detach(), has_gradients=not value.requires_grad))
        except NotPerSampleError:
            if lockstep.is_alone:
                self._loss.losses(samples.batch, n, is_whole=True)  # fails as well, with the user's numbers
            raise
        return found

    def _plan(self, trace: Trace, trust: Trust, only: Iterable[str] | None = None) -> _Plan:
        """Find out where the samples are in what every parameter's gradients are read from.

        Args:
            trace: The forward pass.
            trust: What is known about its like.
            only: Parameters to be proven on this very batch; by default, those that need it.

        Returns:
            The layouts, and why there is none.
        """
        plan = _Plan()
        every = list(selections(trace.graph))
        moving = [found for found in every if not trust.keeps_samples(found, trace.n)]
        moved = below(trace.graph, moving)
        pending = []
        for name in self._chosen if only is None else only:
            known = None
            if name in trust.reasons:
                plan.reasons[name] = trust.reasons[name]
                continue
            if only is None and name in trust.reaches and not trust.may_couple:
                try:
                    reads = trace.reads(self._chosen[name], trust.reaches[name])
                    known = trust.layouts(name, reads, trace.n, moved)
                except NoRuleError:
                    known = None
            if known is None:
                pending.append(name)
            else:
                plan.layouts[name] = known
        joined = self._lockstep.names(pending)
        pending = [name for name in self._chosen if name in joined]
        if pending and trace.losses.requires_grad:
            proof = LayoutProof(trace, self._chosen, moving)
            for name, proven in proof.run(pending).items():
                if proven.error is None:
                    trust.learn(name, proven)
                    plan.layouts[name] = proven.layouts
                else:
                    plan.layouts.pop(name, None)
                    plan.reasons[name] = describe(proven.error)
                    self._refute(trust, name, plan.reasons[name], for_good=not moved)
            trust.learn_axes(proof.axes_kept)
        for name, layouts in plan.layouts.items():
            if name not in trust.evident and any(isinstance(read.what, RecordedCall) for read in layouts):
                plan.unseen.add(name)
        return plan

    def _refute(self, trust: Trust, name: str, why: str, *, for_good: bool) -> None:
        trust.refutations[name] += 1
        if for_good or trust.refutations[name] >= _REFUTATIONS:
            trust.reasons[name] = why
        trust.reaches.pop(name, None)
        trust.places.pop(name, None)
        trust.edges.clear()  # so that the next batch is compared with plain autograd

    def _run(
        self,
        trace: Trace,
        trust: Trust,
        plan: _Plan,
        alone: Sequence[Alone],
        tolerance: Tolerance,
        *,
        is_new: bool,
    ) -> dict[str, Exception]:
        def accumulate(name: str, term: PerSampleGradients) -> None:
            if not self._lockstep.is_alone and needs_graph(term):
                raise MismatchError("made of parameters that are not all gathered at once")
            try:
                is_evident = self._verification.check(name, term, alone, tolerance)
            except MismatchError:
                raise
            except Exception as error:  # of a function of parameters, say, that autograd differentiates once
                raise MismatchError(describe(error)) from error
            if is_evident:
                trust.evident.add(name)
            elif name in plan.unseen and name not in trust.evident:
                if term.is_zero():
                    return
                raise MismatchError("no sample that was checked had a gradient")
            if is_new and self._lockstep.is_alone:
                self._add_first(name, term)
            else:
                self._totals.add(name, term)

        if not trace.losses.requires_grad:
            return {}
        unseen = {
            name
            for name, layouts in plan.layouts.items()
            if not layouts
            if any(self._verification.has_gradient(name, found, tolerance) for found in alone)
        }
        unseen = self._lockstep.names(unseen)
        layouts = {name: of for name, of in plan.layouts.items() if name not in unseen}
        settle = None
        if isinstance(self._totals, SettledTotals):
            self._totals.begin(layouts)
            settle = self._totals.settle
        failures = FisherPass(trace, self._chosen, layouts, accumulate, settle).run()
        why = "the graph does not show where it is used"
        return failures | {name: NoRuleError(why) for name in unseen}

    def _add_again(
        self,
        samples: Samples,
        trust: Trust,
        names: Sequence[str],
        alone: Sequence[Alone],
        tolerance: Tolerance,
    ) -> dict[str, Exception]:
        # Nothing was added for these: prove how they are used now, and run the batch for them once more.
        with traced(self._loss, self._formatted(samples, trust), samples.n) as trace:
            plan = self._plan(trace, trust, names)
            failures = self._run(trace, trust, plan, alone, tolerance, is_new=True)
        return {name: MismatchError(why) for name, why in plan.reasons.items()} | failures

    def _add_first(self, name: str, term: PerSampleGradients) -> None:
        # An op that fails may have written half of what it had to add.
        self._totals.flush(name)
        total = self._fisher[name]
        before = total.clone() if name in self._how else None
        try:
            self._totals.add(name, term)
        except Exception as error:  # say, a dtype that no op takes
            total.zero_() if before is None else total.copy_(before)
            raise MismatchError(describe(error)) from error

    def _may_be_formatted(self, samples: Samples) -> bool:
        # On CPUs, channels-last order makes convolutions faster, and their patches contiguous.
        kinds = (nn.Conv2d, nn.ConvTranspose2d)
        return (
            samples.is_leading
            and self._lockstep.is_alone
            and samples.n > 1
            and self._loss.device.type == "cpu"
            and any(isinstance(module, kinds) for module in self._model.modules())
        )

    def _is_alike_formatted(self, samples: Samples, trust: Trust) -> bool:
        """See whether a batch has the same gradients in channels-last order.

        Args:
            samples: The batch.
            trust: Gets what is proven on the way.

        Returns:
            False also if the model cannot be run like that, or there is nothing to compare.
        """
        kept = _Kept(self._verification, range(min(samples.n, _FORMATTED)))
        given = samples.batch
        for batch, take in ((given, kept.add), (in_channels_last(given, samples.n), kept.compare)):
            try:
                with traced(self._loss, batch, samples.n) as trace:
                    tolerance = tolerance_of(self._loss, trace.losses, trace.graph)
                    if not trace.losses.requires_grad or not bool(torch.isfinite(trace.losses).all()):
                        return False
                    plan = self._plan(trace, trust)
                    failures = FisherPass(trace, self._chosen, plan.layouts, take).run()
            except Exception:  # views that only the usual order allows
                return False
            if failures:
                return False
        return kept.difference <= tolerance.gradient / 10

    def _fall_back(self, samples: Samples, reasons: Mapping[str, str]) -> Tensor:
        names = tuple(name for name in self._chosen if name in reasons)
        fallback = self._fallbacks.get(names)
        if fallback is None:
            chosen = {name: self._chosen[name] for name in names}
            fallback = self._fallbacks[names] = Fallback(self._loss, chosen, self._power)
        if isinstance(self._totals, SettledTotals):
            values = fallback.accumulate_in_lockstep(samples, self._totals)
        else:
            values = fallback.accumulate(samples, self._fisher)
        for name in names:
            self._how[name] = f"fallback: {reasons[name]}; {fallback.how}"
        return values

    def _add_on_their_own(self, samples: Samples) -> Tensor:
        self._has_run = self._is_used = self._has_mixed = True
        if not self._has_warned:
            warnings.warn(
                "fisher_diagonal: a sample on its own has another loss than in its batch: samples influence "
                "each other, the model is random in eval mode, or a tensor that the samples share is as long "
                "as the batch and was taken apart; the importances are those of samples on their own",
                stacklevel=5,
            )
            self._has_warned = True
        return self._fall_back(samples, dict.fromkeys(self._chosen, _MIXED))


class _Kept:
    """Projections of gradients in one order of memory, to be compared with those in another."""

    def __init__(self, verification: Verification, samples: Sequence[int]) -> None:
        self._verification, self._samples = verification, samples
        self._kept: dict[str, Tensor] = {}
        self._largest = 0.0
        self.difference = 0.0

    def add(self, name: str, term: PerSampleGradients) -> None:
        self._kept[name] = term.project(self._verification.onto(name), self._samples).double()
        self._largest = max(self._largest, float(self._kept[name].norm()))

    def compare(self, name: str, term: PerSampleGradients) -> None:
        own = self._kept.get(name)
        other = term.project(self._verification.onto(name), self._samples).double()
        own = torch.zeros_like(other) if own is None else own
        size = max(float(own.norm()), 1e-3 * self._largest)
        difference = float((other - own).norm()) / size if size else float(other.any())
        self.difference = max(self.difference, difference)


def check_parameters(chosen: Mapping[str, Tensor]) -> None:
    """Refuse parameters that the engine cannot read gradients of.

    Args:
        chosen: Parameter name to parameter.

    Raises:
        NotImplementedError: If one is sharded, or on the meta device.
    """
    # Where nobody has imported it, nothing is sharded.
    sharded = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    for name, parameter in chosen.items():
        if sharded is not None and isinstance(parameter, sharded):
            raise NotImplementedError(
                f"fisher_diagonal: {name} must be a plain tensor, got a DTensor (FSDP2 or tensor "
                "parallelism); compute the importances before the model is sharded"
            )
        if parameter.device.type == "meta":
            raise NotImplementedError(
                f"fisher_diagonal: {name} must be in memory, got a tensor on the meta device (offloaded, or "
                "not loaded yet); load the whole model onto one device"
            )
