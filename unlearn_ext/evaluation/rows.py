"""Rows of a comparison."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.plain import plain
from unlearn_ext.evaluation.metrics.measures import Measure

Method: TypeAlias = Callable[..., object]

# Raised when a row means something else than before, so that rows cached earlier are not taken for it.
FORMAT = 2

# Edges of the loss histograms: powers of ten, so that the losses of well-learned samples do not share a bar.
LOSS_EDGES: tuple[float, ...] = tuple(10 ** (step / 4) for step in range(-20, 9))


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
        reached: Whether the method reached its goal; None where it has none or nothing was run.
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
    reached: bool | None = None

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


def row_text(row: Row) -> str:
    """Tell a row in JSON for the cache, with a digest of it.

    Args:
        row: The row.

    Returns:
        What ``read_row`` reads.
    """
    record = json.loads(json.dumps(plain(asdict(row))))  # as it will be read
    return json.dumps({**record, "digest": _digest(record)})


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_row(path: Path | None, label: str) -> Row | None:
    """Read a row from the cache.

    Args:
        path: Its file, or None where nothing is cached.
        label: What to call it.

    Returns:
        The row, or None if there is none that can be read, or another than was written. Rows of earlier
        versions, which have no digest, are read.
    """
    if path is None or not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        digest = record.pop("digest", None)
        if digest is not None and digest != _digest(record):
            return None
        row = Row.from_dict(record)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # cut short or not ours: run again
        return None
    return replace(row, label=label)
