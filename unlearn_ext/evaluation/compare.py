"""Run unlearning methods on copies of a model, and hold them against one retrained without the data."""

from __future__ import annotations

import logging
import operator
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from unlearn_ext._internal.copies import copied
from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.logs import shown
from unlearn_ext._internal.modules import check_model
from unlearn_ext.evaluation.audit import LEAST_MODELS, RESERVED
from unlearn_ext.evaluation.cache import Cache
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.metrics.registry import (
    REGISTRY,
    Metric,
    all_names,
    default_names,
    of_caller,
)
from unlearn_ext.evaluation.references import References
from unlearn_ext.evaluation.rows import Job, Method, Row, described
from unlearn_ext.evaluation.sets import Sets
from unlearn_ext.evaluation.settings import check_settings
from unlearn_ext.evaluation.study import Study
from unlearn_ext.methods import METHODS
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batches, device_of

Named: TypeAlias = str | Method | tuple[str | Method, Mapping[str, Any]]

Methods: TypeAlias = Sequence[Named] | Mapping[str, Named]

Asked: TypeAlias = str | tuple[str, Callable[[nn.Module], float]]

# What is measured unless something else is asked for; ``all_names()`` tells what can be.
METRICS: tuple[str, ...] = default_names()

ORIGINAL, RETRAINED, RANDOM_MASK = "original", "retrained", "random mask"

_log = logging.getLogger(__name__)


def compare(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    test: Batches,
    *,
    methods: Methods,
    reference: nn.Module | None = None,
    seeds: Sequence[int] = (0,),
    make_model: Callable[[], nn.Module] | None = None,
    train: Callable[[nn.Module, Batches], object] | None = None,
    metrics: Sequence[Asked] = METRICS,
    cache: str | Path | None = None,
    cache_key: str | None = None,
    controls: bool = True,
    audit: int = 0,
    task: Task | None = None,
    progress: bool = False,
) -> Comparison:
    """Run unlearning methods on copies of a model, measure them alike, and set them beside retraining.

    Every (method, seed) starts from the same weights, the same state of the global random generators and of
    the loaders' own; the user's model, loaders and random states are as before afterwards. A method that
    fails gets a row that says why; the others are not affected.

    Where whole classes are forgotten (``forget`` has classes of which ``retain`` has no sample) the test set
    is split by them, and the attack compares forget samples with test samples of the same classes.

    With ``cache`` every row is written down as soon as it is there. A comparison that was interrupted and is
    called again takes from there what it has: rows of the same method, settings, seed, weights, data,
    reference, metrics and versions. What has failed is tried again. Functions of the caller's are the same if
    their code, the globals they use and the source of their module are; what they read from files does not
    count. A row that depends on something whose content cannot be told is not kept, and a warning says why.

    Args:
        model: The trained model; only copies of it are unlearned.
        forget: The forget set.
        retain: The retain set.
        test: Samples the model was not trained on.
        methods: What to run: names of ``METHODS`` or functions ``f(model, forget, retain, **settings)`` that
            change the model in place; pairs of one and its settings; or a mapping from labels to these.
        reference: A model retrained without the forget set. Instead, ``make_model`` and ``train`` make one
            for every seed. With neither, what needs it says so in its place.
        seeds: Each method runs once per seed.
        make_model: Returns a fresh model with the architecture of ``model``, on its device.
        train: ``train(model, data)`` trains a fresh model in place, as ``model`` was.
        metrics: Names out of ``METRICS``, ``"relearn_steps"`` and ``"anamnesis_index"``, or pairs of a name
            and a function of the unlearned model.
        cache: Folder to keep rows and retrained models in; made before anything runs.
        cache_key: A text that stands for the code of the caller's own functions and classes: rows are found
            again under the same text, whatever the code. To be changed by whoever changes the code.
        controls: Add the original, and for gradient masking a random mask of the same size.
        audit: Retrain so many networks, and run every method as often, to hold the log-odds of every sample
            against each other as ``ux.evaluation.audit`` does: at least 4 (16 show something), or 0 for
            none. Needs ``make_model`` and ``train``. All runs of a method start from ``model``, and the test
            set stands for samples that no network was trained on; no method is given it.
        task: What the model is for; None infers it from the model and each batch. Methods that take ``task``
            get it too. See ``ux.tasks``.
        progress: Show a line on stderr as each row is done. The lines are log records (level INFO) of the
            logger ``"unlearn_ext"``: where that is set up to show them, they go there instead.

    Returns:
        The comparison.

    Raises:
        TypeError: If a set is no iterable of batches, or ``task`` no task.
        ValueError: If a name, a label, a setting or the combination of references is wrong, a set is a
            one-shot iterator or empty, or the task does not go with the data. Nothing has been run then.
        NotImplementedError: If ``model`` or ``reference`` is sharded, lazy, on the meta device or wrapped for
            parallel training.
        OSError: If the folder of the cache cannot be made. Nothing has been run then.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 3)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> forget, retain = [(x[y == 2], y[y == 2])], [(x[y < 2], y[y < 2])]
        >>> table = compare(model, forget, retain, [(x, y)], methods=["ssd"], metrics=["retain", "forget"])
        >>> table.labels
        ('original', 'retrained', 'ssd', 'random mask')
        >>> table.measures("original")["changed"].value
        0.0
    """
    jobs = _jobs(methods, controls)
    try:
        seeds = tuple(int(operator.index(seed)) for seed in seeds)
    except TypeError:
        raise ValueError(f"compare: seeds must be a sequence of whole numbers, got {seeds!r}") from None
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"compare: seeds must be distinct and at least one, got {list(seeds)}")
    chosen = _chosen_metrics(metrics)
    if (make_model is None) != (train is None):
        raise ValueError("compare: make_model and train must be given together")
    if reference is not None and make_model is not None:
        raise ValueError("compare: reference must not be given together with make_model and train")
    check_model(model, "compare")
    if reference is not None:
        check_model(reference, "compare: reference")
    _check_audit(audit, [job.label for job in jobs], can_retrain=train is not None)
    recipe = () if train is None else ("make_model", "train")
    for job in jobs:
        if job.function is not None:
            settings = dict(job.settings)
            if task is not None and job.function is METHODS.get(job.name):
                settings.setdefault("task", task)  # a method of the package must not be without it
            check_settings("compare", job.name, job.function, settings, recipe)
    folder = Cache(None if cache is None else Path(cache), cache_key)
    original = copied(model)  # not even measuring touches the user's
    sets = Sets(original, forget, retain, test, task=task, hashed=folder.is_on)
    references = References(reference, make_model, train, sets, folder, device_of(model))
    if reference is not None and weights_digest(reference) == weights_digest(original):
        warnings.warn(
            "compare: reference has the model's own weights, and so knows the forget set: gaps to it are "
            "smallest where nothing is forgotten. Give a model retrained without the forget set",
            stacklevel=2,
        )
    study = Study(original, sets, task, chosen, references, folder)
    # The reference first: the others are compared with it.
    before = [Job(ORIGINAL, "original", "", None, {})] if controls else []
    jobs = [Job(RETRAINED, "reference", "", None, {}), *before, *jobs]
    _warn_of_no_cache(study, jobs, seeds[0])
    rows: list[Row] = []
    with shown() if progress else nullcontext():
        for job in jobs:
            for seed in seeds:
                started = time.perf_counter()
                row, from_cache = study.row(job, seed)
                rows.append(row)
                outcome = "from the cache" if from_cache else f"{time.perf_counter() - started:.1f} s"
                outcome = f"failed: {row.why}" if row.why else outcome
                _log.info(
                    "%d/%d %s, seed %d: %s", len(rows), len(jobs) * len(seeds), row.label, seed, outcome
                )
        audited = study.audited(jobs, audit) if audit else None
    rows.sort(key=lambda row: row.kind != "original")
    return Comparison(tuple(rows), study.columns, {**study.facts(), "seeds": list(seeds)}, audited)


def _check_audit(n_models: int, labels: Sequence[str], *, can_retrain: bool) -> None:
    if isinstance(n_models, bool) or not isinstance(n_models, int) or n_models < 0:
        raise ValueError(f"compare: audit must be a number of networks, or 0 for none, got {n_models!r}")
    if 0 < n_models < LEAST_MODELS:
        raise ValueError(f"compare: audit must be 0 or at least {LEAST_MODELS} networks, got {n_models}")
    if n_models and not can_retrain:
        raise ValueError("compare: make_model and train must be given for an audit, which retrains networks")
    for label in labels:
        if n_models and label in RESERVED:
            raise ValueError(f"compare: a label must not be {label!r} where there is an audit")


def _jobs(methods: Methods, controls: bool) -> list[Job]:
    if isinstance(methods, str) or not isinstance(methods, (Mapping, Sequence)):
        raise ValueError(f"compare: methods must be a sequence or a mapping, got {methods!r}")
    labelled = methods.items() if isinstance(methods, Mapping) else ((None, entry) for entry in methods)
    jobs = []
    for label, entry in labelled:
        chosen, settings = entry if isinstance(entry, tuple) else (entry, {})
        if not isinstance(settings, Mapping) or not (isinstance(chosen, str) or callable(chosen)):
            raise ValueError(
                "compare: a method must be a name, a function, or a pair of one and its settings, "
                f"got {entry!r}"
            )
        if isinstance(chosen, str) and chosen not in METHODS:
            raise ValueError(f"compare: methods must be among {', '.join(METHODS)}, got {chosen!r}")
        function = METHODS[chosen] if isinstance(chosen, str) else chosen
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        jobs.append(Job(label or _label(name, settings), "method", name, function, dict(settings)))
    if controls:
        jobs += _random_masks(jobs)
    labels = [ORIGINAL, RETRAINED, *(job.label for job in jobs)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"compare: labels must be distinct, got {label!r} {labels.count(label)} times")
    return jobs


def _label(name: str, settings: Mapping[str, Any]) -> str:
    told = [f"{key}={value}" for key, value in described(settings).items()]
    return f"{name}({', '.join(told)})" if told and len(", ".join(told)) < 40 else name


def _random_masks(jobs: Sequence[Job]) -> list[Job]:
    # The same number of neurons, drawn by lot: what the choice of the neurons is worth.
    masked = [job for job in jobs if job.name == "gradient_masking"]
    controls = []
    for job in masked or [Job("", "control", "gradient_masking", None, {})]:
        settings = {key: value for key, value in job.settings.items() if key != "masks"}
        label = RANDOM_MASK if len(masked) < 2 else f"{RANDOM_MASK} for {job.label}"
        function = METHODS.get("gradient_masking", _missing("gradient_masking"))
        controls.append(Job(label, "control", job.name, function, {**settings, "score": "random"}))
    return controls


def _missing(name: str) -> Method:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"this build has no method {name}")

    return missing


def _chosen_metrics(metrics: Sequence[Asked]) -> list[Metric]:
    chosen: dict[str, list[Metric]] = {}
    for entry in [metrics] if isinstance(metrics, str) else metrics:
        name, function = entry if isinstance(entry, tuple) else (entry, None)
        if (function is None and name not in all_names()) or (
            function is not None and not callable(function)
        ):
            raise ValueError(
                f"compare: metrics must be among {', '.join(all_names())}, or pairs of a name and a "
                f"function, got {entry!r}"
            )
        if name in chosen or (function is not None and name in REGISTRY):
            raise ValueError(f"compare: the names of metrics must be distinct, got {name!r} twice")
        known = [entry for entry in REGISTRY.values() if entry.asked_as == name]
        chosen[name] = known if function is None else [of_caller(name, function)]
    always = [entry for entry in REGISTRY.values() if entry.chosen == "always"]
    return [*(entry for entries in chosen.values() for entry in entries), *always]


def _warn_of_no_cache(study: Study, jobs: Sequence[Job], seed: int) -> None:
    reasons: dict[str, list[str]] = {}
    for job in jobs:
        why = study.why_not_kept(job, seed)
        if why is not None:
            reasons.setdefault(why, []).append(job.label)
    if reasons:
        told = "; ".join(f"{', '.join(labels)} ({reason})" for reason, labels in reasons.items())
        warnings.warn(
            f"compare: these rows are not kept in the cache, since there is no telling what they depend on: "
            f"{told}. Give cache_key= to say with a text of your own when they are to be the same",
            stacklevel=3,
        )
