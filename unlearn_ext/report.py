"""``ux.report``: records of what was done to a model and of what was measured."""

from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.files import write_text
from unlearn_ext._internal.names import layer_name as layer_of
from unlearn_ext.evaluation.evidence import (
    DERIVED,
    DERIVED_ALWAYS,
    EXAMINATIONS,
    Evidence,
    changed_per_layer,
    environment,
    evidence,
    forget_digest,
)
from unlearn_ext.evaluation.seal import read_record
from unlearn_ext.evaluation.traces import files_written, purge
from unlearn_ext.results import NOTICE, UnlearnResult

__all__ = [
    "DERIVED",
    "DERIVED_ALWAYS",
    "EXAMINATIONS",
    "NOTICE",
    "Evidence",
    "UnlearnResult",
    "changed_per_layer",
    "environment",
    "evidence",
    "files_written",
    "forget_digest",
    "layer_of",
    "purge",
    "read_record",
    "weights_digest",
    "write_text",
]
