"""``ux.data``: batches, what a model answers to them, and splitting a data set, also over processes."""

from unlearn_ext.distributed.shards import shard_batches
from unlearn_ext.tasks.batches import (
    Batch,
    Batches,
    check_batches,
    count_samples,
    device_of,
    is_per_sample,
    map_tensors,
    read_batches,
    take_samples,
    tensors_in,
)
from unlearn_ext.tasks.outputs import logits, scores_and_labels, targets, with_targets
from unlearn_ext.tasks.pairs import forget_and_retain
from unlearn_ext.tasks.split import split

__all__ = [
    "Batch",
    "Batches",
    "check_batches",
    "count_samples",
    "device_of",
    "forget_and_retain",
    "is_per_sample",
    "logits",
    "map_tensors",
    "read_batches",
    "scores_and_labels",
    "shard_batches",
    "split",
    "take_samples",
    "targets",
    "tensors_in",
    "with_targets",
]
