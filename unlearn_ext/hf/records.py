"""A record of what was unlearned, beside the weights it is about."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from unlearn_ext._internal.digests import weights_digest
from unlearn_ext.evaluation.evidence import Evidence
from unlearn_ext.evaluation.seal import read_record

EVIDENCE_FILE = "unlearning_evidence.json"


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    evidence: Evidence,
    **settings: Any,  # noqa: ANN401 - those of the model's own save_pretrained
) -> Path:
    """Save a model as its own ``save_pretrained`` does, and the record of its unlearning beside it.

    Args:
        model: A model of transformers or PEFT, with the weights that the record is about.
        folder: Where to.
        evidence: What ``ux.report.evidence`` returned.
        **settings: Further arguments of ``model.save_pretrained``.

    Returns:
        The record's file, ``unlearning_evidence.json``. The salt of the forgotten ids is not in it.

    Raises:
        TypeError: If the model has no ``save_pretrained``.
        ValueError: If the record is about other weights; nothing is written then.
    """
    if not callable(getattr(model, "save_pretrained", None)):
        raise TypeError(f"save_pretrained: model must have save_pretrained, got {type(model).__name__}")
    found = weights_digest(model)
    if found != evidence.weights_after:
        raise ValueError(
            f"save_pretrained: evidence must be about the weights of this model, {found[:12]}..., got "
            f"{evidence.weights_after[:12]}...: the model has changed since, or is another one"
        )
    path = Path(folder) / EVIDENCE_FILE
    model.save_pretrained(folder, **settings)  # type: ignore[operator]
    evidence.to_json(path)
    return path


def read_evidence(
    folder: str | os.PathLike[str], model: nn.Module | None = None, *, key: bytes | None = None
) -> dict[str, Any]:
    """Read the record beside a saved model.

    Args:
        folder: Where the model was saved.
        model: The model as it was loaded from there, to be compared with the record.
        key: The secret that the record was signed with; None leaves the signature unchecked.

    Returns:
        The record, as ``Evidence.to_json`` has written it.

    Raises:
        FileNotFoundError: If there is none.
        TypeError: If the key is not bytes.
        ValueError: If the record has been edited since, or is not signed by the key, or if the model's
            weights are not those that it is about, bit for bit (a conversion to another dtype while loading
            is enough).
    """
    record = read_record(Path(folder) / EVIDENCE_FILE, key)
    if model is not None and (found := weights_digest(model)) != record["weights_after"]:
        raise ValueError(
            f"read_evidence: model must have the weights of the record, {record['weights_after'][:12]}..., "
            f"got {found[:12]}...: another model, or loaded in another dtype"
        )
    return record
