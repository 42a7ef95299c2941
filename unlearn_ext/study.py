"""One comparison at work: the sets, the retrained models, and one row after the other."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ext import losses
from unlearn_ext.data import (
    Batch,
    Batches,
    check_batches,
    count_samples,
    device_of,
    is_per_sample,
    map_tensors,
    read_batches,
    targets,
)
from unlearn_ext.fingerprints import NoKeyError, key, sample_hashes
from unlearn_ext.metrics import accuracy, activation_distance, js_divergence, layer_distance, mia
from unlearn_ext.report import (
    UnlearnResult,
    callable_name,
    environment,
    layer_of,
    plain,
    weights_digest,
    write_text,
)
from unlearn_ext.seeding import seeded
from unlearn_ext.state import borrowed

Method: TypeAlias = Callable[..., object]

# Raised when a row means something else than before, so that rows cached earlier are not taken for it.
FORMAT = 1

# Edges of the loss histograms: powers of ten, so that the losses of well-learned samples do not share a bar.
LOSS_EDGES: tuple[float, ...] = tuple(10 ** (step / 4) for step in range(-20, 9))

_DISTANCES = {"js": js_divergence, "activation_distance": activation_distance}


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure, or the reason why there is none.

    Attributes:
        value: The figure; None if it could not be computed.
        why: Why not; None if it could.
        low: Lower end of its 95 % interval, if it has one.
        high: Upper end.
        spread: Standard deviation over the seeds, where it is a mean of several.
        note: What to read into it, such as the verdict of the attack.
    """

    value: float | None
    why: str | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one model: of the original, of the retrained one, or after a method with one seed.

    Attributes:
        label: What the row is called; rows of one label differ in the seed.
        kind: ``"original"``, ``"reference"``, ``"method"`` or ``"control"``.
        method: Name of the method; empty where none was run.
        settings: What it was called with, as far as JSON can tell.
        seed: Decides every random choice.
        why: Why the row has no figures: the method's error; None if it ran.
        measures: The figures by column, ``changed`` and ``seconds`` among them.
        phases: Seconds per phase, where the method tells.
        layers: Relative distance of every layer's parameters from the original's; None where they were zero.
        loss_counts: Histograms of the loss over ``LOSS_EDGES`` (what lies outside is counted in the outermost
            bars), by set.
    """

    label: str
    kind: str
    method: str
    settings: Mapping[str, object]
    seed: int
    why: str | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, float | None] = field(default_factory=dict)
    loss_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Row:
        """Make a row of what ``dataclasses.asdict`` and JSON made of one.

        Args:
            record: The fields by name.

        Returns:
            The row.
        """
        measures = {name: Measure(**measure) for name, measure in record["measures"].items()}
        return cls(**{**record, "measures": measures})


@dataclass(frozen=True, slots=True)
class Job:
    """A row to be made, for every seed.

    Attributes:
        label: See ``Row``.
        kind: See ``Row``.
        name: Name of the method; empty where none is run.
        function: The method; None where none is run.
        settings: Its keyword arguments.
    """

    label: str
    kind: str
    name: str
    function: Method | None
    settings: Mapping[str, Any]


class Task:
    """The three sets, what is in them, and how the test set is split."""

    def __init__(self, forget: Batches, retain: Batches, test: Batches, *, hashed: bool) -> None:
        self.sets: dict[str, Batches] = {"forget": forget, "retain": retain, "test": test}
        for name, data in self.sets.items():
            check_batches(data, f"compare: {name}")
        surveys = {}
        for name, data in self.sets.items():
            with seeded(0, data):
                surveys[name] = _survey(name, data, hashed=hashed)
        self.sizes = {name: survey.count for name, survey in surveys.items()}
        self.fingerprints = {name: survey.fingerprint for name, survey in surveys.items()}
        ours, others = surveys["forget"].classes, surveys["retain"].classes
        self.classes: list[int] | None = None
        if ours and others is not None and not ours & others:
            self.classes = sorted(ours)
        self.tests: dict[str, Batches] = {"test": test}
        if self.classes is not None:
            self.tests = {
                "test_retained": _Filtered(test, self.classes, inside=False),
                "test_forgotten": _Filtered(test, self.classes, inside=True),
            }

    @property
    def unseen(self) -> Batches:
        """What forget samples are compared with by the attack."""
        return self.tests["test" if self.classes is None else "test_forgotten"]


@dataclass(frozen=True, slots=True)
class _Survey:
    count: int
    classes: frozenset[int] | None  # None where samples have no single integer label
    fingerprint: str


def _survey(name: str, data: Batches, *, hashed: bool) -> _Survey:
    cpu = torch.device("cpu")
    count, largest, n_batches, sum_of_hashes = 0, 0, 0, 0
    classes: set[int] | None = set()
    for batch in read_batches(data, cpu):
        n = count_samples(batch)
        count, largest, n_batches = count + n, max(largest, n), n_batches + 1
        found = _class_labels(batch)
        classes = None if found is None or classes is None else classes | set(found.tolist())
        if hashed:
            sum_of_hashes += sum(sample_hashes(batch))
    if count == 0:
        raise ValueError(f"compare: {name} must hold at least one sample, got none")
    # A sum, so that the order does not matter: loaders shuffle.
    fingerprint = f"{sum_of_hashes % 2**256:064x}/{count}/{n_batches}/{largest}" if hashed else ""
    return _Survey(count, None if classes is None else frozenset(classes), fingerprint)


def _class_labels(batch: Batch) -> Tensor | None:
    try:
        labels = targets(batch)
    except ValueError:
        return None
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None


class _Filtered:
    """The samples of some classes, or of all others; re-iterable."""

    def __init__(self, data: Batches, classes: Iterable[int], *, inside: bool) -> None:
        self._data = data
        self._classes = torch.tensor(sorted(classes))
        self._inside = inside

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            labels = targets(batch)
            chosen = torch.isin(labels.cpu(), self._classes) == self._inside
            if bool(chosen.any()):
                n = count_samples(batch)
                yield _take(batch, n, chosen)


def _take(batch: Batch, n: int, chosen: Tensor) -> Batch:
    return map_tensors(
        lambda tensor: tensor[chosen.to(tensor.device)] if is_per_sample(tensor, n) else tensor, batch
    )


class References:
    """The retrained models, made when they are needed."""

    def __init__(
        self,
        given: nn.Module | None,
        make_model: Callable[[], nn.Module] | None,
        train: Callable[[nn.Module, Batches], object] | None,
        task: Task,
        cache: Path | None,
        device: torch.device,
    ) -> None:
        self._given = None if given is None else deepcopy(given).to(device)
        self._device = device
        self._make_model = make_model
        self._train = train
        self._task = task
        self._cache = cache
        self._made: dict[int, tuple[nn.Module, float]] = {}
        self._failed: dict[int, str] = {}

    @property
    def story(self) -> str:
        """How the reference came about."""
        if self._given is not None:
            return "a model given by the caller"
        return "none" if self._train is None else "retrained without the forget set, once per seed"

    def key(self, seed: int) -> object:
        """Return what decides the reference of a seed.

        Args:
            seed: The seed.

        Returns:
            A value for ``fingerprints.key``.
        """
        if self._given is not None:
            return weights_digest(self._given)
        if self._train is None:
            return None
        return [self._make_model, self._train, seed]

    def recipe(self) -> dict[str, object]:
        """Return what the method ``retrain`` needs.

        Returns:
            Its settings; empty if there is no recipe.
        """
        return {} if self._train is None else {"make_model": self._make_model, "train": self._train}

    def get(self, seed: int) -> tuple[nn.Module, float | None]:
        """Return the reference of a seed, trained now if it has to be.

        Args:
            seed: The seed.

        Returns:
            The model, and the seconds that its training took; None for a model that was given.

        Raises:
            LookupError: If there is none, or its training failed.
        """
        if self._given is not None:
            return self._given, None
        if self._make_model is None or self._train is None:
            raise LookupError("there is no retrained model: give reference=, or make_model= and train=")
        if seed in self._failed:
            raise LookupError(f"retraining failed: {self._failed[seed]}")
        if seed not in self._made:
            try:
                made, seconds = self._load(seed, self._make_model) or self._retrain(
                    seed, self._make_model, self._train
                )
            except Exception as error:
                self._failed[seed] = _reason(error)
                raise LookupError(f"retraining failed: {self._failed[seed]}") from error
            self._made[seed] = made.to(self._device), seconds
        return self._made[seed]

    def _retrain(
        self,
        seed: int,
        make_model: Callable[[], nn.Module],
        train: Callable[[nn.Module, Batches], object],
    ) -> tuple[nn.Module, float]:
        retain = self._task.sets["retain"]
        with seeded(seed, *self._task.sets.values()):
            started = time.perf_counter()
            made = make_model().to(self._device)
            made.train()
            returned = train(made, retain)
            seconds = time.perf_counter() - started
        trained = returned if isinstance(returned, nn.Module) else made
        path = self._path(seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.draft")
            torch.save({"weights": trained.state_dict(), "seconds": seconds}, draft)
            draft.replace(path)
        return trained, seconds

    def _load(self, seed: int, make_model: Callable[[], nn.Module]) -> tuple[nn.Module, float] | None:
        path = self._path(seed)
        if path is None or not path.exists():
            return None
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            with seeded(seed):
                loaded = make_model()
            loaded.load_state_dict(stored["weights"])
        except Exception:  # cut short, or of another architecture: train again
            return None
        return loaded, float(stored["seconds"])

    def _path(self, seed: int) -> Path | None:
        if self._cache is None:
            return None
        try:
            name = key(reference=self.key(seed), data=self._task.fingerprints["retain"])
        except NoKeyError:
            return None
        return self._cache / f"retrained-{name[:32]}.pt"


class Study:
    """Runs and measures, one row at a time."""

    def __init__(
        self,
        original: nn.Module,
        task: Task,
        metrics: Mapping[str, Callable[[nn.Module], float] | None],
        references: References,
        cache: Path | None,
    ) -> None:
        self._original = original
        self._task = task
        self._metrics = metrics
        self._references = references
        self._cache = cache
        self._weights = weights_digest(original)
        self._norms = {name: float(p.detach().double().norm()) for name, p in original.named_parameters()}
        self._reference_rows: dict[int, Row] = {}
        columns: list[str] = []
        for name in metrics:
            parts = {"test": [*task.tests], "mia": ["mia_auc", "mia_tpr"]}
            columns += parts.get(name, [name])
        self.columns = (*columns, "changed", "seconds")

    def facts(self) -> dict[str, Any]:
        """Return what is compared.

        Returns:
            Plain values by name.
        """
        return {
            "samples": self._task.sizes,
            "forget_classes": self._task.classes,
            "model": callable_name(type(self._original)),
            "parameters": sum(p.numel() for p in self._original.parameters()),
            "layers": {
                layer: type(self._original.get_submodule(layer)).__name__
                for layer in dict.fromkeys(map(layer_of, self._norms))
                if not isinstance(getattr(self._original, layer, None), nn.Parameter)
            },
            "weights": self._weights,
            "reference": self._references.story,
            "environment": environment(self._original),
        }

    def row(self, job: Job, seed: int) -> tuple[Row, bool]:
        """Make a row, or take it from the cache. The reference of a seed must come first.

        Args:
            job: What to make it of.
            seed: Decides every random choice.

        Returns:
            The row, and whether it comes from the cache.
        """
        path = self._path(job, seed)
        row = _read_row(path, job.label)
        found = row is not None
        if row is None:
            row = self._run(job, seed)
            if path is not None and row.why is None:
                write_text(path, json.dumps(plain(asdict(row))))
        if job.kind == "reference":
            self._reference_rows[seed] = row
        return row, found

    def _run(self, job: Job, seed: int) -> Row:
        row = Row(job.label, job.kind, job.name, described(job.settings), seed)
        try:
            subject, seconds, result = self._subject(job, seed)
        except Exception as error:
            return replace(row, why=_reason(error))
        measures = {**self._figures(subject, seed, job.kind)}
        measures["changed"] = (
            Measure(None, "it was trained afresh")
            if job.kind == "reference"
            else _attempt(self._changed, subject)
        )
        measures["seconds"] = (
            Measure(None, "it was given, not trained here") if seconds is None else Measure(seconds)
        )
        return replace(
            row,
            measures=measures,
            phases=dict(result.seconds) if result is not None else {},
            layers={} if job.kind == "reference" else self._layers(subject),
            loss_counts=self._loss_counts(subject),
        )

    def _subject(self, job: Job, seed: int) -> tuple[nn.Module, float | None, UnlearnResult | None]:
        if job.kind == "reference":
            return *self._references.get(seed), None
        if job.function is None:
            return self._original, 0.0, None
        subject = deepcopy(self._original)
        settings = dict(job.settings)
        accepted = inspect.signature(job.function).parameters
        if "generator" in accepted and "generator" not in settings:
            settings["generator"] = torch.Generator().manual_seed(seed)
        for name, value in self._references.recipe().items():
            if name in accepted or job.name == "retrain":
                settings.setdefault(name, value)
        forget, retain = self._task.sets["forget"], self._task.sets["retain"]
        with seeded(seed, *self._task.sets.values()):
            started = time.perf_counter()
            result = job.function(subject, forget, retain, **settings)
            if device_of(subject).type == "cuda":
                torch.cuda.synchronize(device_of(subject))
            seconds = time.perf_counter() - started
        return subject, seconds, result if isinstance(result, UnlearnResult) else None

    def _figures(self, subject: nn.Module, seed: int, kind: str) -> dict[str, Measure]:
        sets = self._task.sets
        figures: dict[str, Measure] = {}
        for name, function in self._metrics.items():
            with seeded(seed, *sets.values()):
                if function is not None:
                    figures[name] = _attempt(function, subject)
                elif name in ("retain", "forget"):
                    figures[name] = _attempt(accuracy, subject, sets[name])
                elif name == "test":
                    for part, data in self._task.tests.items():
                        figures[part] = _attempt(accuracy, subject, data)
                elif name == "mia":
                    figures |= self._attack(subject, seed, kind)
                elif name in _DISTANCES:
                    figures[name] = _attempt(self._distance, _DISTANCES[name], subject, seed)
        if "gap" in self._metrics:
            figures["gap"] = _attempt(self._gap, figures, seed, kind)
        return {name: figures[name] for name in self.columns if name in figures}

    def _distance(
        self, function: Callable[[nn.Module, nn.Module, Batches], float], subject: nn.Module, seed: int
    ) -> float:
        return function(subject, self._references.get(seed)[0], self._task.sets["forget"])

    def _attack(self, subject: nn.Module, seed: int, kind: str) -> dict[str, Measure]:
        names = ("mia_auc", "mia_tpr")
        try:
            attack = mia(subject, self._task.sets["retain"], self._task.sets["forget"], self._task.unseen)
        except Exception as error:
            return dict.fromkeys(names, Measure(None, _reason(error)))
        theirs = self._reference_figure("mia_auc", seed) if kind != "reference" else None
        attack = replace(attack, reference_auc=theirs)
        note = None if attack.reference_auc is None else attack.verdict
        return {
            "mia_auc": Measure(attack.auc, None, *attack.auc_interval, note=note),
            "mia_tpr": Measure(attack.tpr, None, *attack.tpr_interval),
        }

    def _gap(self, figures: Mapping[str, Measure], seed: int, kind: str) -> float:
        if kind == "reference":
            return 0.0
        if self._reference_rows[seed].why is not None:
            raise LookupError(self._reference_rows[seed].why)
        pairs = [
            (figure.value, self._reference_figure(name, seed))
            for name, figure in figures.items()
            if name in ("retain", "forget", "mia_auc", *self._task.tests)
        ]
        gaps = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if not gaps:
            raise LookupError("there is no accuracy and no AUC to compare")
        return sum(gaps) / len(gaps)

    def _reference_figure(self, name: str, seed: int) -> float | None:
        return self._reference_rows[seed].measures.get(name, Measure(None)).value

    def _changed(self, subject: nn.Module) -> float:
        before = dict(self._original.named_parameters())
        changed = sum(
            int((p.detach() != before[name].detach()).sum()) for name, p in subject.named_parameters()
        )
        return changed / max(1, sum(p.numel() for p in before.values()))

    def _layers(self, subject: nn.Module) -> dict[str, float | None]:
        try:
            moved = layer_distance(subject, self._original, relative=False)
        except ValueError:  # a method that replaces parameters has no counterpart for them
            return {}
        squares: dict[str, list[float]] = {}
        for name, distance in moved.items():
            entry = squares.setdefault(layer_of(name), [0.0, 0.0])
            entry[0] += distance**2
            entry[1] += self._norms[name] ** 2
        return {
            layer: math.sqrt(distance / norm) if norm else (None if distance else 0.0)
            for layer, (distance, norm) in squares.items()
        }

    def _loss_counts(self, subject: nn.Module) -> dict[str, list[int]]:
        counts = {}
        for name, data in (("forget", self._task.sets["forget"]), ("test", self._task.unseen)):
            try:
                with seeded(0, *self._task.sets.values()):
                    counts[name] = _histogram(_losses(subject, data))
            except Exception:  # without labels there is no loss; the figures above say so
                continue
        return counts

    def _path(self, job: Job, seed: int) -> Path | None:
        if self._cache is None:
            return None
        try:
            name = key(
                format=FORMAT,
                kind=job.kind,
                method=job.name,
                function=job.function,
                settings=job.settings,
                seed=seed,
                weights=self._weights,
                model=callable_name(type(self._original)),
                data=self._task.fingerprints,
                reference=self._references.key(seed),
                metrics=self._metrics,
                environment=environment(self._original),
            )
        except NoKeyError:
            return None
        return self._cache / f"row-{name[:32]}.json"


def described(settings: Mapping[str, Any]) -> dict[str, object]:
    """Tell settings in short: what is long, such as importances, by its kind.

    Args:
        settings: Keyword arguments of a method.

    Returns:
        Plain values by name.

    Example:
        >>> described({"alpha": 2.0, "importance": {"weight": torch.ones(2, 2)}})
        {'alpha': 2.0, 'importance': 'dict of 1'}
    """
    told: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Tensor):
            told[name] = f"tensor {list(value.shape)}"
        elif isinstance(value, Mapping):
            told[name] = f"{type(value).__name__} of {len(value)}"
        elif isinstance(value, (nn.Module, torch.Generator)) or (
            isinstance(value, Iterable) and not isinstance(value, (str, list, tuple, set, frozenset, range))
        ):
            told[name] = type(value).__name__
        else:
            text = plain(value)
            told[name] = text if len(str(text)) <= 200 else f"{type(value).__name__}, {len(str(text))} long"
    return told


def _read_row(path: Path | None, label: str) -> Row | None:
    if path is None or not path.exists():
        return None
    try:
        row = Row.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # cut short or not ours: run again
        return None
    return replace(row, label=label)


def _losses(model: nn.Module, data: Batches) -> Tensor:
    with borrowed(model), torch.no_grad():
        parts = [losses.cross_entropy(model, batch).cpu() for batch in read_batches(data, device_of(model))]
    return torch.cat(parts).double()


def _histogram(values: Tensor) -> list[int]:
    inside = values[torch.isfinite(values)].clamp(LOSS_EDGES[0], LOSS_EDGES[-1] * (1 - 1e-9))
    counts, _ = np.histogram(inside.numpy(), np.array(LOSS_EDGES))
    counts[-1] += int((~torch.isfinite(values)).sum())
    return cast("list[int]", counts.tolist())


def _attempt(measure: Callable[..., float], *arguments: object) -> Measure:
    try:
        value = float(measure(*arguments))
    except Exception as error:
        return Measure(None, _reason(error))
    return Measure(value) if math.isfinite(value) else Measure(None, f"it came to {value}")


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    named = isinstance(error, (ValueError, LookupError, ImportError, NotImplementedError)) and text
    if isinstance(error, KeyError):
        named = False
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if named else f"{type(error).__name__}: {text}".rstrip(": ")
