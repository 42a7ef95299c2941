"""A record of what was done to a model and of what was measured, for the file."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.files import write_text
from unlearn_ext._internal.names import layer_name, parameters_by_name
from unlearn_ext._internal.plain import plain
from unlearn_ext.evaluation.metrics.registry import REGISTRY
from unlearn_ext.evaluation.seal import sealed
from unlearn_ext.evaluation.traces import check_destroyable, destroy
from unlearn_ext.results import NOTICE, UnlearnResult

_SALT_BYTES = 16


def forget_digest(ids: Iterable[object], salt: bytes) -> str:
    """Return the salted hash of a set of ids: HMAC-SHA256 of each, sorted, hashed together.

    Whoever holds the salt can check later that a set of ids is the recorded one; without it the ids cannot
    be guessed from the hash. The order does not matter.

    Args:
        ids: Strings, bytes or integers.
        salt: At least 16 random bytes, to be kept apart from the record.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If an id is neither a string nor bytes nor an integer.
        ValueError: If the salt is shorter than 16 bytes, or an id comes twice.

    Example:
        >>> salt = bytes(range(16))
        >>> forget_digest(["anna", "bo"], salt) == forget_digest(["bo", "anna"], salt)
        True
    """
    if len(salt) < _SALT_BYTES:
        raise ValueError(f"forget_digest: salt must have at least {_SALT_BYTES} bytes, got {len(salt)}")
    codes = [hmac.digest(salt, _id_bytes(entry), "sha256") for entry in ids]
    if len(set(codes)) < len(codes):
        raise ValueError(f"forget_digest: ids must be distinct, got {len(codes) - len(set(codes))} repeated")
    return hashlib.sha256(b"".join(sorted(codes))).hexdigest()


def environment(model: nn.Module) -> dict[str, str]:
    """Say what a model runs on.

    Args:
        model: The model.

    Returns:
        Versions of unlearn_ext, torch and Python, the device, the dtypes of the parameters.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return {
        "unlearn_ext": str(getattr(sys.modules["unlearn_ext"], "__version__", "unknown")),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": f"{device}{name}",
        "dtype": ", ".join(dtypes) or "none",
    }


def changed_per_layer(result: UnlearnResult, model: nn.Module) -> dict[str, float]:
    """Sum up ``changed_per_parameter`` by module.

    Args:
        result: The record of a run.
        model: The model it was run on.

    Returns:
        Name of the module that owns the parameters to the share of its scalars that changed.
    """
    counts: dict[str, list[float]] = {}
    for name, parameter in parameters_by_name(model).items():
        entry = counts.setdefault(layer_name(name), [0.0, 0.0])
        entry[0] += result.changed_per_parameter.get(name, 0.0) * parameter.numel()
        entry[1] += parameter.numel()
    return {layer: changed / max(1, size) for layer, (changed, size) in counts.items()}


# What of a method's making still holds something of the forget set afterwards.
DERIVED: Mapping[str, tuple[str, ...]] = {
    "ssd": (
        "importances on the forget set and on the full set",
        "the undo journal of the plan: original values of the dampened scalars (SsdPlan.purge)",
    ),
    "pgu": ("activation Gram matrices of the full set, unless the forget set's part was taken off",),
    "gradient_masking": ("scores and masks computed from the forget set",),
    "salun": ("scores and masks computed from the forget set",),
    "unsir": ("noise learned from the model as it was",),
    "fisher_forgetting": ("importances on the retain set, measured on the model as it was",),
}

DERIVED_ALWAYS: tuple[str, ...] = (
    "the weights from before: checkpoints, backups, optimizer states",
    "models made from them: fine-tuned, distilled, quantised, exported or published ones",
    "the forget data itself and what was computed from it: caches, embeddings, indices, logs",
)

# What a full examination would contain besides, and no metric covers.
_NOT_COVERED = (
    "membership inference with shadow models, sample by sample",
    "extraction or reconstruction of the forgotten data",
    "influence through samples that resemble the forgotten ones",
)


def _examinations() -> dict[str, frozenset[str]]:
    covered: dict[str, set[str]] = {}
    for entry in REGISTRY.values():
        if entry.examines is not None:
            names = {entry.name, entry.asked_as, *entry.other_names}
            covered.setdefault(entry.examines, set()).update(names)
    listed = {what: frozenset(names) for what, names in covered.items()}
    return {**listed, **dict.fromkeys(_NOT_COVERED, frozenset())}


# What a full examination would contain, and the metrics that cover it.
EXAMINATIONS: Mapping[str, frozenset[str]] = _examinations()


@dataclass(frozen=True, slots=True)
class Evidence:
    """The record of one unlearning run with what is needed to judge it later. Made by ``evidence``.

    Attributes:
        result: What the method recorded.
        created: Time of the record, UTC, ISO 8601.
        environment: Versions, device, dtype.
        seeds: Seeds of the run.
        weights_before: SHA-256 of the weights before.
        weights_after: The same after.
        forget_count: Number of forgotten ids; None if no ids were given.
        forget_digest: Their salted hash; None if no ids were given.
        changed_per_layer: Share of changed scalars per module.
        metrics: What was measured; a metric that could not be computed is there with ``why``.
        reference: What the metrics are compared with.
        not_tested: What was not examined.
        derived: What else derives from the forget data, to whether ``purge`` has destroyed it here.
        salt: Salt of ``forget_digest``. It is not part of the record: keep it apart, or drop it.
    """

    result: UnlearnResult
    created: str
    environment: Mapping[str, str]
    seeds: tuple[int, ...]
    weights_before: str
    weights_after: str
    forget_count: int | None
    forget_digest: str | None
    changed_per_layer: Mapping[str, float]
    metrics: Mapping[str, object]
    reference: str
    not_tested: tuple[str, ...]
    derived: dict[str, bool]
    salt: bytes | None = field(default=None, repr=False)
    _objects: dict[str, object] = field(default_factory=dict, repr=False)

    def to_json(self, path: str | Path | None = None, *, key: bytes | None = None) -> str:
        """Return the record as a JSON object, and write it to a file if asked to.

        Args:
            path: File to write, all or nothing.
            key: A secret of at least 16 bytes to sign the record with; ``read_record`` checks it.

        Returns:
            Strict JSON, with the digest of the record and its signature. The salt is not in it.

        Raises:
            TypeError: If the key is not bytes.
            ValueError: If it is too short; nothing is written then.
        """
        hidden = ("result", "salt", "_objects", "derived")
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        derived = [{"what": what, "purged_here": purged} for what, purged in self.derived.items()]
        record = plain({**asdict(self.result), **own, "derived": derived, "notice": NOTICE})
        text = json.dumps(sealed(cast("dict[str, Any]", record), key), indent=2)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def purge(self) -> None:
        """Destroy what was given as ``derived``, and drop the references to it.

        Tensors are overwritten with zeros, files deleted, objects with a ``purge()`` of their own told so;
        in mappings and sequences everything is. A file system or a device may keep older copies of the same
        bits; this does not reach them. A second call does nothing.

        Raises:
            OSError: If a file cannot be deleted. What was destroyed by then is marked so.
        """
        for what in list(self._objects):
            destroy(self._objects[what])
            del self._objects[what]
            self.derived[what] = True


def evidence(
    result: UnlearnResult,
    *,
    model: nn.Module,
    before: str,
    forget_ids: Iterable[object] | None = None,
    salt: bytes | None = None,
    seeds: Iterable[int] = (),
    metrics: Mapping[str, object] | None = None,
    reference: nn.Module | str | None = None,
    not_tested: Iterable[str] | None = None,
    derived: Mapping[str, object] | None = None,
) -> Evidence:
    """Put together the record of an unlearning run.

    It says what was changed and measured, and what was not. It is no proof of erasure: no measurement of a
    model can be one.

    Args:
        result: What the method returned.
        model: The model as it is now.
        before: ``weights_digest(model)`` from before the run.
        forget_ids: Ids of the forgotten records: strings, bytes or integers. Only their number and a salted
            hash are kept.
        salt: For that hash; 16 fresh random bytes by default. See ``Evidence.salt``.
        seeds: Seeds of the run.
        metrics: What was measured, by name: numbers, or records such as ``metrics.Attack`` or
            ``comparison.Measure``.
        reference: What the metrics are compared with: a retrained model (recorded by its digest), or words.
        not_tested: What was not examined; by default worked out from ``metrics``. More can be added.
        derived: Objects and files (``Path``) that derive from the forget data, by what they are, for
            ``Evidence.purge``: tensors, mappings and sequences of them, anything with a ``purge()``.

    Returns:
        The record.

    Raises:
        TypeError: If an id or a derived object is of another kind, or a text stands where many are asked for.
        ValueError: If ``before`` is no SHA-256, or that of the weights now although the run has changed them,
            if the run was on a model of other parameters, or an id comes twice.

    Example:
        >>> from unlearn_ext import ssd
        >>> model = nn.Linear(2, 2)
        >>> before = weights_digest(model)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(12, 2), torch.ones(12, dtype=torch.long))]
        >>> record = evidence(ssd(model, forget, retain), model=model, before=before, forget_ids=range(4))
        >>> record.forget_count, record.weights_before == before
        (4, True)
    """
    if not re.fullmatch("[0-9a-f]{64}", before):
        raise ValueError(f"evidence: before must be a digest of weights_digest(), got {before!r}")
    # A text is a sequence as well, of its letters.
    for name, given in {"forget_ids": forget_ids, "seeds": seeds, "not_tested": not_tested}.items():
        if isinstance(given, (str, bytes)):
            raise TypeError(f"evidence: {name} must be a sequence, got {given!r}; pass [{given!r}]")
    after = weights_digest(model)
    _check_run(result, model, is_changed=after != before)
    objects = dict(derived or {})
    for what, value in objects.items():
        check_destroyable(f"evidence: derived[{what!r}]", value)
    measured = dict(metrics or {})
    count = code = None
    if forget_ids is not None:
        ids = list(forget_ids)
        salt = os.urandom(_SALT_BYTES) if salt is None else salt
        count, code = len(ids), forget_digest(ids, salt)
    if isinstance(reference, nn.Module):
        reference = f"a model with the weights {weights_digest(reference)}"
    listed = (*DERIVED.get(result.method, ()), *DERIVED_ALWAYS)
    return Evidence(
        result=result,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(model),
        seeds=tuple(seeds),
        weights_before=before,
        weights_after=after,
        forget_count=count,
        forget_digest=code,
        changed_per_layer=changed_per_layer(result, model),
        metrics=measured,
        reference=reference or "none: the figures stand alone",
        not_tested=tuple(_not_tested(measured) if not_tested is None else not_tested),
        derived={**dict.fromkeys(listed, False), **dict.fromkeys(objects, False)},
        salt=salt if forget_ids is not None else None,
        _objects=objects,
    )


def _check_run(result: UnlearnResult, model: nn.Module, *, is_changed: bool) -> None:
    others = set(result.changed_per_parameter) - set(parameters_by_name(model))
    if others:
        raise ValueError(
            f"evidence: model must be the one of the run, got one without its parameter {min(others)}"
        )
    if result.changed and not is_changed:
        raise ValueError(
            f"evidence: before must be from before the run, got the digest of the weights as they are now, "
            f"though {100 * result.changed:.1f}% of them have changed; take weights_digest(model) ahead of it"
        )


def _not_tested(metrics: Mapping[str, object]) -> list[str]:
    covered = {name for name, value in metrics.items() if _is_measured(value)}
    return [what for what, names in EXAMINATIONS.items() if not names & covered]


def _is_measured(value: object) -> bool:
    if isinstance(value, Mapping):
        return value.get("why") is None
    is_nan = plain(value) == "nan"  # computed, and no figure
    return value is not None and not is_nan and getattr(value, "why", None) is None


def _id_bytes(entry: object) -> bytes:
    plain = entry.tolist() if hasattr(entry, "tolist") else entry
    if isinstance(plain, bytes):
        return b"b" + plain
    if isinstance(plain, bool) or not isinstance(plain, (str, int)):
        raise TypeError(f"forget_digest: ids must be strings, bytes or integers, got {type(plain).__name__}")
    return f"{'s' if isinstance(plain, str) else 'i'}{plain}".encode()
