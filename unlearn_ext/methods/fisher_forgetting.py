"""Fisher forgetting: noise on every weight, as much as the retain set does not mind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.methods.common import n_classes, prepared, required, trainable, what_a_task_must_have
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches

# Of the published code: added to the Fisher diagonal; bounds of its inverse; the output layer and vectors get
# so much more noise; variance of a forgotten class's row.
_DAMPING = 1e-8
_INVERSE_MAX = 1e3
_INVERSE_MAX_OUTPUT = 1e2
_MORE = 10.0
_ROW_VARIANCE = 1e-4


@lockstep
@recorded
def fisher_forgetting(
    model: nn.Module,
    forget: Batches | None,
    retain: Batches | None = None,
    *,
    scale: float = 1e-6,
    estimator: Literal["mc", "expected", "per_sample"] = "mc",
    forget_classes: Iterable[int] | None = None,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    process_group: Group = None,
) -> UnlearnResult:
    """Add noise to every weight, the more the less it matters to the retain set.

        theta <- theta + N(0, v)      v = scale min(1 / (F + 1e-8), 1e3), averaged over each row

    F is the Fisher diagonal of the retain set, from per-sample gradients. Vectors (biases, scales) and the
    output layer get ten times the variance, the latter with a bound of 1e2. If whole classes are forgotten,
    their rows of the output layer are replaced by N(0, 1e-3).

    As a method of forgetting it is weak: noise does not tell what to forget from the rest, and a class whose
    row is gone still wins wherever all other scores are negative. How much of a class stays differs from
    class to class and network to network (``python -m bench.bench_methods``), and a variance that forgets it
    everywhere spoils the rest as well.

    Args:
        model: The model, changed in place; buffers stay.
        forget: The forget set; only its labels are read, and nothing where ``forget_classes`` is given.
        retain: The retain set.
        scale: How much noise.
        estimator: ``"mc"`` draws one label per sample from the model's prediction; ``"expected"`` takes the
            expectation over all labels, as published, with one pass over ``retain`` per class;
            ``"per_sample"`` takes the true labels (the empirical Fisher).
        forget_classes: Classes whose output rows are replaced; by default those that occur in ``forget`` and
            not in ``retain``.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Raises:
        ValueError: If ``scale`` or ``estimator`` is out of range, ``retain`` is missing, or neither
            ``forget`` nor ``forget_classes`` is given.
        NotImplementedError: If the task has no classes; ``estimator="per_sample"`` needs none.
        FloatingPointError: If a loss is NaN or infinite.

    Source:
        Golatkar, Achille & Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020, and their code.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(8, 2), torch.arange(8) % 2 + 1)]
        >>> fisher_forgetting(model, forget, retain).hyperparameters["forget_classes"]
        [0]
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"fisher_forgetting: scale must be finite and >= 0, got {scale}")
    if estimator not in ("mc", "expected", "per_sample"):
        raise ValueError(
            f"fisher_forgetting: estimator must be one of mc, expected, per_sample, got {estimator!r}"
        )
    ranks = ranks_of(process_group, "fisher_forgetting")
    chosen = prepared("fisher_forgetting", model, task, None)
    required("fisher_forgetting", retain=retain)
    assert retain is not None
    names = list(trainable(model, "fisher_forgetting", include, exclude))
    settings: dict[str, object] = {"scale": scale, "estimator": estimator}
    if task is not None:
        settings["task"] = repr(task)
    goal = ClosedLoop(
        "fisher_forgetting", model, forget, retain, until, budget, validation, strict, chosen, ranks
    )
    settings |= goal.facts
    with unlearning(
        model,
        "fisher_forgetting",
        settings,
        generator=generator,
        goal=goal,
        changes=names,
        ranks=ranks,
        data=(forget, retain),
    ) as run:
        rows = (
            _classes_gone(forget, retain, chosen, ranks)
            if forget_classes is None
            else sorted(set(forget_classes))
        )
        run.hyperparameters["forget_classes"] = rows
        classes = _n_classes(model, retain, chosen, ranks, is_needed=estimator != "per_sample" or bool(rows))
        with run.phase("importance"):
            fisher = _fisher(run, retain, chosen, classes, estimator, names, progress)
        output = _output_layer(fisher, classes)
        with run.phase("noise"), torch.no_grad(), run.shared_draws():
            for name, p in parameters_by_name(model).items():
                if name not in fisher:
                    continue
                variance = 1 / (fisher[name] + _DAMPING)
                variance = scale * variance.clamp(max=_INVERSE_MAX_OUTPUT if name in output else _INVERSE_MAX)
                if p.ndim > 1:
                    means = variance.flatten(1).mean(1)
                    variance = means.view(-1, *[1] * (p.ndim - 1)).expand_as(variance).clone()
                mean = p.detach().to(variance.dtype, copy=True)
                if name in output:
                    mean[rows] = 0
                    variance[rows] = _ROW_VARIANCE
                if name in output or p.ndim <= 1:
                    variance *= _MORE
                p.copy_(mean + variance.sqrt() * torch.randn_like(variance))
        run.record("noise", output_layer=list(output))
    return goal.result(run)


def _classes_gone(forget: Batches | None, retain: Batches, task: Task, ranks: Ranks) -> list[int]:
    if forget is None:
        raise ValueError("fisher_forgetting: forget or forget_classes must be given")
    found: list[set[int]] = [set(), set()]
    labelled = True
    for known, data in zip(found, (forget, retain), strict=True):
        for batch in check_batches(data):
            classes = task.classes_of(batch)
            if classes is None:
                labelled = False  # labels of positions, of words say, are no classes of samples
                continue
            known.update(classes.tolist())
    if not all(ranks.exchange("labels", labelled)):
        return []
    told = ranks.exchange("classes", found)
    gone = {label for forgotten, _ in told for label in forgotten}
    kept = {label for _, retained in told for label in retained}
    return sorted(label for label in gone - kept if label >= 0)


def _n_classes(model: nn.Module, data: Batches, task: Task, ranks: Ranks, *, is_needed: bool) -> int:
    # 0 for a task without classes.
    instead = "estimator='per_sample' without forget_classes works for tasks without classes"
    try:
        with what_a_task_must_have("fisher_forgetting", instead):
            return n_classes("fisher_forgetting", model, data, task, ranks)
    except NotImplementedError:
        if is_needed:
            raise
        return 0


def _fisher(
    run: Run, data: Batches, task: Task, classes: int, estimator: str, names: list[str], progress: bool
) -> dict[str, Tensor]:
    if estimator != "expected":
        kind: Literal["mc", "per_sample"] = "mc" if estimator == "mc" else "per_sample"
        importance = fisher_diagonal(
            run.model,
            data,
            task=task,
            estimator=kind,
            params=names,
            progress=progress,
            process_group=run.ranks,
        )
        run.coverage = dict(importance.coverage)
        return dict(importance)
    total: dict[str, Tensor] = {}
    for label in range(classes):

        def weighted(model: nn.Module, batch: Batch, label: int = label) -> Tensor:
            # The square of this loss's gradient is p(label) times that of the loss of the label.
            scores = task.log_scores(task.forward(model, batch), batch)
            if scores.ndim > 2:
                raise ValueError("fisher_forgetting: estimator 'expected' needs one label per sample")
            logs = scores[:, label]
            return -(logs.detach() / 2).exp() * logs

        part = fisher_diagonal(
            run.model,
            data,
            task=task,
            loss_fn=weighted,
            params=names,
            progress=progress,
            process_group=run.ranks,
        )
        run.coverage = dict(part.coverage)
        total = {name: tensor + total.get(name, 0.0) for name, tensor in part.items()}
    return total


def _output_layer(fisher: dict[str, Tensor], classes: int) -> list[str]:
    # The last matrix with a row per class, and the vector beside it.
    if not classes:
        return []
    matrices = [name for name, f in fisher.items() if f.ndim > 1 and f.shape[0] == classes]
    if not matrices:
        return []
    stem = matrices[-1].rpartition(".")[0]
    return [
        name
        for name, f in fisher.items()
        if name.rpartition(".")[0] == stem and f.ndim > 0 and f.shape[0] == classes
    ]
