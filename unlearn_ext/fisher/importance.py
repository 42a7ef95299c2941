"""Importances of a model's parameters on a data set, as a mapping that can be pooled, stored and loaded."""

from __future__ import annotations

import json
import operator
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import is_dtensor, largest_of, local_of, sharded_like, totals, whole_of
from unlearn_ext._internal.files import FileKind
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext._internal.names import parameters_by_name, plain_name, with_plain_names
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.fisher.engine import register_layer as register_layer
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.infer import INFERRED
from unlearn_ext.tasks.losses import cross_entropy, log_odds, logit_norm

Estimator: TypeAlias = Literal["per_sample", "batch", "mc"]

ESTIMATORS: tuple[Estimator, ...] = ("per_sample", "batch", "mc")

# Share of a value that sums of float32 may be wrong by.
_ROUNDING = 1e-4

_FILE = FileKind(
    "unlearn_ext.importance.1",
    owner="Importance",
    contents="importances",
    instance="saved importances",
    facts=("importance",),
)


class Importance(Mapping[str, Tensor]):
    """Importances of a model's parameters on one data set, with what is needed to combine them.

    A mapping from parameter names to non-negative tensors, float32 (float64 for double parameters). Two of
    them can be pooled with ``+`` and one taken out of the other with ``-``, as if they had been computed on
    the union or the difference of the data sets. The tensors are shared, not copied.

    Attributes:
        n_samples: Number of samples they are a mean over.
        estimator: ``"per_sample"``, ``"batch"`` or ``"mc"``.
        power: 2 for squared gradients, 1 for absolute values.
        batch_size: Samples in the largest batch; decides the values of the ``"batch"`` estimator only.
        n_batches: Number of batches.
        coverage: Parameter name to how its values were computed: ``"fused"`` or ``"fallback: why"``.
        loss: Full name of the loss; None where it is not known.
        weights_digest: Tells with which weights they were computed (``weights_fingerprint`` of the model);
            None where that is not known. Set it to None to have it overlooked.

    Names of parameters are those that the model has without a wrapper: ``torch.compile`` and the like do not
    matter, in looking up either.

    Example:
        >>> a = Importance.from_dict({"weight": torch.tensor([1.0, 3.0])}, n_samples=30)
        >>> b = Importance.from_dict({"weight": torch.tensor([5.0, 3.0])}, n_samples=10)
        >>> (a + b)["weight"], (a + b).n_samples
        (tensor([2., 3.]), 40)
        >>> ((a + b) - b)["weight"]
        tensor([1., 3.])
    """

    __slots__ = (
        "_tensors",
        "batch_size",
        "coverage",
        "estimator",
        "loss",
        "n_batches",
        "n_samples",
        "power",
        "weights_digest",
    )

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        n_samples: int,
        estimator: Estimator,
        power: int,
        batch_size: int,
        n_batches: int,
        coverage: Mapping[str, str],
        loss: str | None = None,
        weights_digest: str | None = None,
    ) -> None:
        self._tensors = with_plain_names(tensors)
        self.n_samples = n_samples
        self.estimator = estimator
        self.power = power
        self.batch_size = batch_size
        self.n_batches = n_batches
        self.coverage = with_plain_names(coverage)
        self.loss = loss
        self.weights_digest = weights_digest

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, Tensor],
        n_samples: int,
        *,
        estimator: Estimator = "per_sample",
        power: int = 2,
        batch_size: int = 1,
        n_batches: int | None = None,
        loss: str | None = None,
        weights_digest: str | None = None,
    ) -> Importance:
        """Take importances computed elsewhere.

        Args:
            tensors: Parameter name to importances, float32 or float64, non-negative; a mean over the samples
                (over the batches for ``"batch"``), not a sum.
            n_samples: Number of samples they were computed on, >= 1.
            estimator: What they are; see ``fisher_diagonal``.
            power: 2 for squares, 1 for absolute values.
            batch_size: Samples in the largest batch.
            n_batches: Number of batches; by default ``n_samples / batch_size``, rounded up.
            loss: Full name of the loss, if it is to be compared with others'.
            weights_digest: Of the weights, likewise.

        Returns:
            The importances; the tensors are shared, not copied.

        Raises:
            ValueError: If a count is not positive, a value is negative, or there is no tensor.
            TypeError: If a value is not a float32 or float64 tensor, or a count is not whole.
        """
        check_estimator("Importance.from_dict", estimator, power)
        n_samples, batch_size = _count("n_samples", n_samples), _count("batch_size", batch_size)
        n_batches = -(-n_samples // batch_size) if n_batches is None else _count("n_batches", n_batches)
        if not tensors:
            raise ValueError("Importance.from_dict: tensors must name at least one parameter, got none")
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"Importance.from_dict: {name} must be float32 or float64, got {kind}")
            if bool((tensor < 0).any()):
                raise ValueError(
                    f"Importance.from_dict: {name} must be non-negative, got {tensor.min().item()}"
                )
        return cls(
            {name: tensor.detach() for name, tensor in tensors.items()},
            n_samples=n_samples,
            estimator=estimator,
            power=power,
            batch_size=batch_size,
            n_batches=n_batches,
            coverage=dict.fromkeys(tensors, "fallback: computed elsewhere"),
            loss=loss,
            weights_digest=weights_digest,
        )

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name if name in self._tensors else plain_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Importance({len(self)} parameters, n_samples={self.n_samples}, estimator={self.estimator!r}, "
            f"power={self.power}, batch_size={self.batch_size}, n_batches={self.n_batches})"
        )

    def __add__(self, other: Importance) -> Importance:
        """Pool two data sets.

        Args:
            other: Importances of the same kind on other samples.

        Returns:
            The mean over both data sets, weighted by samples; by batches for the ``"batch"`` estimator.

        Raises:
            ValueError: If estimators, powers, losses, weights or parameters differ, or the batch sizes of
                ``"batch"`` do.
        """
        if not isinstance(other, Importance):
            return NotImplemented
        check_same_kind("Importance +", self, other, same_weights=True)
        if self.estimator == "batch" and self.batch_size != other.batch_size:
            raise ValueError(
                f"Importance +: batch sizes must agree for the 'batch' estimator, got {self.batch_size} and "
                f"{other.batch_size}"
            )
        return pool(self, other)

    def __sub__(self, other: Importance) -> Importance:
        """Remove a part of the data set; no value falls below 0.

        The whole is no smaller than its part. What comes out below 0 by more than rounding is set to 0 as
        well, and counted in a warning: the part was measured on other samples, or on other draws of them.

        Args:
            other: Importances of the same kind on some of this data set's samples.

        Returns:
            The mean over the samples that remain.

        Raises:
            ValueError: If estimators, powers, losses, weights or parameters differ, no sample would remain,
                or the estimator is ``"batch"``, where no batch belongs to either part alone.
        """
        if not isinstance(other, Importance):
            return NotImplemented
        check_same_kind("Importance -", self, other, same_weights=True)
        if self.estimator == "batch":
            raise ValueError(
                "Importance -: the 'batch' estimator has no difference, its batches mix the samples"
            )
        remaining = self.n_samples - other.n_samples
        if remaining < 1:
            raise ValueError(
                f"Importance -: the part must be smaller than the whole, got {other.n_samples} of "
                f"{self.n_samples} samples"
            )
        share = self.n_samples / remaining
        rest: dict[str, Tensor] = {}
        below: dict[str, int] = {}
        for name, tensor in self.items():
            left = share * tensor - (share - 1) * other[name].to(tensor.device)
            if n_below := int((local_of(left) < -_ROUNDING * share * local_of(tensor)).sum()):
                below[name] = n_below
            rest[name] = left.clamp_(min=0)
        if below:
            total = sum(local_of(tensor).numel() for tensor in self.values())
            warnings.warn(
                f"Importance -: {sum(below.values())} of {total} values came out below 0 and were set to 0, "
                f"most of them in {max(below, key=lambda name: below[name])}: the part is not of this whole, "
                "or was measured with other random numbers",
                stacklevel=2,
            )
        return Importance(
            rest,
            n_samples=remaining,
            estimator=self.estimator,
            power=self.power,
            batch_size=self.batch_size,
            n_batches=max(1, self.n_batches - other.n_batches),
            coverage=joined_coverage(self.coverage, other.coverage),
            loss=_common(self.loss, other.loss),
            weights_digest=_common(self.weights_digest, other.weights_digest),
        )

    @property
    def is_sharded(self) -> bool:
        """Whether every rank holds its part of the tensors only."""
        return any(is_dtensor(tensor) for tensor in self._tensors.values())

    def gathered(self) -> Importance:
        """Gather the tensors of a sharded model's importances on every rank, which call it together.

        Returns:
            The same with whole tensors, which must fit into every rank's memory.
        """
        return self.with_tensors({name: whole_of(tensor) for name, tensor in self.items()})

    @classmethod
    def like(cls, model: nn.Module, params: Iterable[str] | None = None) -> Importance:
        """Make zeros to load a checkpoint into, laid out like a model's parameters.

        Args:
            model: The model, sharded or not.
            params: Names of parameters; all that are trainable by default.

        Returns:
            Importances of no sample, for ``torch.distributed.checkpoint.load({"importance": ...})``.

        Example:
            >>> Importance.like(nn.Linear(2, 1)).n_samples
            0
        """
        wanted = None if params is None else {plain_name(name) for name in params}
        tensors = {
            name: torch.zeros_like(
                parameter.detach(), dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32
            )
            for name, parameter in parameters_by_name(model).items()
            if (parameter.requires_grad if wanted is None else name in wanted)
        }
        coverage = dict.fromkeys(tensors, "fallback: not loaded yet")
        return cls(
            tensors,
            n_samples=0,
            estimator="per_sample",
            power=2,
            batch_size=0,
            n_batches=0,
            coverage=coverage,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything, for ``torch.distributed.checkpoint``.

        Returns:
            ``"tensors"``, which share memory with this, and ``"facts"``, as JSON.

        Example:
            >>> importance = Importance.from_dict({"weight": torch.ones(2)}, n_samples=3)
            >>> other = Importance.from_dict({"weight": torch.zeros(2)}, n_samples=1)
            >>> other.load_state_dict(importance.state_dict())
            >>> other.n_samples, other["weight"]
            (3, tensor([1., 1.]))
        """
        return {"tensors": dict(self._tensors), "facts": json.dumps(self._facts())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` has returned, perhaps of other ranks and read from a checkpoint.

        Args:
            state: The state; tensors are copied into those that are here, or are those.

        Raises:
            ValueError: If it has other parameters or shapes, or impossible facts; nothing is taken over then.
        """
        tensors, facts = state["tensors"], json.loads(state["facts"])
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {name: list(tensor.shape) for name, tensor in self.items()}:
            raise ValueError(
                f"Importance.load_state_dict: state must have the parameters {sorted(self)}, got "
                f"{sorted(tensors)}, or other shapes"
            )
        if facts.keys() != self._facts().keys():
            raise ValueError(
                f"Importance.load_state_dict: state must have the facts {sorted(self._facts())}, got "
                f"{sorted(facts)}"
            )
        try:
            _check_facts(facts)
        except ValueError as error:
            raise ValueError(f"Importance.load_state_dict: {error}") from None
        for name, tensor in self.items():
            given = tensors[name]
            if given is not tensor:
                local_of(tensor).copy_(local_of(sharded_like(given, tensor)))
        for name in self._facts():
            setattr(self, name, facts[name])

    def _facts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__ if name != "_tensors"}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Importance:
        """Return other tensors with the same facts: the same importances in another place or layout.

        Args:
            tensors: Parameter name to importances.

        Returns:
            The importances.
        """
        return Importance(tensors, **self._facts())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a failure leaves the old file, if any, as it was.

        Importances of a sharded model go to ``torch.distributed.checkpoint``, where every rank writes its
        part: ``save({"importance": importance}, checkpoint_id=path)``; ``load`` reads them into
        ``Importance.like(model)``, on any number of ranks.

        Args:
            path: The file.

        Raises:
            ImportError: If safetensors is not installed.
            NotImplementedError: If the tensors are sharded.
        """
        if self.is_sharded:
            raise NotImplementedError(
                "Importance.save: tensors must be whole, got sharded ones; use torch.distributed.checkpoint."
                "save({'importance': importance}, checkpoint_id=path) on all ranks, or save gathered() on one"
            )
        _FILE.save(path, self, {"importance": json.dumps(self._facts())})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Importance:
        """Read what ``save`` has written.

        Args:
            path: The file.
            device: Where to put the tensors.

        Returns:
            The importances.

        Raises:
            ImportError: If safetensors is not installed.
            ValueError: If the file holds something else.
        """
        tensors, facts = _FILE.load(path)
        with _FILE.understood(path):
            meta = json.loads(facts["importance"])
            _check_facts(meta)
            return cls({name: tensors[name].to(device) for name in meta["coverage"]}, **meta)


def _count(name: str, count: int) -> int:
    # Plain ints: JSON cannot hold those of NumPy, and files with bools are refused.
    try:
        number = int(operator.index(count))
    except TypeError:
        raise TypeError(f"Importance.from_dict: {name} must be a whole number, got {count!r}") from None
    if number < 1:
        raise ValueError(f"Importance.from_dict: {name} must be at least 1, got {number}")
    return number


def _check_facts(facts: Mapping[str, Any]) -> None:
    # Files of earlier versions have no digest, and others can write one.
    check_estimator("facts", facts["estimator"], facts["power"])
    for name in ("n_samples", "batch_size", "n_batches"):
        if type(facts[name]) is not int or facts[name] < 0:
            raise ValueError(f"{name} must be a number of 0 or more, got {facts[name]!r}")
    for name in ("loss", "weights_digest"):
        if not isinstance(facts.get(name), str | None):
            raise ValueError(f"{name} must be a text, got {facts[name]!r}")


def check_estimator(who: str, estimator: str, power: int) -> None:
    """Refuse what is no kind of importance.

    Args:
        who: For the message.
        estimator: One of ``ESTIMATORS``.
        power: 1 or 2.

    Raises:
        ValueError: If it is something else.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"{who}: estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if power not in (1, 2):
        raise ValueError(f"{who}: power must be 1 or 2, got {power}")


def loss_name(task: Task) -> str:
    """Name the loss of a task, so that importances of other losses can be told.

    Args:
        task: The task, perhaps with a loss of the user's.

    Returns:
        The full name of the user's function; ``unlearn_ext.losses.cross_entropy``, ``log_odds`` or
        ``logit_norm`` where it is the same for any task of one label in many; else the task itself.

    Example:
        >>> from unlearn_ext.tasks import Classification, Regression
        >>> loss_name(Classification()), loss_name(Regression())
        ('unlearn_ext.losses.cross_entropy', 'Regression()')
    """
    given = task.loss_fn
    if given is None:
        return (
            callable_name(cross_entropy) if task is INFERRED or isinstance(task, Categorical) else repr(task)
        )
    if getattr(given, "__func__", None) is Task.odds_loss:
        return callable_name(log_odds)
    is_norm = type(given).__name__ == "_LogitNorm" and type(given).__module__ == logit_norm.__module__
    return callable_name(logit_norm if is_norm else given)


def check_same_kind(who: str, a: Importance, b: Importance, *, same_weights: bool = False) -> None:
    """Refuse importances that mean different things.

    Args:
        who: Whose message it is.
        a: Importances.
        b: Importances.
        same_weights: Refuse also what was computed with other weights.

    Raises:
        ValueError: If estimators, powers, parameter names or shapes differ, or losses or weights are known of
            both and differ.
    """
    for what in ("estimator", "power"):
        if getattr(a, what) != getattr(b, what):
            raise ValueError(f"{who}: {what} must agree, got {getattr(a, what)!r} and {getattr(b, what)!r}")
    if None not in (a.loss, b.loss) and a.loss != b.loss:
        raise ValueError(
            f"{who}: the losses must agree, got {a.loss} and {b.loss}; compute both with the same loss_fn"
        )
    digests = (a.weights_digest, b.weights_digest)
    if same_weights and None not in digests and len(set(digests)) > 1:
        raise ValueError(
            f"{who}: the weights that importances are computed with must agree, got {digests[0]} "
            f"and {digests[1]}; compute both again on the model as it is, or set a weights_digest to None"
        )
    for name in sorted(a.keys() ^ b.keys()):
        raise ValueError(f"{who}: parameters must agree, got {name!r} on one side only")
    for name, tensor in a.items():
        if tensor.shape != b[name].shape:
            raise ValueError(
                f"{who}: shapes must agree, got {list(tensor.shape)} and {list(b[name].shape)} for {name!r}"
            )


def check_weights(who: str, importance: Importance, model: nn.Module) -> None:
    """Refuse importances that were computed with other weights than the model has.

    Args:
        who: Whose message it is.
        importance: Importances; such of unknown weights pass.
        model: The model that they are to be used for.

    Raises:
        ValueError: If the weights are known, and differ.
    """
    known = importance.weights_digest
    if known is not None and known != (now := weights_fingerprint(model)):
        raise ValueError(
            f"{who}: importances must be those of the model's weights, got importances of weights {known} "
            f"for a model with {now} (trained on, unlearned or converted since?); compute them again, or set "
            "weights_digest to None to use them all the same"
        )


# Rounding of sums in another order; and what cancellation in half precision leaves where a gradient is 0, as
# a share of the tensor's largest value.
_RELATIVE, _ABSOLUTE = 0.05, 1e-4


def check_covers(who: str, full: Importance, forget: Importance) -> None:
    """Refuse importances for the full set that cannot have been computed with the forget set in it.

    A sum over a data set is at least the sum over a part of it: n F_full >= n_forget F_forget, for every
    scalar. Where importances of the retain set are passed for the full set this does not hold for what
    matters to the forget set. Drawn targets (``"mc"``) and gradients of batches (``"batch"``) follow no such
    rule; of these only the number of samples is compared.

    Args:
        who: Whose message it is.
        full: Importances said to be those of the full set.
        forget: Importances of a part of it.

    Raises:
        ValueError: If there are fewer samples than in the part, or any scalar breaks the rule beyond
            rounding; the message has the share of those that do.
    """
    what = "importances of the full set must cover the forget set"
    if full.n_samples < forget.n_samples:
        raise ValueError(f"{who}: {what}, got {full.n_samples} samples for {forget.n_samples} to forget")
    if full.estimator != "per_sample" or forget.estimator != "per_sample":
        return
    names = [name for name, whole in full.items() if name in forget and whole.numel()]
    largest = largest_of([full[name] for name in names])
    numbers = []
    for name, most in zip(names, largest, strict=True):
        bound = local_of(full[name]) * full.n_samples
        allowed = bound * (1 + _RELATIVE) + _ABSOLUTE * most * full.n_samples
        part = local_of(forget[name]).to(device=bound.device, dtype=bound.dtype) * forget.n_samples
        numbers.append(int((part > allowed).sum()))
    broken = sum(totals(numbers, [full[name] for name in names]))
    total = sum(full[name].numel() for name in names)
    if broken:
        raise ValueError(
            f"{who}: {what}, got {broken / total:.2%} of the scalars with F_forget > (n / n_forget) F_full; "
            "importances of the retain set are passed as retain, or added to the forget set's"
        )


def _common(a: str | None, b: str | None) -> str | None:
    return a if a == b else None


def pool(a: Importance, b: Importance, *, into: bool = False) -> Importance:
    """Pool importances of one kind without asking for equal batch sizes; ``+`` is the checked form.

    Args:
        a: Importances.
        b: Importances of the same kind, of other samples.
        into: Use the tensors of ``b`` up for the result, which are then no longer its own.

    Returns:
        Their mean, weighted by samples; by batches for the ``"batch"`` estimator.
    """
    weights = (a.n_batches, b.n_batches) if a.estimator == "batch" else (a.n_samples, b.n_samples)
    share = weights[0] / sum(weights)

    def pooled(name: str, tensor: Tensor) -> Tensor:
        other = b[name].to(tensor.device)
        rest = other.mul_(1 - share) if into and other.dtype == tensor.dtype else (1 - share) * other
        return rest.add_(share * tensor) if into else share * tensor + rest

    return Importance(
        {name: pooled(name, tensor) for name, tensor in a.items()},
        n_samples=a.n_samples + b.n_samples,
        estimator=a.estimator,
        power=a.power,
        batch_size=max(a.batch_size, b.batch_size),
        n_batches=a.n_batches + b.n_batches,
        coverage=joined_coverage(a.coverage, b.coverage),
        loss=_common(a.loss, b.loss),
        weights_digest=_common(a.weights_digest, b.weights_digest),
    )


def joined_coverage(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Say how values were computed that are made of two parts.

    Args:
        a: Parameter name to how.
        b: The same of the other part.

    Returns:
        The same of both: "fused" where both are.
    """
    joined = {}
    for name, how in a.items():
        other = b[name]
        parts = dict.fromkeys(
            part
            for text in (how, other)
            if text != "fused"
            for part in text.removeprefix("fallback: ").split("; ")
        )
        joined[name] = how if how == other else "fallback: " + "; ".join(parts)
    return joined
