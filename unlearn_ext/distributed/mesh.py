"""The ranks of a sharded model's mesh, and how they agree where every pass is a collective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext._internal.checksum import checksum
from unlearn_ext._internal.dtensors import is_dtensor, local_of
from unlearn_ext.distributed.forward import calls_once, counted_passes
from unlearn_ext.distributed.fsdp import ShardedModel, reshard
from unlearn_ext.distributed.group import Ranks
from unlearn_ext.distributed.reduce import sum_in_order
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch


class MeshRanks(Ranks):
    """All ranks of the mesh that a model is sharded over, in the order of their coordinates.

    A pass over the model is a collective, so that what a rank does between two exchanges, all must do. A rank
    that fails at another place than inside a pass tells the others at the exchange that comes next, which is
    why every pass begins with one. What fails inside (``in_collectives``) cannot be told: the others are in
    collectives of the model's then, until the process group's timeout.

    Args:
        model: A model that ``fully_shard`` has sharded.
        who: The function that is called.

    Attributes:
        sharded: The model and its mesh.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.sharded = ShardedModel(model, who)
        mesh = self.sharded.mesh
        super().__init__(None, who)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None  # which ShardedModel has seen to
        self.world, self.rank, self._place = mesh.size(), 0, coordinate[-1]
        for dim, at in enumerate(coordinate):
            self.rank = self.rank * mesh.size(dim) + at

    def begin(self, step: str) -> ShardedModel:
        """Meet before a pass: with shards in place, and none of the ranks having failed since the last.

        Args:
            step: Where the ranks are.

        Returns:
            The model.
        """
        self.exchange(step, None)
        reshard(self.sharded.model)
        return self.sharded

    @contextmanager
    def in_pass(self, task: Task, batches: Sequence[Batch] = ((),)) -> Iterator[None]:
        """Mark what fails in forward passes as what nobody can be told of, but for what comes after one.

        An exchange must follow; labels that do not fit the outputs, say, are told there, when the passes that
        were still to come have been made.

        Args:
            task: What the model is called for.
            batches: What it is called on, a pass each.

        Yields:
            Nothing.
        """
        with counted_passes(self.sharded.model) as passes:
            try:
                yield
            except Exception:
                begun, ended = passes
                with self.in_collectives():
                    if not (calls_once(task) and begun == ended and 0 < ended <= len(batches)):
                        raise
                    with torch.no_grad():
                        for batch in batches[ended:]:
                            task.forward(self.sharded.model, batch)
                raise

    def check_copies(self, when: str) -> None:
        """Compare what several ranks hold of the model: what is not sharded, and shards of a hybrid mesh.

        Args:
            when: For the message: "at the start", or what has happened since.

        Raises:
            ValueError: On every rank, where copies differ.
        """
        own = {}
        for name, tensor in {**self.sharded.shards, **dict(self.sharded.model.named_buffers())}.items():
            local = local_of(tensor.detach())
            own[name] = checksum(local) if local.numel() and local.element_size() in (2, 4, 8) else 0
        whole = {name: value for name, value in own.items() if not self._is_cut(name)}
        told = self.exchange(f"copies {when}", (self._place, own, whole))
        for rank, (other, values, plain) in enumerate(told):
            first = next(each for each in told if each[0] == other)
            differing = [name for name in whole if plain[name] != told[0][2][name]]
            differing += [name for name in values if values[name] != first[1][name]]
            if differing:
                raise ValueError(
                    f"{self.who}: copies of one part of the model must be the same on all ranks {when}, got "
                    f"other values of {differing[0]} on rank {rank}; send one rank's to the others with "
                    "torch.distributed.broadcast"
                )

    def _is_cut(self, name: str) -> bool:
        tensor = self.sharded.shards.get(name)
        return tensor is not None and is_dtensor(tensor)

    def _gathered(self, message: Any) -> list[Any]:  # noqa: ANN401 - what an exchange brings
        with self.in_collectives():
            return self.sharded.exchanged(message)

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        mesh = self.sharded.mesh
        for dim in reversed(range(mesh.ndim)):
            sum_in_order(tensors, mesh.get_group(dim))
