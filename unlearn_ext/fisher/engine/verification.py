"""Plain autograd on single samples, and what it must agree with: losses, and projections of gradients."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unlearn_ext._internal.undo import handles
from unlearn_ext.fisher.engine.gradients import PerSampleGradients, Projection
from unlearn_ext.fisher.engine.graph import Graph
from unlearn_ext.fisher.engine.layout import MismatchError
from unlearn_ext.fisher.engine.proof import DISAGREES
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, Samples

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tolerance:
    """How far values may lie apart that are the same but for rounding.

    Attributes:
        gradient: Share of a parameter's gradient.
        rounding: Share of the largest gradient of all: what vanishes in exact arithmetic (key biases of
            attention) is rounding, and as large in proportion to that as the precision is.
        loss: Share of a loss, or of one if the loss is smaller.
        loose: The same for losses that were computed by other kernels.
    """

    gradient: float = 1e-3
    rounding: float = 1e-6
    loss: float = 2e-6
    loose: float = 1e-2


def tolerance_of(loss: PerSampleLoss, losses: Tensor, graph: Graph | None) -> Tolerance:
    """Choose tolerances by the precision that a pass has used.

    Args:
        loss: The model and its loss.
        losses: Some losses.
        graph: Their graph, in which a model may have used another precision than its parameters have.

    Returns:
        The tolerances.
    """
    is_half = loss.is_half or losses.dtype in _HALVES
    is_double = losses.dtype == torch.float64
    for node in graph.consumers if graph is not None else ():
        dtypes = {entry.dtype for entry in node._input_metadata}
        is_half = is_half or not dtypes.isdisjoint(_HALVES)
        is_double = is_double and torch.float32 not in dtypes
    if is_half:
        return Tolerance(gradient=0.15, rounding=3e-2, loss=3e-2, loose=0.1)
    if is_double:
        return Tolerance(gradient=1e-9, rounding=1e-12, loss=1e-11, loose=1e-6)
    if loss.device.type == "cpu":
        return Tolerance()
    # On CUDA, float32 convolutions may round to tf32, and not in the same way for all shapes.
    return Tolerance(gradient=1e-2, rounding=1e-5, loss=1e-4, loose=1e-2)


@dataclass
class Alone:
    """What plain autograd says of a sample on its own.

    Attributes:
        sample: Its number in the batch.
        loss: Its loss.
        projections: Parameter name to the projections of its gradient.
        size: The largest norm among them.
        strictness: Factor of the tolerance for gradients.
        has_gradients: Its gradients were looked at; projections are left out where they vanish.
    """

    sample: int
    loss: Tensor
    projections: dict[str, Tensor] = field(default_factory=dict)
    size: float = 0.0
    strictness: float = 1.0
    has_gradients: bool = True


class Verification:
    """Compares a batch with some of its samples on their own.

    Args:
        loss: The model and its loss.
        chosen: Parameter name to parameter.
    """

    def __init__(self, loss: PerSampleLoss, chosen: Mapping[str, Tensor]) -> None:
        self._loss, self._chosen = loss, chosen
        self._directions: dict[str, Projection] = {}

    def onto(self, name: str) -> Projection:
        """Return the directions that a parameter's gradients are projected onto.

        Args:
            name: The parameter.

        Returns:
            The same ones whenever it is asked for.
        """
        known = self._directions.get(name)
        if known is None:
            parameter = self._chosen[name]
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            seed = zlib.crc32(name.encode())
            known = Projection(parameter.shape, seed, parameter.device, wide)
            self._directions[name] = known
        return known

    def alone(self, samples: Samples, sample: int) -> Alone:
        """Run plain autograd on one sample.

        Args:
            samples: The batch.
            sample: Which one.

        Returns:
            Its loss and gradient.
        """
        value = self._loss.losses(samples.take([sample]), 1)
        return self._differentiated(Alone(sample, value.detach()), value)

    def among_copies(self, samples: Samples, sample: int) -> Alone:
        """Run plain autograd on one sample in a batch that holds nothing but copies of it.

        The same kernels run as for the whole batch, and round alike. So the comparison may be strict: what
        differs is the influence of the other samples.

        Args:
            samples: The batch.
            sample: Which one.

        Returns:
            Its loss and gradient.
        """
        values = self._loss.losses(samples.take([sample] * samples.n), samples.n)
        value = values[sample : sample + 1]
        return self._differentiated(Alone(sample, value.detach(), strictness=0.02), value)

    def _differentiated(self, found: Alone, value: Tensor) -> Alone:
        if not value.requires_grad:
            return found
        if self._loss.lockstep.is_alone:
            self._differentiate(found, value)
        else:

            def take(name: str, grad: Tensor) -> None:
                self._project(found, name, grad)

            self._loss.lockstep.gradients(value.sum(), take, (), None)
        sizes = [float(torch.linalg.vector_norm(p.double())) for p in found.projections.values()]
        found.size = max(sizes, default=0.0)
        return found

    def _differentiate(self, found: Alone, value: Tensor) -> None:
        with handles() as hooks:
            for name, parameter in self._chosen.items():
                hook = functools.partial(self._project, found, name)
                hooks.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
            grads = torch.autograd.grad(value.sum(), list(self._chosen.values()), allow_unused=True)
            for name, grad in zip(self._chosen, grads, strict=True):
                if grad is not None and grad.layout is not torch.strided:
                    self._project(found, name, grad.to_dense())

    def _project(self, found: Alone, name: str, grad: Tensor | None) -> Tensor | None:
        # A backward function that answers None (of int8 layers, or the user's) gives hooks None.
        if grad is None or grad.layout is not torch.strided:
            return None
        with torch.no_grad():
            found.projections[name] = self.onto(name).of(grad.unsqueeze(0))[0]
            # Zeros without memory take its place, so that one gradient at a time is held.
            return grad.new_zeros(()).expand_as(grad)

    def check(
        self, name: str, term: PerSampleGradients, alone: Iterable[Alone], tolerance: Tolerance
    ) -> bool:
        """Compare gradients that a pass implies with plain ones.

        Args:
            name: The parameter.
            term: Its gradients.
            alone: Some samples on their own.
            tolerance: How far they may lie apart.

        Returns:
            True if there was a gradient to compare.

        Raises:
            MismatchError: If they disagree.
        """
        has_some = False
        for found in alone:
            implied = term.project(self.onto(name), [found.sample])[0].double()
            plain = found.projections.get(name)
            expected = torch.zeros_like(implied) if plain is None else plain.double()
            size = float(torch.linalg.vector_norm(expected))
            error = float(torch.linalg.vector_norm(implied - expected))
            if not error <= found.strictness * tolerance.gradient * size + tolerance.rounding * found.size:
                raise MismatchError(DISAGREES)
            has_some |= size > 10 * tolerance.rounding * found.size
        return has_some

    def has_gradient(self, name: str, found: Alone, tolerance: Tolerance) -> bool:
        """Say whether a sample on its own has a gradient of a parameter.

        Args:
            name: The parameter.
            found: The sample.
            tolerance: What counts as rounding.

        Returns:
            False if it vanishes.
        """
        plain = found.projections.get(name)
        return plain is not None and float(plain.double().norm()) > tolerance.rounding * found.size

    def is_apart(
        self, samples: Samples, losses: Tensor, alone: Sequence[Alone], tolerance: Tolerance
    ) -> bool:
        """Say whether samples have the losses in their batch that they have on their own.

        Args:
            samples: The batch.
            losses: Its losses.
            alone: Some samples on their own.
            tolerance: How far they may lie apart.

        Returns:
            False if they influence each other.
        """
        every = [self._is_apart(samples, losses, found, tolerance) for found in alone]
        return self._loss.lockstep.all(all(every))

    def _is_apart(self, samples: Samples, losses: Tensor, found: Alone, tolerance: Tolerance) -> bool:
        here, there = float(losses[found.sample]), float(found.loss.reshape(()))
        size = max(1.0, abs(here))
        difference = abs(here - there)
        is_same = difference <= tolerance.loss * size
        may_be_rounding = not is_same and difference <= tolerance.loose * size
        if not self._loss.lockstep.any(may_be_rounding):
            return is_same
        # Other sizes of a batch mean other kernels, which round otherwise. A batch of the same size that
        # holds nothing but this sample runs the same ones: what differs then is the others' influence.
        company = self._loss.losses(samples.take([found.sample] * samples.n), samples.n).detach()
        if not may_be_rounding:  # another rank has asked for it
            return is_same
        # Wherever in the batch it stands, since places may matter as well.
        farthest = float((company - company[found.sample]).abs().max())
        influence = max(abs(here - float(company[found.sample])), farthest)
        # The logits, which may be large where the loss is small, have rounded alike.
        return influence <= tolerance.loss * size or influence <= 0.1 * difference
