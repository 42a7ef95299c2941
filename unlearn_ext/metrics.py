"""Measures of what a model still knows, and of how close it is to one that never saw the forget set.

Every measure runs the model in eval mode and leaves it as it was. None of them proves that data have been
forgotten: they compare, and most of them mean something only beside a retrained model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext import losses
from unlearn_ext.data import (
    Batch,
    Batches,
    check_batches,
    device_of,
    logits,
    read_batches,
    scores_and_labels,
)
from unlearn_ext.state import borrowed

_Numbers: TypeAlias = npt.NDArray[np.float64]

Convention: TypeAlias = Literal["ssd", "salun", "scrub"]
CONVENTIONS: tuple[Convention, ...] = ("ssd", "salun", "scrub")


class Interval(NamedTuple):
    """A 95 % bootstrap interval.

    Attributes:
        low: 2.5 % quantile.
        high: 97.5 % quantile.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Attack:
    """What a membership inference attack made of a model; see ``mia``.

    Attributes:
        convention: Whose definition ``score`` follows.
        score: The convention's number, in [0, 1].
        ideal: What ``score`` would be for a perfectly unlearned model: ``"retrained"`` (that model's score)
            or a number.
        auc: Area under the ROC curve of telling forget samples (positive) from test samples by their loss:
            0.5 is chance; below it, forget samples have *higher* losses than unseen ones.
        auc_interval: Bootstrap interval of ``auc``.
        tpr: Share of the forget samples recognised at a threshold that 1 % of the test samples pass.
        tpr_interval: Bootstrap interval of ``tpr``.
        reference_score: ``score`` of the retrained model, if one was given.
        reference_auc: ``auc`` of the retrained model, if one was given.
    """

    convention: Convention
    score: float
    ideal: str | float
    auc: float
    auc_interval: Interval
    tpr: float
    tpr_interval: Interval
    reference_score: float | None = None
    reference_auc: float | None = None

    @property
    def verdict(self) -> str:
        """Say on which side of the retrained model this one lies.

        ``"no reference"``, ``"like the reference"`` (its AUC lies in the interval), ``"still recognised"``
        (forget samples are easier to tell as members) or ``"over-unlearned"`` (they stand out as the
        opposite of members, which gives them away just as well).
        """
        if self.reference_auc is None:
            return "no reference"
        if self.auc_interval.low <= self.reference_auc <= self.auc_interval.high:
            return "like the reference"
        return "still recognised" if self.auc > self.reference_auc else "over-unlearned"


def accuracy(model: nn.Module, data: Batches, *, shift: bool | None = None, progress: bool = False) -> float:
    """Return the share of labels that the model predicts.

    Correct over total, not a mean over batches. Where a sample has a label per position (language models,
    segmentation) every position counts; positions with a negative label are left out.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with integer labels.
        shift: As in ``losses.cross_entropy``: whether position ``t`` predicts the label of position ``t +
            1``.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no label to predict.

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    correct = total = 0
    with borrowed(model), torch.no_grad():
        for batch in read_batches(
            check_batches(data), device_of(model), description="accuracy", progress=progress
        ):
            scores, labels = scores_and_labels(model, batch, shift=shift)
            counted = labels >= 0
            correct += int(((scores.argmax(-1) == labels) & counted).sum())
            total += int(counted.sum())
    if total == 0:
        raise ValueError("accuracy: data must hold at least one label, got none")
    return correct / total


def mia(
    model: nn.Module,
    retain: Batches,
    forget: Batches,
    test: Batches,
    convention: Convention = "ssd",
    *,
    reference: nn.Module | None = None,
    shift: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Attack:
    """Attack a model by membership inference: can forget samples be told as members of the training set?

    ``score`` is one of three published numbers, which are not comparable with each other:

        ssd     logistic regression (balanced classes) on the entropy of the prediction, fitted on retain
                (member) against test; share of the forget set told as members. A retrained model's score is
                what to aim for; lower is not better.
        salun   support vector machine (RBF, C = 3) on the probability of the label, fitted on as many retain
                samples as there are test samples (members) against test; share of the forget set told as
                *non*-members. Again the retrained model's score is the aim.
        scrub   logistic regression on the loss, forget against test samples, accuracy over five stratified
                folds; 0.5 is ideal. For class forgetting give the test samples of that class only.

    ``auc`` and ``tpr`` do not depend on the convention: they are those of the plain attack by loss, forget
    against test. Over-unlearning shows as an ``auc`` below the reference's; see ``Attack.verdict``.

    Args:
        model: The unlearned model.
        retain: Training samples that were kept.
        forget: Training samples that were to be forgotten.
        test: Samples that no model was trained on.
        convention: Whose definition ``score`` follows.
        reference: A model retrained without the forget set.
        shift: As in ``losses.cross_entropy``.
        bootstrap: Resamples behind the intervals; 0 for none (NaN).
        seed: Of the resamples, the choice of retain samples and the folds.

    Returns:
        The outcome.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the convention is unknown, or a set is empty or too small for the convention.

    Source:
        ssd: code released with Foster, Schoepf & Brintrup, AAAI 2024; salun: Fan et al., ICLR 2024; scrub:
        Kurmanji et al., NeurIPS 2023. TPR at 1 % FPR: Carlini et al., "Membership Inference Attacks From
        First Principles", S&P 2022.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"mia: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    sets = {"retain": retain, "forget": forget, "test": test}

    def measured(subject: nn.Module) -> tuple[float, dict[str, _Features]]:
        features = {name: _features(subject, data, name, shift) for name, data in sets.items()}
        return _SCORES[convention](features["retain"], features["forget"], features["test"], seed), features

    score, features = measured(model)
    members, others = -features["forget"].loss, -features["test"].loss
    auc, tpr = _auc(members, others), _tpr(members, others)
    draws = np.random.default_rng(seed)
    resampled = np.array(
        [
            (_auc(a, b), _tpr(a, b))
            for a, b in (
                (draws.choice(members, len(members)), draws.choice(others, len(others)))
                for _ in range(bootstrap)
            )
        ]
    ).reshape(-1, 2)
    bounds = np.quantile(resampled, [0.025, 0.975], axis=0) if bootstrap else np.full((2, 2), math.nan)
    reference_score = reference_auc = None
    if reference is not None:
        reference_score, compared = measured(reference)
        reference_auc = _auc(-compared["forget"].loss, -compared["test"].loss)
    return Attack(
        convention=convention,
        score=score,
        ideal=0.5 if convention == "scrub" else "retrained",
        auc=auc,
        auc_interval=Interval(float(bounds[0, 0]), float(bounds[1, 0])),
        tpr=tpr,
        tpr_interval=Interval(float(bounds[0, 1]), float(bounds[1, 1])),
        reference_score=reference_score,
        reference_auc=reference_auc,
    )


def zrf(
    model: nn.Module,
    incompetent: nn.Module,
    data: Batches,
    convention: Literal["paper", "release"] = "paper",
) -> float:
    """Return the zero retrain forgetting score: how close predictions are to those of an untrained model.

        paper     1 - mean JS(model, incompetent), in bits: 1 is the same, 0 has nothing in common
        release   1 - mean over samples *and classes* of (KL(m || p) + KL(m || q)) / 2, in nats: what the
                  published code computes; near 1 whatever the models do, and not comparable between
                  different numbers of classes

    Args:
        model: The unlearned model.
        incompetent: A randomly initialised model of the same outputs.
        data: The forget set.
        convention: Which of the two.

    Returns:
        The score, in [0, 1] for ``"paper"``.

    Raises:
        ValueError: If ``data`` is empty or the convention is unknown.

    Source:
        Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023.
    """
    if convention not in ("paper", "release"):
        raise ValueError(f"zrf: convention must be paper or release, got {convention!r}")
    if convention == "paper":
        return 1 - js_divergence(model, incompetent, data)

    def reversed_divergence(p: Tensor, q: Tensor) -> Tensor:
        mixed = (p + q) / 2
        return (_divergence(mixed, p) + _divergence(mixed, q)) / (2 * p.shape[-1])

    return 1 - _mean_over_positions("zrf", model, incompetent, data, reversed_divergence)


def js_divergence(model: nn.Module, reference: nn.Module, data: Batches) -> float:
    """Return the mean Jensen-Shannon divergence of two models' predictions, in bits.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them.

    Returns:
        A number in [0, 1]; 0 for equal predictions.

    Raises:
        ValueError: If ``data`` is empty.

    Example:
        >>> certain, other = [(torch.tensor([[30.0, 0.0]]),)], nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = other.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> round(js_divergence(nn.Identity(), other, certain), 3)
        1.0
    """

    def bits(p: Tensor, q: Tensor) -> Tensor:
        mixed = (p + q) / 2
        return (_divergence(p, mixed) + _divergence(q, mixed)) / (2 * math.log(2))

    return _mean_over_positions("js_divergence", model, reference, data, bits)


def activation_distance(model: nn.Module, reference: nn.Module, data: Batches) -> float:
    """Return the mean Euclidean distance of two models' predicted probabilities.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them.

    Returns:
        A number in [0, sqrt(2)].

    Raises:
        ValueError: If ``data`` is empty.

    Source:
        Golatkar, Achille & Soatto, "Forgetting Outside the Box", ECCV 2020.
    """
    return _mean_over_positions(
        "activation_distance", model, reference, data, lambda p, q: (p - q).square().sum(-1).sqrt()
    )


def layer_distance(model: nn.Module, reference: nn.Module, *, relative: bool = True) -> dict[str, float]:
    """Return how far every parameter has moved from a reference.

    Args:
        model: A model.
        reference: One of the same parameters: the original, or the retrained one.
        relative: Divide by the reference's norm.

    Returns:
        Parameter name to Euclidean distance; where the reference is zero, the relative one is 0 or infinite.

    Raises:
        ValueError: If the parameters differ in name or shape.

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> with torch.no_grad():
        ...     _ = a.weight.fill_(3.0), b.weight.fill_(2.0), a.bias.fill_(1.0), b.bias.fill_(1.0)
        >>> layer_distance(a, b)
        {'weight': 0.5, 'bias': 0.0}
    """
    ours, theirs = dict(model.named_parameters()), dict(reference.named_parameters())
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("layer_distance: model and reference must have the same parameters")
    distances = {}
    with torch.no_grad():
        for name, p in ours.items():
            other = theirs[name].to(p.device).double()
            distance, norm = float((p.double() - other).norm()), float(other.norm())
            distances[name] = distance if not relative or distance == 0 else _ratio(distance, norm)
    return distances


def relearn_steps(
    model: nn.Module,
    data: Batches,
    target: float,
    *,
    evaluate: Batches | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    loss_fn: Callable[[nn.Module, Batch], Tensor] = losses.cross_entropy,
    every: int = 1,
    most: int = 1000,
    seed: int = 0,
) -> float:
    """Count the steps of training after which a copy of the model knows something again.

    Args:
        model: The unlearned model; a copy is trained.
        data: What to train on: the forget set, or the full set for the anamnesis index.
        target: Accuracy to reach, in [0, 1].
        evaluate: Where to measure accuracy; ``data`` by default.
        optimizer: Makes the optimizer of the copy; Adam with learning rate 1e-3 by default.
        loss_fn: One loss per sample.
        every: Steps between two measurements.
        most: Give up after so many.
        seed: Of data loaders that shuffle, and of dropout.

    Returns:
        Steps, 0 if the target is met at once; infinity if it was not reached.

    Raises:
        ValueError: If a count is not positive or ``data`` is empty.
    """
    if every < 1 or most < 1:
        raise ValueError(f"relearn_steps: every and most must be positive, got {every} and {most}")
    check_batches(data)
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.requires_grad_(True)
    judged = data if evaluate is None else evaluate
    if accuracy(copy, judged) >= target:
        return 0
    device, steps = device_of(copy), 0
    devices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        trained = torch.optim.Adam(copy.parameters(), lr=1e-3) if optimizer is None else optimizer(copy)
        while True:
            before = steps
            for batch in read_batches(data, device):
                copy.train()
                trained.zero_grad()
                loss_fn(copy, batch).mean().backward()  # type: ignore[no-untyped-call]
                trained.step()
                steps += 1
                if (steps % every == 0 or steps == most) and accuracy(copy, judged) >= target:
                    return steps
                if steps == most:
                    return math.inf
            if steps == before:
                raise ValueError("relearn_steps: data must hold at least one batch, got none")


def anamnesis_index(
    model: nn.Module,
    original: nn.Module,
    retrained: nn.Module,
    data: Batches,
    forget: Batches,
    *,
    margin: float = 0.05,
    **settings: Any,  # noqa: ANN401 - passed on
) -> float:
    """Return the anamnesis index: relearning steps of the unlearned model over those of the retrained one.

    Steps of ordinary training until the accuracy on the forget set is back within ``margin`` of the original
    model's. 1 is ideal; far below 1, the forget set was still in the model; far above, it was pushed out so
    hard that its absence shows.

    Args:
        model: The unlearned model.
        original: The model before unlearning.
        retrained: A model trained without the forget set.
        data: What to train on, the forget set included.
        forget: Where to measure.
        margin: Share of the original accuracy that may be missing, in [0, 1).
        **settings: For ``relearn_steps``.

    Returns:
        The index; infinity if only the retrained model relearned.

    Raises:
        ValueError: If the retrained model did not relearn, or knew the forget set at once.

    Source:
        Chundawat et al., "Zero-Shot Machine Unlearning", IEEE TIFS 2023.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"anamnesis_index: margin must lie in [0, 1), got {margin}")
    target = (1 - margin) * accuracy(original, forget)
    ours, theirs = (
        relearn_steps(subject, data, target, evaluate=forget, **settings) for subject in (model, retrained)
    )
    if theirs == 0 or math.isinf(theirs):
        raise ValueError(
            "anamnesis_index: the retrained model must relearn the forget set in a positive number of steps, "
            f"got {theirs}"
        )
    return ours / theirs


class _Features(NamedTuple):
    """One number per sample; means over a sample's positions where it has several."""

    entropy: _Numbers  # of the prediction, nats
    confidence: _Numbers  # probability of the label
    loss: _Numbers  # cross entropy, nats


def _features(model: nn.Module, data: Batches, name: str, shift: bool | None) -> _Features:
    collected: list[Tensor] = []
    with borrowed(model), torch.no_grad():
        for batch in read_batches(check_batches(data, name), device_of(model)):
            scores, labels = scores_and_labels(model, batch, shift=shift)
            log_p = scores.double().log_softmax(-1)
            counted = labels >= 0
            own = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
            values = torch.stack([-(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1), own.exp(), -own])
            n = labels.shape[0]
            counted, values = counted.reshape(n, -1), values.reshape(3, n, -1)
            means = (values * counted).sum(-1) / counted.sum(-1).clamp(min=1)
            collected.append(means[:, counted.any(-1)].cpu())
    if not collected or sum(part.shape[1] for part in collected) == 0:
        raise ValueError(f"mia: the {name} set must hold at least one labelled sample, got none")
    entropy, confidence, loss = torch.cat(collected, dim=1).numpy()
    return _Features(entropy, confidence, loss)


def _ssd_score(retain: _Features, forget: _Features, test: _Features, seed: int) -> float:
    linear = _sklearn("linear_model")
    judge = linear.LogisticRegression(class_weight="balanced", solver="lbfgs", random_state=seed)
    judge.fit(*_labelled(retain.entropy, test.entropy))
    return float(judge.predict(forget.entropy[:, None]).mean())


def _salun_score(retain: _Features, forget: _Features, test: _Features, seed: int) -> float:
    # The first samples in the release; a draw does not depend on how the set is ordered.
    chosen = np.random.default_rng(seed).permutation(len(retain.confidence))[: len(test.confidence)]
    judge = _sklearn("svm").SVC(C=3, gamma="auto", kernel="rbf")
    judge.fit(*_labelled(retain.confidence[chosen], test.confidence))
    return float(1 - judge.predict(forget.confidence[:, None]).mean())


def _scrub_score(retain: _Features, forget: _Features, test: _Features, seed: int) -> float:
    selection, linear = _sklearn("model_selection"), _sklearn("linear_model")
    n = min(len(forget.loss), len(test.loss))
    if n < 5:
        raise ValueError(f"mia: forget and test must hold at least 5 samples each for 'scrub', got {n}")
    draws = np.random.default_rng(seed)
    sides = [draws.permutation(side)[:n] for side in (forget.loss, test.loss)]
    x, y = _labelled(*sides)
    folds = selection.StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(selection.cross_val_score(linear.LogisticRegression(), x, y, cv=folds).mean())


_SCORES: dict[str, Callable[[_Features, _Features, _Features, int], float]] = {
    "ssd": _ssd_score,
    "salun": _salun_score,
    "scrub": _scrub_score,
}


def _labelled(members: _Numbers, others: _Numbers) -> tuple[_Numbers, _Numbers]:
    return np.concatenate([members, others])[:, None], np.repeat([1.0, 0.0], [len(members), len(others)])


def _auc(members: _Numbers, others: _Numbers) -> float:
    # Mann-Whitney: the share of pairs in the right order, ties counting half.
    ordered = np.sort(others)
    below, upto = (np.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(others)))


def _tpr(members: _Numbers, others: _Numbers, fpr: float = 0.01) -> float:
    # The lowest threshold that no more than this share of the others pass.
    allowed = math.floor(fpr * len(others) + 1e-9)
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -math.inf
    return float((members > threshold).mean())


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    # Kullback-Leibler over the last axis, in nats, with 0 log 0 = 0.
    return F.kl_div(q.log(), p, reduction="none").nan_to_num(nan=0.0).sum(-1)


def _mean_over_positions(
    who: str,
    model: nn.Module,
    reference: nn.Module,
    data: Batches,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> float:
    total, count = 0.0, 0
    with borrowed(model), borrowed(reference), torch.no_grad():
        for batch in read_batches(check_batches(data), device_of(model)):
            p = _probabilities(model, batch)
            q = _probabilities(reference, batch).to(p.device)
            if p.shape != q.shape:
                raise ValueError(
                    f"{who}: models must have outputs of one shape, got {list(p.shape)} and {list(q.shape)}"
                )
            values = distance(p, q)
            total, count = total + float(values.sum()), count + values.numel()
    if count == 0:
        raise ValueError(f"{who}: data must hold at least one sample, got none")
    return total / count


def _probabilities(model: nn.Module, batch: Batch) -> Tensor:
    # Labels, where there are any, tell which axis the classes are on.
    try:
        scores, _ = scores_and_labels(model, batch, shift=False)
    except ValueError:
        scores = logits(model, batch)
    return scores.double().softmax(-1)


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm > 0 else math.inf


def _sklearn(module: str) -> Any:  # noqa: ANN401 - an optional module
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "membership inference needs scikit-learn: pip install 'unlearn_ext[metrics]'"
        ) from error
