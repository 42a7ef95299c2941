"""What can be said of an unlearned model with one retrained model, or with none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.evaluation.metrics.answers import answers
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches
from unlearn_ext.tasks.losses import resolve


def rf_jsd(
    model: nn.Module, original: nn.Module, *, forget: Batches, unseen: Batches, task: Task | None = None
) -> float:
    """Compare predictions on forgotten samples with the original model's on unseen ones, class by class.

    The retrain-free Jensen-Shannon divergence: mean over classes of the divergence between the mean
    prediction of the unlearned model on the class's forget samples and that of the original on its unseen
    samples, in bits. Low says that forgotten samples are answered like unseen ones on average; it does not
    see single samples.

    Args:
        model: The unlearned model.
        original: The model before.
        forget: The forget set.
        unseen: Samples that neither was trained on.
        task: What the models are for; inferred, or refused, where it is not given.

    Returns:
        A number in [0, 1].

    Raises:
        FloatingPointError: If an output of a model is NaN, or leaves no probabilities, such as infinity.
        ValueError: If no class is in both sets, or samples have no class.

    Source:
        Spartalis, Semertzidis, Gavves & Daras, "LoTUS: Large-Scale Machine Unlearning with a Taste of
        Uncertainty", CVPR 2025.

    Example:
        >>> data = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> rf_jsd(nn.Identity(), nn.Identity(), forget=data, unseen=data)
        0.0
    """
    judge = resolve(task, who="rf_jsd")
    ours, theirs = (_class_means(*pair, judge) for pair in ((model, forget), (original, unseen)))
    shared = ours.keys() & theirs.keys()
    if not shared:
        raise ValueError(
            f"rf_jsd: forget and unseen must share a class, got {sorted(ours)} and {sorted(theirs)}"
        )
    total = 0.0
    for label in shared:
        p, q = ours[label], theirs[label]
        mixed = (p + q) / 2
        total += sum(float(torch.xlogy(side, side / mixed).sum()) for side in (p, q)) / (2 * math.log(2))
    return max(0.0, total / len(shared))


def tug_of_war(model: Mapping[str, float], retrained: Mapping[str, float]) -> float:
    """Return how near a model's accuracies are to one retrained model's, as one number.

        prod over forget, retain, test of (1 - |accuracy - accuracy of the retrained model|)

    Args:
        model: Accuracies in [0, 1] by name of the set.
        retrained: Those of the retrained model on the same sets.

    Returns:
        A number in [0, 1]; 1 is ideal.

    Raises:
        ValueError: If the sets differ or an accuracy is none.

    Source:
        ToW of Zhao, Kurmanji, Barbulescu, Triantafillou & Triantafillou, "What makes unlearning hard and what
        to do about it", NeurIPS 2024.

    Example:
        >>> tug_of_war({"forget": 0.5, "test": 0.75}, {"forget": 0.25, "test": 0.75})
        0.75
    """
    if set(model) != set(retrained) or not model:
        raise ValueError(f"tug_of_war: both must have the same sets, got {list(model)} and {list(retrained)}")
    for value in (*model.values(), *retrained.values()):
        if not 0 <= value <= 1:
            raise ValueError(f"tug_of_war: accuracies must lie in [0, 1], got {value}")
    return math.prod(1 - abs(model[name] - retrained[name]) for name in model)


def _class_means(model: nn.Module, data: Batches, task: Task) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    counts: dict[int, int] = {}
    with borrowed(model), torch.no_grad():
        for batch, outputs in answers("rf_jsd", model, task, data):
            labels = task.classes_of(batch)
            if labels is None:
                raise ValueError("rf_jsd: samples must have one class each, got labels of another form")
            counted = task.counted(outputs, batch).cpu()
            scores, labels = task.scores(outputs, batch).double().cpu()[counted], labels.cpu()[counted]
            if bool(torch.isnan(scores).any()):
                raise FloatingPointError("rf_jsd: outputs must leave probabilities, got NaN from infinity")
            for label in set(labels.tolist()):
                own = scores[labels == label]
                sums[label] = sums.get(label, torch.zeros(scores.shape[-1], dtype=torch.float64)) + own.sum(0)
                counts[label] = counts.get(label, 0) + len(own)
    return {label: total / counts[label] for label, total in sums.items()}
