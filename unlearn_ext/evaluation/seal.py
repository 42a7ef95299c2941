"""Seals on records: whoever edits one afterwards is noticed."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KEY_BYTES = 16


def sealed(record: Mapping[str, Any], key: bytes | None = None) -> dict[str, Any]:
    """Add a digest to a record, and a signature if there is a key.

    The digest tells of a slip; only the signature tells of somebody who edits on purpose, and computes the
    digest anew. It is symmetric: whoever can check it can also make it.

    Args:
        record: Plain values, as JSON holds them.
        key: A secret of at least 16 bytes, for HMAC-SHA-256.

    Returns:
        The record with ``digest`` (SHA-256 of its canonical form) and ``signature`` (None without a key).

    Raises:
        TypeError: If the key is not bytes.
        ValueError: If the key is too short.

    Source:
        The canonical form is JSON with sorted keys, without spaces, in ASCII. HMAC: RFC 2104.
    """
    _check_key(key)
    canonical = _canonical(record)
    return {
        **record,
        "digest": hashlib.sha256(canonical).hexdigest(),
        "signature": None if key is None else hmac.digest(key, canonical, "sha256").hex(),
    }


def read_record(source: str | os.PathLike[str], key: bytes | None = None) -> dict[str, Any]:
    """Read a record of ``Evidence.to_json``, unless it has been edited since.

    Args:
        source: The file, or the JSON text itself.
        key: The secret that the record was signed with; None leaves the signature unchecked.

    Returns:
        The record.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If the key is not bytes.
        ValueError: If the record is not JSON, has no digest or another one than its contents, or if its
            signature is missing or not by this key.

    Example:
        >>> text = json.dumps(sealed({"method": "ssd"}, key=b"sixteen bytes or more"))
        >>> read_record(text, key=b"sixteen bytes or more")["method"]
        'ssd'
        >>> read_record(text.replace("ssd", "pgu"))
        Traceback (most recent call last):
        ValueError: read_record: the record must be as it was written, got another digest than that of its ...
    """
    _check_key(key)
    text = os.fspath(source)
    if not text.lstrip().startswith("{"):
        text = Path(text).read_text(encoding="utf-8")
    try:
        found = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"read_record: the record must be JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("digest"), str):
        raise ValueError("read_record: the record must have a digest, got none")
    contents = {name: value for name, value in found.items() if name not in ("digest", "signature")}
    canonical = _canonical(contents)
    if not hmac.compare_digest(hashlib.sha256(canonical).hexdigest().encode(), found["digest"].encode()):
        raise ValueError(
            "read_record: the record must be as it was written, got another digest than that of its contents"
        )
    if key is not None:
        signature = found.get("signature")
        if not isinstance(signature, str):
            raise ValueError("read_record: the record must be signed, got no signature")
        if not hmac.compare_digest(hmac.digest(key, canonical, "sha256").hex().encode(), signature.encode()):
            raise ValueError("read_record: the record must be signed by this key, got another signature")
    return found


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of a key that stands there twice, readers may see either value.
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _check_key(key: bytes | None) -> None:
    if key is None:
        return
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, got {type(key).__name__}")
    if len(key) < _KEY_BYTES:
        raise ValueError(f"key must have at least {_KEY_BYTES} bytes, got {len(key)}")
