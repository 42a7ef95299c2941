"""How each kind of layer multiplies its inputs by its weight, for Kronecker factors.

The gradient of a weight is a sum, over samples and positions, of output gradients times inputs, ``g a^T``.
What is an input and what an output gradient depends on the layer:

    layer                   input a                        output gradient g
    Linear, Conv1D (HF)     input vectors, then 1          of the output vector
    Conv1d/2d/3d            patches per group, then 1      of the output pixel, per group
    ConvTranspose1d/2d/3d   input pixels, per group        patches of the output's gradient, per group
    Embedding               one-hot tokens                 of the looked-up row

The 1 stands for the bias, as an extra column of the weight. A transposed convolution's bias belongs to other
positions than its weight, so it has no such column.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from unlearn_ext import ops
from unlearn_ext._internal.modules import kind_of
from unlearn_ext._internal.undo import Undone
from unlearn_ext.subspace.layers import Layer, layer_of, square


class Factored:
    """A layer whose curvature is kept as two factors.

    Args:
        module: A module that ``why_not_factored`` has nothing to say about.

    Attributes:
        module: The module.
        parameters: Attributes that hold what the factors cover: the weight, and the bias if it is a column.
        has_bias: Whether it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._layer = cast("Layer", layer_of(module))
        self._transposed = isinstance(module, _ConvTransposeNd)
        self._lookup = isinstance(module, nn.Embedding)
        bias = getattr(module, "bias", None)
        self.has_bias = isinstance(bias, Tensor) and not self._transposed
        self.parameters = ("weight", "bias") if self.has_bias else ("weight",)
        self._groups = module.groups if isinstance(module, _ConvNd) else 1

    @property
    def form(self) -> torch.Size:
        """Shape ``[groups, out, in]`` of the parameters as a matrix, the bias being a column."""
        return self.matrix(
            {name: torch.empty(self._shape(name), device="meta") for name in self.parameters}
        ).shape

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the totals, by name."""
        found = {"inputs": self._layer.gram, "outputs": square(self.form[1], self._groups)}
        return {**found, "column": (self._groups, self._layer.gram[-1])} if self.has_bias else found

    def new_totals(self, device: torch.device | None = None) -> Totals:
        """Return empty totals for this layer.

        Args:
            device: Where; None: where the weight is.

        Returns:
            Zeros.
        """
        device = cast("Tensor", self.module.weight).device if device is None else device
        zeros = {
            name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in self.sizes.items()
        }
        return Totals(zeros["inputs"], zeros["outputs"], zeros.get("column"))

    def rows(self, inputs: Tensor) -> int:
        """Return how many rows the layer makes of its input."""
        if self._lookup:
            return inputs.numel()
        if not isinstance(self.module, _ConvNd):
            return inputs.numel() // inputs.shape[-1]
        sizes = inputs.shape[2:] if self._transposed else self._output_sizes(inputs.shape[2:])
        return inputs.shape[0] * torch.Size(sizes).numel()

    def add_inputs(self, totals: Totals, inputs: Tensor) -> None:
        """Add the second moment of what the layer was called with.

        Args:
            totals: Written in place.
            inputs: The layer's input, samples first.
        """
        self._layer.add(totals.inputs, inputs)
        totals.rows += self.rows(inputs)
        if totals.column is not None:
            totals.column += self._row_sums(inputs)

    def position_sums(self, inputs: Tensor, grad_outputs: Tensor) -> Tensor:
        """Sum the output gradients of each sample over its positions.

        Args:
            inputs: The layer's input, samples first.
            grad_outputs: Gradient of its output.

        Returns:
            ``[groups, N, out]``, at least float32.
        """
        grads = grad_outputs.float() if grad_outputs.dtype.itemsize < 4 else grad_outputs
        n = grads.shape[0]
        if not isinstance(self.module, _ConvNd):
            return grads.reshape(n, -1, grads.shape[-1]).sum(1).unsqueeze(0)
        if self._transposed:
            sums = _patch_sums(grads, self._matches(grads.shape[2:], inputs.shape[2:]))
        else:
            sums = grads.flatten(2).sum(2)
        return sums.reshape(n, self._groups, -1).transpose(0, 1)

    def matrix(self, values: dict[str, Tensor]) -> Tensor:
        """Bring what has the shapes of the parameters into the form ``[groups, out, in]``.

        Args:
            values: One tensor for every name in ``parameters``.

        Returns:
            The matrix; the bias, if any, is its last column.
        """
        weight = values["weight"]
        if self._layer.side == "right":
            found = weight.reshape(self._groups, weight.shape[0] // self._groups, -1)
        else:
            found = weight.reshape(self._groups, weight.shape[0] // self._groups, -1).mT
        if self.has_bias:
            found = torch.cat([found, values["bias"].reshape(self._groups, -1, 1)], dim=2)
        return found

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Undo ``matrix``.

        Args:
            matrix: ``[groups, out, in]``.

        Returns:
            One tensor for every name in ``parameters``.
        """
        weight, rest = (matrix[..., :-1], matrix[..., -1]) if self.has_bias else (matrix, None)
        weight = weight if self._layer.side == "right" else weight.mT
        values = {"weight": weight.reshape(self._shape("weight"))}
        if rest is not None:
            values["bias"] = rest.reshape(-1)
        return values

    def stand_ins(self, like: Tensor) -> dict[str, Tensor]:
        """Make parameters in the place of those that are not here, as of a sharded model between passes.

        Args:
            like: For device and dtype.

        Returns:
            Zeros by name, which require grad. What a weight's gradient is made of does not depend on it.
        """
        return {
            name: torch.zeros(self._shape(name), dtype=like.dtype, device=like.device, requires_grad=True)
            for name in self.parameters
        }

    @contextmanager
    def standing_in(self, values: dict[str, Tensor]) -> Iterator[None]:
        """Let the module have other parameters.

        Args:
            values: By name.

        Yields:
            Nothing.
        """
        own = self.module._parameters
        before = {name: own[name] for name in values}
        with Undone(lambda: own.update(before)):
            own.update(cast("dict[str, nn.Parameter]", values))
            yield

    def plain_call(self, inputs: Tensor) -> Tensor:
        """Call the layer as its kind defines it, whatever a subclass or a hook makes of it.

        Args:
            inputs: The layer's input.

        Returns:
            Its output.
        """
        for kind in _KINDS:
            if isinstance(self.module, kind):
                return cast("Tensor", kind.forward(self.module, inputs))
        weight, bias = cast("Tensor", self.module.weight), cast("Tensor", self.module.bias)
        return F.linear(inputs, weight.mT, bias)  # Hugging Face's Conv1D

    def _shape(self, name: str) -> torch.Size:
        return cast("Tensor", getattr(self.module, name)).shape

    def _row_sums(self, inputs: Tensor) -> Tensor:
        if not isinstance(self.module, _ConvNd):
            return inputs.flatten(0, -2).sum(0, dtype=torch.float64).unsqueeze(0)
        padded = self._padded(inputs)
        sizes = self._output_sizes(inputs.shape[2:])
        total = padded.sum(0, keepdim=True, dtype=torch.float64)
        return _patch_sums(total, self._matches(total.shape[2:], sizes)).reshape(self._groups, -1)

    def _padded(self, inputs: Tensor) -> Tensor:
        conv = cast("_ConvNd", self.module)
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return F.pad(inputs, conv._reversed_padding_repeated_twice, mode=mode)

    def _output_sizes(self, sizes: Sequence[int]) -> list[int]:
        conv = cast("_ConvNd", self.module)
        sides = conv._reversed_padding_repeated_twice
        n = len(sizes)
        padded = [size + sides[2 * (n - 1 - i)] + sides[2 * (n - 1 - i) + 1] for i, size in enumerate(sizes)]
        settings = zip(padded, conv.kernel_size, conv.stride, conv.dilation, strict=True)
        return [(size - dilation * (k - 1) - 1) // stride + 1 for size, k, stride, dilation in settings]

    def _matches(self, sizes: Sequence[int], positions: Sequence[int]) -> list[Tensor]:
        # Per dimension ``[kernel, size]``: 1 where some position of the kernel meets that place.
        conv = cast("_ConvNd", self.module)
        weight = conv.weight
        # A transposed convolution cuts its padding off the output; a convolution's input has it added
        # already.
        cut = cast("Sequence[int]", conv.padding) if self._transposed else [0] * len(sizes)
        found = []
        for size, count, k, stride, dilation, before in zip(
            sizes, positions, conv.kernel_size, conv.stride, conv.dilation, cut, strict=True
        ):
            places = torch.arange(count, device=weight.device) * stride - before
            places = places + torch.arange(k, device=weight.device).unsqueeze(1) * dilation
            inside = (places >= 0) & (places < size)
            match = torch.zeros(k, size, dtype=torch.float64, device=weight.device)
            found.append(match.scatter_add_(1, places.clamp(0, size - 1), inside.double()))
        return found


_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)


@dataclass
class Totals:
    """Running totals of one layer.

    Attributes:
        inputs: Sum of ``a a^T`` over rows, without the bias's column; counts of tokens for an embedding.
        outputs: Sum over samples of ``g g^T``, ``g`` summed over the sample's positions.
        column: Sum of ``a`` over rows, where there is a bias.
        rows: Number of rows.
    """

    inputs: Tensor
    outputs: Tensor
    column: Tensor | None
    rows: int = field(default=0)

    def add_outputs(self, sums: Tensor) -> None:
        """Add ``g g^T`` for every sample.

        Args:
            sums: ``[groups, N, out]``.
        """
        totals = self.outputs if self.outputs.ndim == 3 else self.outputs.unsqueeze(0)
        for total, rows in zip(totals, sums, strict=True):
            ops.gram_accumulate_(total, rows.contiguous())

    def tensors(self) -> dict[str, Tensor]:
        """Return the totals by name."""
        found = {"inputs": self.inputs, "outputs": self.outputs}
        return found if self.column is None else {**found, "column": self.column}

    def with_column(self) -> Tensor:
        """Return the total over the inputs, with the row and column of the bias."""
        if self.column is None:
            return self.inputs
        grams = self.inputs if self.inputs.ndim == 3 else self.inputs.unsqueeze(0)
        below = torch.cat([self.column, self.column.new_full((len(grams), 1), self.rows)], 1).unsqueeze(1)
        whole = torch.cat([torch.cat([grams, self.column.unsqueeze(2)], 2), below], 1)
        return whole if self.inputs.ndim == 3 else whole.squeeze(0)


def why_not_factored(module: nn.Module) -> str:
    """Say why a module with parameters of its own has no factors.

    Args:
        module: Any module.

    Returns:
        The reason; empty for a layer that ``Factored`` takes.

    Example:
        >>> why_not_factored(nn.Linear(2, 2)), why_not_factored(nn.LayerNorm(2))
        ('', 'no rule for LayerNorm')
    """
    if isinstance(module, nn.MultiheadAttention):
        return "MultiheadAttention multiplies by its weights without calling a layer"
    if layer_of(module) is None:
        return f"no rule for {kind_of(module)}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter"
    if not weight.requires_grad:
        return "frozen"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.scale_grad_by_freq):
        return "max_norm and scale_grad_by_freq make a gradient depend on the batch"
    bias = module._parameters.get("bias")
    if isinstance(bias, Tensor) and not isinstance(module, _ConvTransposeNd) and not bias.requires_grad:
        return "its bias is frozen"
    if bias is None and getattr(module, "bias", None) is not None:
        return "its bias is not a parameter"
    return ""


def _patch_sums(values: Tensor, matches: Sequence[Tensor]) -> Tensor:
    # Sum over positions of the patches of ``[N, C, *sizes]``: ``[N, C, *kernel]``.
    for dim, match in enumerate(matches):
        values = torch.movedim(
            torch.tensordot(values, match.to(values.dtype), dims=([dim + 2], [1])), -1, dim + 2
        )
    return values
