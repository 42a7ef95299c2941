"""Per-sample gradients of one tensor, as a layer's inputs and output gradients imply them.

An object stands for the gradients that n samples have with respect to a tensor, through one node of
autograd's graph, without storing them. It adds their powers to an accumulator with one op, and for the few
combinations that no op covers it makes the gradients of some samples at a time.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearn_ext import ops

# Scalars of per-sample gradients that are made at a time where no op avoids them.
CHUNK = 2**24


class PerSampleGradients(ABC):
    """The gradients of n samples with respect to one tensor.

    Attributes:
        n: Number of samples.
        shape: Shape of the tensor.
    """

    def __init__(self, n: int, shape: Sequence[int]) -> None:
        self.n, self.shape = n, tuple(shape)

    @abstractmethod
    def gradients(self, start: int, stop: int) -> Tensor:
        """Make the gradients of some samples.

        Args:
            start: First sample.
            stop: One past the last.

        Returns:
            ``[stop - start, *shape]``, at least float32.
        """

    def add_to(self, fisher: Tensor, power: int) -> None:
        """Add ``sum_n |g_n|^power``.

        Args:
            fisher: Accumulator of the tensor's shape, written in place.
            power: 1 or 2.
        """
        step = max(1, CHUNK // max(1, math.prod(self.shape)))
        for start in range(0, self.n, step):
            grads = self.gradients(start, min(start + step, self.n))
            _add_channels(fisher, grads.reshape(len(grads), 1, -1), None, power)

    @abstractmethod
    def digest(self) -> Tensor:
        """Mix what a node's output gradients say of every sample and position into one number each.

        It is linear in the output gradients, and no two positions are mixed.

        Returns:
            ``[n, positions]``, at least float32.
        """

    def project(self, onto: Projection, samples: Sequence[int]) -> Tensor:
        """Project the gradients of some samples onto a few directions.

        Args:
            onto: The directions.
            samples: Which samples.

        Returns:
            ``[samples, directions]``.
        """
        return torch.cat([onto.of(self.gradients(sample, sample + 1)) for sample in samples])

    @abstractmethod
    def is_zero(self) -> bool:
        """Say whether all gradients vanish, because every term of them has a factor that does.

        Returns:
            True if they do; False says nothing.
        """


class Projection:
    """A few random directions in a tensor's space, each an outer product of two vectors.

    Args:
        shape: The tensor's shape.
        seed: The same seed gives the same directions.
        device: Where they are needed.
        dtype: float32 or float64.
    """

    DIRECTIONS = 4

    def __init__(self, shape: Sequence[int], seed: int, device: torch.device, dtype: torch.dtype) -> None:
        first = shape[0] if shape else 1
        rest = math.prod(shape[1:])
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(size, self.DIRECTIONS, generator=generator) for size in (first, rest)]
        self.left, self.right = (vectors.to(device, dtype) for vectors in drawn)
        if rest == 1:
            self.right = torch.ones_like(self.right)

    def of(self, grads: Tensor) -> Tensor:
        """Project gradients.

        Args:
            grads: ``[samples, *shape]``.

        Returns:
            ``[samples, directions]``.
        """
        matrices = grads.reshape(len(grads), len(self.left), len(self.right)).to(self.left.dtype)
        return ((matrices @ self.right) * self.left).sum(1)


class Product(PerSampleGradients):
    """A matrix that multiplies vectors: the weight ``[O, I]`` of a linear layer.

    Args:
        inputs: ``[n, *, I]``.
        grad_outputs: ``[n, *, O]``.
    """

    def __init__(self, inputs: Tensor, grad_outputs: Tensor) -> None:
        self.inputs, self.grads = _positions(inputs), _positions(grad_outputs)
        super().__init__(inputs.shape[0], (grad_outputs.shape[-1], inputs.shape[-1]))

    @property
    def transposed(self) -> Product:
        """The same gradients, seen from the transposed matrix."""
        return Product(self.grads, self.inputs)

    def is_like(self, other: Product) -> bool:
        """Say whether another batch's gradients can be joined to these along the samples.

        Args:
            other: Gradients of the same matrix.

        Returns:
            True if positions and dtypes are the same.
        """
        same_positions = self.inputs.shape[1] == other.inputs.shape[1]
        dtypes = self.inputs.dtype, self.grads.dtype
        return same_positions and dtypes == (other.inputs.dtype, other.grads.dtype)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102 - as in the base class
        inputs, grads = wide(self.inputs[start:stop], self.grads[start:stop])
        return grads.mT @ inputs

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        inputs, grads = _matched(fisher, self.inputs, self.grads)
        ops.fisher_linear_(fisher, inputs, grads, power=power)

    def digest(self) -> Tensor:  # noqa: D102
        # Seen from the transposed matrix, it is the other factor that comes from the pass.
        return _mixed(self.inputs) * _mixed(self.grads)

    def project(self, onto: Projection, samples: Sequence[int]) -> Tensor:  # noqa: D102
        chosen = list(samples)
        inputs, grads = (tensor[chosen].to(onto.left.dtype) for tensor in (self.inputs, self.grads))
        return ((grads @ onto.left) * (inputs @ onto.right)).sum(1)

    def is_zero(self) -> bool:  # noqa: D102
        return not bool((self.inputs.any(-1) & self.grads.any(-1)).any())


class Stacked(PerSampleGradients):
    """Matrices that multiply vectors of their own: ``[B, O, I]``, say one per attention head.

    Args:
        terms: The gradients of each.
    """

    def __init__(self, terms: Sequence[Product]) -> None:
        self.terms = terms
        super().__init__(terms[0].n, (len(terms), *terms[0].shape))

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return torch.stack([term.gradients(start, stop) for term in self.terms], 1)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        for term, total in zip(self.terms, fisher, strict=True):
            term.add_to(total, power)

    def digest(self) -> Tensor:  # noqa: D102
        digests = [term.digest() for term in self.terms]
        return torch.cat(digests, 1 if len({term.n for term in self.terms}) == 1 else 0)

    def is_zero(self) -> bool:  # noqa: D102
        return all(term.is_zero() for term in self.terms)


class Convolution(PerSampleGradients):
    """The weight ``[O, C / groups, *kernel]`` of a convolution.

    Args:
        inputs: ``[n, C, *size]``, or ``[n, C, images, *size]`` where a sample has several images.
        grad_outputs: ``[n, O, *out]``, or ``[n, O, images, *out]``.
        kernel: Size of the kernel, one to three dimensions.
        stride: One per dimension.
        padding: A pair (before, after) per dimension.
        dilation: One per dimension.
        groups: Number of groups.
    """

    def __init__(
        self,
        inputs: Tensor,
        grad_outputs: Tensor,
        *,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[tuple[int, int]],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.inputs, self.grads = inputs, grad_outputs
        self.kernel, self.stride, self.dilation = tuple(kernel), tuple(stride), tuple(dilation)
        self.padding, self.groups = tuple(padding), groups
        self.has_images = inputs.ndim == len(self.kernel) + 3
        shape = (grad_outputs.shape[1], inputs.shape[1] // groups, *self.kernel)
        super().__init__(inputs.shape[0], shape)

    @property
    def geometry(self) -> tuple[object, ...]:
        """What nodes must have in common to be merged."""
        return (self.shape, self.stride, self.padding, self.dilation, self.groups, self.inputs.dtype)

    def with_images(self) -> Convolution:
        """Show a sample's only image as one of several.

        Returns:
            The same gradients.
        """
        if self.has_images:
            return self
        return self.like(self.inputs.unsqueeze(2), self.grads.unsqueeze(2))

    def like(self, inputs: Tensor, grad_outputs: Tensor) -> Convolution:
        """Describe other inputs to the same layer.

        Args:
            inputs: As the class.
            grad_outputs: As the class.

        Returns:
            Their gradients.
        """
        return Convolution(
            inputs,
            grad_outputs,
            kernel=self.kernel,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        own = self.with_images()
        inputs, grads = wide(own.inputs[start:stop], own.grads[start:stop])
        inputs = F.pad(inputs, [*itertools.chain(*reversed(self.padding))])
        weight = grads.new_empty(1).expand(self.shape)
        zeros = [0] * len(self.kernel)
        layer = (self.stride, zeros, self.dilation, False, zeros, self.groups, [False, True, False])
        made = [  # a sample's images are the batch over which the plain gradient adds up
            torch.ops.aten.convolution_backward(
                grad.transpose(0, 1), image.transpose(0, 1), weight, None, *layer
            )[1]
            for grad, image in zip(grads, inputs, strict=True)
        ]
        return torch.stack(made)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        more = [1] if self.has_images else []
        if len(self.kernel) + len(more) > 3:
            super().add_to(fisher, power)
            return
        inputs, grads = _matched(fisher, self.inputs, self.grads)
        ops.fisher_conv_(
            fisher.unsqueeze(2) if more else fisher,
            inputs,
            grads,
            stride=[*more, *self.stride],
            padding=[*([(0, 0)] if more else []), *self.padding],
            dilation=[*more, *self.dilation],
            groups=self.groups,
            power=power,
        )

    def digest(self) -> Tensor:  # noqa: D102
        # A transposed convolution has swapped the two.
        inputs, grads = (tensor.flatten(1).unsqueeze(1) for tensor in (self.inputs, self.grads))
        return _mixed(inputs) * _mixed(grads)

    def is_zero(self) -> bool:  # noqa: D102
        return not bool(self.inputs.any() & self.grads.any())


class Lookup(PerSampleGradients):
    """A table of which rows are looked up: an embedding.

    Args:
        indices: ``[n, *]``.
        grad_outputs: ``[n, *, D]``.
        rows: Number of rows of the table.
        padding_idx: The index whose row gets no gradient; -1 for none.
        shape: Shape of the table, ``rows`` times D scalars; ``[rows, D]`` by default.
    """

    def __init__(
        self,
        indices: Tensor,
        grad_outputs: Tensor,
        *,
        rows: int,
        padding_idx: int = -1,
        shape: Sequence[int] | None = None,
    ) -> None:
        self.grads = _positions(grad_outputs)
        self.indices = indices.reshape(self.grads.shape[:2])
        self.padding_idx = padding_idx
        self.rows = rows
        super().__init__(grad_outputs.shape[0], (rows, grad_outputs.shape[-1]) if shape is None else shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        indices = self.indices[start:stop].long()
        (grads,) = wide(self.grads[start:stop])
        if self.padding_idx >= 0:
            grads = grads * (indices != self.padding_idx)[..., None]
        made = grads.new_zeros(len(grads), self.rows, grads.shape[-1])
        made.scatter_add_(1, indices[..., None].expand_as(grads), grads)
        return made.view(len(grads), *self.shape)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        (grads,) = _matched(fisher, self.grads)
        table = fisher if fisher.ndim == 2 else fisher.view(self.rows, -1)
        ops.fisher_embedding_(table, self.indices, grads, padding_idx=self.padding_idx, power=power)

    def digest(self) -> Tensor:  # noqa: D102
        return _mixed(self.grads)

    def is_zero(self) -> bool:  # noqa: D102
        return not bool((self.grads.any(-1) & (self.indices != self.padding_idx)).any())


class Channels(PerSampleGradients):
    """Values that are added to every position or multiply it: biases, scales, position embeddings.

    Args:
        grad_outputs: ``[n, *, C]``; a value's gradient is the sum over the positions.
        normalized: What the values multiply, of the same shape; None where they are added.
        shape: Shape of the tensor that holds the C values; ``[C]`` by default.
        channel_dim: -1; or 1 for ``[n, C, *]``.
    """

    def __init__(
        self,
        grad_outputs: Tensor,
        normalized: Tensor | None = None,
        shape: Sequence[int] | None = None,
        *,
        channel_dim: int = -1,
    ) -> None:
        if channel_dim == -1:
            grad_outputs = _positions(grad_outputs)
            normalized = None if normalized is None else _positions(normalized)
        self._given, self._channel_dim = (grad_outputs, normalized), channel_dim
        n, channels = grad_outputs.shape[0], grad_outputs.shape[channel_dim]
        super().__init__(n, (channels,) if shape is None else shape)

    @property
    def grads(self) -> Tensor:
        """Gradients ``[n, positions, C]``."""
        return self._as_positions(self._given[0])

    @property
    def normalized(self) -> Tensor | None:
        """What the values multiply, likewise."""
        factor = self._given[1]
        return None if factor is None else self._as_positions(factor)

    def _as_positions(self, tensor: Tensor) -> Tensor:
        return tensor if self._channel_dim == -1 else _positions(tensor.movedim(self._channel_dim, -1))

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        (grads,) = wide(self.grads[start:stop])
        if self.normalized is not None:
            grads = grads * self.normalized[start:stop]
        return grads.sum(1).reshape(-1, *self.shape)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        _add_channels(fisher, *self._given, power, self._channel_dim)

    def digest(self) -> Tensor:  # noqa: D102
        return _mixed(self.grads)

    def is_zero(self) -> bool:  # noqa: D102
        zero_or_not = self.grads if self.normalized is None else self.grads.bool() & self.normalized.bool()
        return not bool(zero_or_not.any())


class Gradients(PerSampleGradients):
    """Gradients that somebody has made.

    Args:
        grads: ``[n, *shape]``.
    """

    def __init__(self, grads: Tensor) -> None:
        self.grads = grads
        super().__init__(grads.shape[0], grads.shape[1:])

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        return wide(self.grads[start:stop])[0]

    def digest(self) -> Tensor:  # noqa: D102
        return _mixed(self.grads.flatten(1).unsqueeze(1))

    def is_zero(self) -> bool:  # noqa: D102
        return not bool(self.grads.any())


def _positions(tensor: Tensor) -> Tensor:
    # [n, *, C] as [n, positions, C]
    if tensor.ndim == 3:
        return tensor
    return tensor.unsqueeze(1) if tensor.ndim == 2 else tensor.flatten(1, -2)


def _mixed(grads: Tensor) -> Tensor:
    # Weights that no model's own structure is likely to meet; the same ones at every position.
    (grads,) = wide(grads)
    numbers = torch.arange(1, grads.shape[-1] + 1, device=grads.device, dtype=torch.float64)
    weights = (torch.sin(numbers * 12.9898) * 43758.5453).frac() + 0.1
    return grads @ weights.to(grads.dtype)


def wide(*tensors: Tensor) -> list[Tensor]:
    """Bring tensors to one dtype of at least float32.

    Args:
        *tensors: Of any floating-point dtypes.

    Returns:
        The tensors, float64 if one of them is, else float32.
    """
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return [tensor.to(dtype) for tensor in tensors]


def _matched(fisher: Tensor, *tensors: Tensor) -> list[Tensor]:
    # The ops take inputs and gradients of one dtype, and float64 only together with a float64 accumulator.
    dtype, own = tensors[-1].dtype, fisher.dtype
    if dtype is torch.float64 or own is torch.float64:
        dtype = own
    return [tensor if tensor.dtype is dtype else tensor.to(dtype) for tensor in tensors]


def _add_channels(
    fisher: Tensor, grads: Tensor, normalized: Tensor | None, power: int, channel_dim: int = -1
) -> None:
    total = fisher if fisher.ndim == 1 else fisher.reshape(-1)
    if normalized is None:
        ops.fisher_bias_(total, *_matched(fisher, grads), channel_dim=channel_dim, power=power)
    else:
        both = _matched(fisher, normalized, grads)
        ops.fisher_affine_(total, *both, channel_dim=channel_dim, power=power)
    if not fisher.is_contiguous():
        fisher.copy_(total.view(fisher.shape))
