"""FSDP2 models (``fully_shard``): their gathered parameters, and what is sharded like them.

Only public functions of PyTorch: ``FSDPModule.unshard`` and ``reshard``, and ``DTensor``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.names import plain_name
from unlearn_ext._internal.undo import Undone

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def fsdp_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """List the parts of a model that ``fully_shard`` was applied to.

    Args:
        model: The model.

    Returns:
        Name and module of each; none where nothing is sharded.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


def reshard(model: nn.Module) -> None:
    """Free gathered parameters: ``named_parameters`` gives shards then, and what is written to them counts.

    A root module stays gathered after a forward pass without a backward pass.

    Args:
        model: The model.
    """
    for _, module in fsdp_modules(model):
        module.reshard()


class ShardedModel:
    """A model with FSDP2 in it, all of it on one device mesh.

    Args:
        model: The model.
        who: Whose message an error is.

    Attributes:
        model: As given.
        mesh: The mesh.
        shards: Plain name to sharded parameter; a plain tensor for what FSDP2 was told to ignore.

    Raises:
        NotImplementedError: If parameters are sharded in another way, on several meshes, or not in memory.
    """

    def __init__(self, model: nn.Module, who: str) -> None:
        self.model = model
        reshard(model)
        self.shards: dict[str, nn.Parameter] = {
            plain_name(name): parameter for name, parameter in model.named_parameters()
        }
        self.mesh = _mesh_of(self.shards, who)
        self._groups = [self.mesh.get_group(dim) for dim in range(self.mesh.ndim)]
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(f"{who}: this process must be in the mesh that the model is sharded over")
        self.is_first = not any(coordinate)

    @property
    def device(self) -> torch.device:
        """Where agreements are exchanged, and passes run."""
        kind = self.mesh.device_type
        return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)

    def reduced(self, numbers: Tensor, op: Any = None) -> Tensor:  # noqa: ANN401 - an enum of c10d
        """Reduce a tensor of numbers over all ranks of the mesh.

        Args:
            numbers: Any shape, the same on all ranks.
            op: A ``ReduceOp``; the least by default.

        Returns:
            The result on the CPU, the same on all ranks.
        """
        moved = numbers.to(self.device)
        moved = moved.clone() if moved is numbers else moved
        for group in self._groups:
            dist.all_reduce(moved, op=dist.ReduceOp.MIN if op is None else op, group=group)
        return moved.cpu()

    def exchanged(self, value: object) -> list[Any]:
        """Tell all ranks of the mesh something, and hear the same of them.

        Args:
            value: Anything that can be pickled.

        Returns:
            The values, in the same order on all ranks.
        """
        values = [value]
        for group in reversed(self._groups):
            gathered: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(gathered, values, group=group)
            values = [each for part in gathered for each in part]
        return values

    def leaves(self) -> dict[str, nn.Parameter]:
        """Return the gathered parameters, which stand in autograd's graph; their values are freed again.

        Returns:
            Plain name to parameter, for all; one group of them is gathered at a time.
        """
        found = {name: p for name, p in self.shards.items() if not is_dtensor(p)}
        for prefix, module in fsdp_modules(self.model):
            with Undone(module.reshard):
                module.unshard()
                for name, parameter in module.named_parameters(prefix=prefix):
                    if not is_dtensor(parameter):
                        found.setdefault(plain_name(name), parameter)
        return {name: found[name] for name in self.shards}

    def zeros_like(self, name: str) -> Tensor:
        """Make an accumulator that is sharded like a parameter.

        Args:
            name: The parameter.

        Returns:
            Zeros: float64 for double parameters, else float32.
        """
        shard = self.shards[name].detach()
        return torch.zeros_like(shard, dtype=torch.float64 if shard.dtype == torch.float64 else torch.float32)

    def add_reduced(self, total: Tensor, full: Tensor) -> None:
        """Add, over all ranks, what each has for the whole of a parameter: a reduce-scatter.

        Args:
            total: The accumulator, written in place.
            full: This rank's contribution, of the whole shape.
        """
        if not is_dtensor(total):
            for group in self._groups:
                dist.all_reduce(full, group=group)
            total.add_(full)
            return
        from torch.distributed.tensor import DTensor, Partial

        sharded: DTensor = total  # type: ignore[assignment]
        parts = [Partial("sum")] * self.mesh.ndim
        whole = DTensor.from_local(full, sharded.device_mesh, parts, run_check=False)
        own = whole.redistribute(placements=sharded.placements).to_local()
        sharded.to_local().add_(own.to(sharded.to_local().device))

    @contextmanager
    def resharded(self) -> Iterator[None]:
        """Leave the model with its shards in place, whatever has happened.

        Yields:
            Nothing.
        """
        is_whole = False

        def put_back() -> None:
            for _, module in fsdp_modules(self.model):
                if getattr(module, "reset_iter_state", None) is not None and not is_whole:
                    # Only a root can be reset, and only one that has run.
                    with suppress(RuntimeError, AttributeError):
                        module.reset_iter_state()
                module.reshard()

        with Undone(put_back):
            yield
            is_whole = True


def _mesh_of(shards: dict[str, nn.Parameter], who: str) -> DeviceMesh:
    from torch.distributed.tensor import Replicate, Shard

    mesh: DeviceMesh | None = None
    for name, parameter in shards.items():
        if parameter.device.type == "meta":
            raise NotImplementedError(
                f"{who}: model must have its parameters in memory, got {name} on the meta device; call "
                "to_empty and load the weights first"
            )
        if not is_dtensor(parameter):
            continue
        sharded: DTensor = parameter  # type: ignore[assignment]
        if mesh is not None and sharded.device_mesh != mesh:
            raise NotImplementedError(
                f"{who}: model must be sharded over one device mesh, got {name} on {sharded.device_mesh} "
                f"beside {mesh} (tensor or expert parallelism?); call it on one that only fully_shard has "
                "sharded"
            )
        mesh = sharded.device_mesh
        places = sharded.placements
        kinds = [type(place) for place in places]
        if kinds not in ([Shard], [Replicate], [Replicate, Shard]):
            raise NotImplementedError(
                f"{who}: model must be sharded by fully_shard alone, over one or two mesh dimensions, got "
                f"{name} with placements {places}"
            )
    if mesh is None:
        raise NotImplementedError(
            f"{who}: model must have a parameter that fully_shard has sharded, got none"
        )
    return mesh
