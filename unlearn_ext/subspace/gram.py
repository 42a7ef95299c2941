"""Which directions a data set uses of every layer's inputs, and which are free.

A layer's output depends on its weight through products with *rows*: the input vectors of a linear layer, the
patches that a convolution's kernel sees. Their second moment, the activation Gram matrix X^T X, tells what a
change of the weight does to the outputs: along directions in which X has nothing, nothing.

Which side of the weight the rows meet depends on the layer:

    layer                        rows                        output             free change of the weight W
    Linear, MultiheadAttention   input vectors               x W^T              D (I - U U^T), W as [out, d]
    Conv1d/2d/3d                 patches, per group          patch W^T          the same, W as [out, d]
    ConvTranspose1d/2d/3d        input pixels, per group     x W, overlaid      (I - U U^T) D, W as [d, ...]
    Conv1D (Hugging Face)        input vectors               x W                (I - U U^T) D
    Embedding                    one-hot tokens              a row of W         rows of tokens that are absent

For a transposed convolution the overlay is linear and comes after the product, so stride, padding and
dilation do not matter. An embedding's Gram matrix is diagonal: it is kept as the tokens' counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.files import FileKind, names_in
from unlearn_ext._internal.modules import check_model, eager
from unlearn_ext._internal.names import chosen_names, modules_by_name, plain_module_name, with_plain_names
from unlearn_ext.distributed import Group, Ranks, lockstep_or_sharded, ranks_of
from unlearn_ext.distributed.fsdp import fsdp_modules, reshard
from unlearn_ext.resume import Progress
from unlearn_ext.subspace.layers import Layer, layer_of
from unlearn_ext.subspace.sharded_gram import sharded_totals
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, count_samples, device_of
from unlearn_ext.tasks.losses import resolve

_FILE = FileKind(
    "unlearn_ext.activation_gram.1",
    owner="ActivationGram",
    contents="Gram matrices",
    instance="a saved ActivationGram",
    facts=("modules", "n_samples"),
)


class ActivationGram(Mapping[str, Tensor]):
    """Second moments of the inputs of a model's layers over one data set.

    A mapping from names of ``model.named_modules()`` to float64 totals: ``[d, d]``, the sum of X^T X over all
    rows; ``[q, d, d]`` for a layer with q groups (``[3, d, d]`` for a ``MultiheadAttention``: queries, keys,
    values); the diagonal ``[V]``, counts of the tokens, for an ``Embedding``. They are sums, not means: ``+``
    joins two data sets and ``-`` takes one out, exactly but for rounding. The tensors are shared, not copied.

    Totals on data that has since been forgotten still tell about it. Keep the difference, not the whole.

    Args:
        tensors: Module name to total, float64.
        n_samples: Number of samples they are a sum over, >= 1.

    Attributes:
        n_samples: Number of samples.

    Raises:
        ValueError: If a shape or the number of samples is impossible.
        TypeError: If a total is not float64.

    Example:
        >>> a = ActivationGram({"fc": torch.eye(2).double()}, n_samples=1)
        >>> (a + a)["fc"], (a + a - a).n_samples
        (tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64), 1)
    """

    __slots__ = ("_tensors", "n_samples")

    def __init__(self, tensors: Mapping[str, Tensor], n_samples: int) -> None:
        if n_samples < 1:
            raise ValueError(f"ActivationGram: n_samples must be at least 1, got {n_samples}")
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float64:
                raise TypeError(f"ActivationGram: {name} must be float64, got {tensor.dtype}")
            if tensor.ndim not in (1, 2, 3) or (tensor.ndim > 1 and tensor.shape[-1] != tensor.shape[-2]):
                raise ValueError(
                    f"ActivationGram: {name} must be [d, d], [groups, d, d] or [tokens], "
                    f"got {list(tensor.shape)}"
                )
        self._tensors = with_plain_names(tensors, plain_module_name)
        self.n_samples = n_samples

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name if name in self._tensors else plain_module_name(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return f"ActivationGram({len(self)} modules, n_samples={self.n_samples})"

    def __add__(self, other: ActivationGram) -> ActivationGram:
        """Join two data sets.

        Args:
            other: Totals of the same model on other samples.

        Returns:
            Their sum; a module that only one of them has seen keeps that one's total.

        Raises:
            ValueError: If shapes differ.
        """
        if not isinstance(other, ActivationGram):
            return NotImplemented
        _check_shapes("ActivationGram +", self, other)
        total = {
            name: tensor + other[name].to(tensor.device) for name, tensor in self.items() if name in other
        }
        return ActivationGram({**other, **self, **total}, self.n_samples + other.n_samples)

    def __sub__(self, other: ActivationGram) -> ActivationGram:
        """Take a part of the data set out.

        Args:
            other: Totals on some of this data set's samples: same model, same weights, same inputs.

        Returns:
            The difference. Rounding, or a part that was not measured in the same way, can leave eigenvalues a
            little below 0.

        Raises:
            ValueError: If shapes differ, the part has a module that the whole has not, or no sample remains.
        """
        if not isinstance(other, ActivationGram):
            return NotImplemented
        _check_shapes("ActivationGram -", self, other)
        for name in other:
            if name not in self:
                raise ValueError(f"ActivationGram -: the part must not hold more modules, got {name!r}")
        if self.n_samples <= other.n_samples:
            raise ValueError(
                f"ActivationGram -: the part must be smaller than the whole, got {other.n_samples} of "
                f"{self.n_samples} samples"
            )
        return ActivationGram(
            {
                name: tensor - other[name].to(tensor.device) if name in other else tensor
                for name, tensor in self.items()
            },
            self.n_samples - other.n_samples,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a failure leaves the old file, if any, as it was.

        Args:
            path: The file.

        Raises:
            ImportError: If safetensors is not installed.
        """
        tensors = {str(index): tensor for index, tensor in enumerate(self.values())}
        _FILE.save(path, tensors, {"modules": json.dumps(list(self)), "n_samples": str(self.n_samples)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ActivationGram:
        """Read what ``save`` has written.

        Args:
            path: The file.
            device: Where to put the tensors.

        Returns:
            The totals.

        Raises:
            ImportError: If safetensors is not installed.
            ValueError: If the file holds something else.
        """
        tensors, facts = _FILE.load(path)
        with _FILE.understood(path):
            modules = names_in(facts["modules"], len(tensors))
            return cls(
                {name: tensors[str(i)].to(device) for i, name in enumerate(modules)}, int(facts["n_samples"])
            )


@lockstep_or_sharded
def activation_gram(
    model: nn.Module,
    data: Batches,
    *,
    modules: Iterable[str] | None = None,
    task: Task | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    process_group: Group = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
) -> ActivationGram:
    """Sum X^T X over the inputs of every linear, convolutional and embedding layer.

    Covered are ``Linear``, ``Conv1d/2d/3d`` and ``ConvTranspose1d/2d/3d`` with any stride, padding, dilation
    and groups, ``Embedding``, ``MultiheadAttention`` (its joint input projection; its output projection
    counts as the ``Linear`` it is), and Hugging Face's ``Conv1D``. A layer that runs several times adds up;
    one that does not run has no entry. Rows are raw inputs: not centred, and without the bias's constant 1.

    The model runs in eval mode, without gradients; forward hooks see the inputs, and nothing in the model is
    replaced. A compiled model runs eagerly, since compiled code calls no hooks; names are those that it has
    without a wrapper. Training flags, hooks, buffers and the global random state are as before afterwards,
    also after an exception. Memory is that of the totals, 8 d^2 bytes per layer; patches are never stored as
    a whole.

    Args:
        model: Any model.
        data: Re-iterable batches; labels are not needed.
        modules: Names of the modules to look at; all that are covered by default.
        task: What the model is for, where it takes more than the first entry of a tuple, or than all of a
            mapping but the labels.
        progress: Show a progress bar, where tqdm is installed.
        include: Weights whose inputs to look at: names of them or of their modules, the last parts of such
            names, or regular expressions that match a whole name. None: all.
        exclude: Weights to leave out, likewise.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none; the
            totals are those of all data, with the same bits on every rank. See ``fisher_diagonal``.
        checkpoint: A file for the progress of the pass, which goes on where it was interrupted; see
            ``fisher_diagonal``.
        checkpoint_every: Batches from one writing to the next.

    Returns:
        The totals, on the devices of the weights.

    Raises:
        ValueError: If ``data`` is empty or a one-shot iterator, or ``modules`` names a module that is not
            there or not covered, or no covered layer ran; if ``checkpoint`` is damaged, or of other data,
            weights or settings.
        NotImplementedError: If the model is wrapped for parallel training, sharded in another way than by
            FSDP2 (of which all ranks call it together, and get the totals of all), or not in memory.
        FloatingPointError: If a total is NaN or infinite; the message names the module.

    Source:
        Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021; Hoang, Rana, Gupta &
        Venkatesh, "Learn to Unlearn for Deep Neural Networks", WACV 2024. Their code unfolds convolutions
        with stride 1, whatever the layer's; these rows are the patches that the layer sees. Transposed
        convolutions, embeddings and attention are our design.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> gram = activation_gram(nn.Sequential(model), [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]),)])
        >>> gram["0"].tolist(), gram.n_samples
        ([[10.0, 14.0], [14.0, 20.0]], 2)
    """
    batches = check_batches(data)
    is_sharded = bool(fsdp_modules(model))
    if is_sharded:
        if ranks_of(process_group, "activation_gram").are_many or checkpoint is not None:
            raise ValueError(
                "activation_gram: process_group and checkpoint must be None for a model that fully_shard has "
                "sharded, whose mesh says which ranks there are"
            )
        reshard(model)
    check_model(model, "activation_gram", may_be_sharded=is_sharded)
    ranks = ranks_of(process_group, "activation_gram")
    chosen = _chosen_modules(model, modules, include, exclude)
    forward = _forward_of(task)
    totals: dict[str, Tensor] = {}
    kept = Progress(
        "activation_gram",
        checkpoint,
        checkpoint_every,
        model=model,
        settings={"modules": [name for name, _ in chosen.values()], "task": repr(task)},
        ranks=ranks,
    )

    def record(module: nn.Module, *inputs: Tensor) -> None:
        name, layer = chosen[module]
        if name not in totals:
            device = getattr(module, layer.weight).device
            totals[name] = torch.zeros(layer.gram, dtype=torch.float64, device=device)
        layer.add(totals[name], *inputs)

    n_samples = 0
    if is_sharded:
        judge = Task() if task is None else resolve(task, who="activation_gram")
        totals, n_samples = sharded_totals(model, batches, judge, chosen, _watched, progress)
    else:
        if kept.found is not None:
            n_samples = kept.found[1]["n_samples"]
            devices = {name: getattr(module, layer.weight).device for module, (name, layer) in chosen.items()}
            totals = {name: total.to(devices[name]) for name, total in kept.found[0].items()}
        with borrowed(model), torch.no_grad(), eager(), _watched(model, chosen, record):
            reader = kept.read(
                batches,
                device_of(model),
                save=lambda: (totals, {"n_samples": n_samples}),
                description="activation Gram matrices",
                progress=progress,
            )
            with closing(reader):  # type: ignore[type-var]
                for _, batch in reader:
                    n = _count(task, batch)
                    if n:
                        forward(model, batch)
                        n_samples += n
        (n_samples,) = ranks.total("samples", n_samples)
    if n_samples == 0:
        raise ValueError("activation_gram: data must hold at least one sample, got none")
    if not any(ranks.exchange("layers", bool(totals))):
        raise ValueError(
            "activation_gram: the model must run a layer that is covered, got none; see which are in "
            "activation_gram's documentation"
        )
    if ranks.are_many:
        totals = _summed(ranks, chosen, totals)
    for name, total in totals.items():
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(
                f"activation_gram: the inputs of {name} must be finite, got NaN or infinity"
            )
    return ActivationGram({name: totals[name] for name, _ in chosen.values() if name in totals}, n_samples)


def _summed(ranks: Ranks, chosen: _Chosen, totals: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Layers may run for some samples only, and for no sample of a rank.
    ran = {name for names in ranks.exchange("modules", list(totals)) for name in names}
    summed = {
        name: totals.get(name, torch.zeros(layer.gram, dtype=torch.float64, device=weight.device))
        for module, (name, layer) in chosen.items()
        if name in ran and (weight := getattr(module, layer.weight)) is not None
    }
    ranks.sum_("totals", summed.values())
    return summed


_Chosen: TypeAlias = dict[nn.Module, tuple[str, Layer]]


def _forward_of(task: Task | None) -> Callable[[nn.Module, Batch], object]:
    # Nothing but the inputs matters here, and those are found without knowing what the labels mean.
    chosen = Task() if task is None else resolve(task, who="activation_gram")
    return chosen.forward


def _count(task: Task | None, batch: Batch) -> int:
    return count_samples(batch) if task is None else task.count(batch)


def _chosen_modules(
    model: nn.Module,
    names: Iterable[str] | None,
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
) -> _Chosen:
    known = modules_by_name(model)
    layers = {name: layer_of(module) for name, module in known.items()}
    wanted = set(known) if names is None else {names} if isinstance(names, str) else set(names)
    for name in sorted(wanted if names is not None else ()):
        if name not in known:
            raise ValueError(f"activation_gram: modules must name modules of the model, got {name!r}")
        if layers[name] is None:
            kind = type(known[name]).__name__
            raise ValueError(f"activation_gram: modules must name covered layers, got {name!r}, a {kind}")
    weights = {
        f"{name}.{layer.weight}".lstrip("."): (known[name], name, layer)
        for name, layer in layers.items()
        if layer and name in wanted
    }
    chosen = chosen_names(weights, include, exclude, "activation_gram")
    return {module: (name, layer) for module, name, layer in (weights[weight] for weight in chosen)}


# Note [Attention hides its layers]
# A MultiheadAttention multiplies by its output projection's weight without calling that module, and in eval
# mode a transformer's layers can be fused away altogether. So the fused kernels are switched off for the
# pass, and while an attention runs, the matrix products with that weight are looked out for.
@contextmanager
def _watched(model: nn.Module, chosen: _Chosen, record: Callable[..., None]) -> Iterator[None]:
    """Call ``record(module, *inputs)`` whenever one of the modules runs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        record(module, *_inputs_of(module, args, kwargs))

    was_fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, was_fast)
        torch.backends.mha.set_fastpath_enabled(False)
        for module in chosen:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention) and module.out_proj in chosen:
                watch = _ProductWatch(module.out_proj, record)
                stack.callback(watch.stop)  # an interrupt skips hooks, also those that are always called
                stack.callback(module.register_forward_pre_hook(watch.start).remove)
                stack.callback(module.register_forward_hook(watch.stop, always_call=True).remove)
        yield


class _ProductWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what is multiplied by the weight of a linear layer that is not called itself."""

    def __init__(self, linear: nn.Linear, record: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._linear = linear
        self._record = record
        self._depth = 0

    def start(self, *_: object) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]
        self._depth += 1

    def stop(self, *_: object) -> None:
        if self._depth:
            self._depth -= 1
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        aten, weight = torch.ops.aten, self._linear.weight
        if func in (aten.mm.default, aten.addmm.default):
            rows, matrix = args[-2:]
            if matrix.data_ptr() == weight.data_ptr() and matrix.shape == weight.mT.shape:
                self._record(self._linear, rows)
        return func(*args, **(kwargs or {}))


def _inputs_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    if isinstance(module, nn.MultiheadAttention):
        names = ("query", "key", "value")
        return [*args[:3], *(kwargs[name] for name in names[len(args) :])]
    return [args[0] if args else kwargs.get("input", kwargs.get("x"))]


def _check_shapes(who: str, a: ActivationGram, b: ActivationGram) -> None:
    for name in a.keys() & b.keys():
        if a[name].shape != b[name].shape:
            raise ValueError(
                f"{who}: shapes must agree, got {list(a[name].shape)} and {list(b[name].shape)} for {name!r}"
            )
