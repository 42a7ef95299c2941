"""Kronecker factors of a model's curvature: moments of every layer's inputs and output gradients.

The block of the Gauss-Newton matrix that belongs to a layer's weight is taken as a product of two small
matrices: ``A``, the second moment of what the layer multiplies, and ``G``, that of the gradients of its
output. A second-order step ``G^-1 V A^-1`` then costs two solves per layer. See ``kfac_layers`` for what is
an input and what an output gradient.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_ext._internal.files import FileKind, names_in

_FILE = FileKind(
    "unlearn_ext.kronecker_factors.1",
    owner="KroneckerFactors",
    contents="Kronecker factors",
    instance="saved KroneckerFactors",
    facts=("modules", "n_samples", "n_rows", "gradients", "coverage"),
)


class Factors(NamedTuple):
    """The two factors of one layer, as totals.

    Attributes:
        inputs: ``A``: the sum of ``a a^T`` over samples and positions, ``[in, in]``; ``[groups, in, in]`` for
            a grouped layer, the diagonal ``[tokens]`` for an embedding. A bias counts as one more input.
        outputs: ``G``: the sum over samples of ``g g^T``, with ``g`` the gradient of the layer's output
            summed over the sample's positions, ``[out, out]`` or ``[groups, out, out]``.
    """

    inputs: Tensor
    outputs: Tensor


class KroneckerFactors(Mapping[str, Factors]):
    """Kronecker factors of a model's layers over one data set.

    A mapping from names of ``model.named_modules()`` to pairs of float64 totals. They are sums, not means:
    ``+`` joins two data sets and ``-`` takes one out, exactly but for rounding. The tensors are shared, not
    copied. Totals on data that has since been forgotten still tell about it: keep the difference.

    Args:
        factors: Module name to the pair of totals, float64.
        n_samples: Number of samples they are a sum over, >= 1.
        n_rows: Module name to the number of rows that ``inputs`` is a sum over.
        gradients: Of which loss the output gradients are.
        coverage: Parameter name to ``"factored"``, or to why it is left out.

    Attributes:
        n_samples: Number of samples.
        n_rows: Rows per module.
        gradients: Of which loss the output gradients are.
        coverage: What is left out, and why.

    Raises:
        ValueError: If a shape, a number of rows or the number of samples is impossible.
        TypeError: If a total is not float64.

    Example:
        >>> eye = torch.eye(2).double()
        >>> a = KroneckerFactors({"fc": (4 * eye, 2 * eye)}, n_samples=2, n_rows={"fc": 4})
        >>> both = a + a
        >>> both["fc"].inputs[0, 0].item(), both.n_samples, both.n_rows["fc"]
        (8.0, 4, 8)
        >>> a.solve("fc", torch.ones(2, 2), damping=0.0)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """

    __slots__ = ("_decompositions", "_factors", "coverage", "gradients", "n_rows", "n_samples")

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        n_samples: int,
        n_rows: Mapping[str, int],
        *,
        gradients: str = "",
        coverage: Mapping[str, str] | None = None,
    ) -> None:
        if n_samples < 1:
            raise ValueError(f"KroneckerFactors: n_samples must be at least 1, got {n_samples}")
        for name, pair in factors.items():
            for total in pair:
                if total.dtype != torch.float64:
                    raise TypeError(f"KroneckerFactors: {name} must be float64, got {total.dtype}")
            inputs, outputs = pair
            shapes = [list(inputs.shape), list(outputs.shape)]
            square = inputs.ndim == 1 or inputs.shape[-1] == inputs.shape[-2]
            same = outputs.ndim == max(2, inputs.ndim) and outputs.shape[:-2] == inputs.shape[:-2]
            if not (inputs.ndim in (1, 2, 3) and square and same and outputs.shape[-1] == outputs.shape[-2]):
                raise ValueError(
                    f"KroneckerFactors: {name} must be [in, in] and [out, out], with groups in front of both "
                    f"or neither, or [tokens] and [out, out], got {shapes[0]} and {shapes[1]}"
                )
            if n_rows.get(name, 0) < 1:
                raise ValueError(
                    f"KroneckerFactors: n_rows of {name} must be at least 1, got {n_rows.get(name)}"
                )
        self._factors = {name: Factors(*pair) for name, pair in factors.items()}
        self.n_samples = n_samples
        self.n_rows = {name: int(n_rows[name]) for name in factors}
        self.gradients = gradients
        self.coverage = dict(coverage or {})
        self._decompositions: dict[tuple[str, float | None], tuple[Tensor, ...]] = {}

    def __getitem__(self, name: str) -> Factors:
        return self._factors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __repr__(self) -> str:
        return f"KroneckerFactors({len(self)} modules, n_samples={self.n_samples})"

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        """Join two data sets.

        Args:
            other: Factors of the same layers on other samples.

        Returns:
            Their sum.

        Raises:
            ValueError: If layers, shapes or losses differ.
        """
        if not isinstance(other, KroneckerFactors):
            return NotImplemented
        return self._combined("+", other, torch.add, self.n_samples + other.n_samples, 1)

    def __sub__(self, other: KroneckerFactors) -> KroneckerFactors:
        """Take a part of the data set out.

        Args:
            other: Factors on some of this data set's samples: same model, same weights.

        Returns:
            The difference. Rounding, or labels that were drawn differently, can leave eigenvalues a little
            below 0.

        Raises:
            ValueError: If layers, shapes or losses differ, or no sample remains.
        """
        if not isinstance(other, KroneckerFactors):
            return NotImplemented
        if self.n_samples <= other.n_samples:
            raise ValueError(
                f"KroneckerFactors -: the part must be smaller than the whole, got {other.n_samples} of "
                f"{self.n_samples} samples"
            )
        return self._combined("-", other, torch.sub, self.n_samples - other.n_samples, -1)

    def solve(self, name: str, matrix: Tensor, *, damping: float = 0.01, keep: bool = False) -> Tensor:
        """Return ``(G + c tr(G)/out I)^-1 V (A + c tr(A)/in I)^-1`` with the means of both totals.

        In float64, by Cholesky decompositions. With ``keep`` these stay with the object; where kept ones are
        for another damping, eigenvectors are computed once instead, which serve every damping.

        Args:
            name: The module.
            matrix: ``V``, ``[out, in]`` or ``[groups, out, in]``.
            damping: ``c``, >= 0.
            keep: Whether more solves of this object are to come.

        Returns:
            float64, of the shape of ``matrix``. Where a factor is zero altogether, so is the solution.

        Raises:
            ValueError: If the shape does not fit, or a factor is singular without damping.
        """
        inputs, outputs = self[name]
        want = (*outputs.shape[:-1], inputs.shape[-1])
        if tuple(matrix.shape) != want:
            raise ValueError(
                f"KroneckerFactors.solve: matrix of {name} must be {list(want)}, got {list(matrix.shape)}"
            )
        means = {"inputs": inputs / self.n_rows[name], "outputs": outputs / self.n_samples}
        right = matrix.to(inputs)
        for side, mean in means.items():
            right = right if side == "outputs" else right.mT
            right = self._solved(f"{name}/{side}", mean, right, damping, keep)
            right = right if side == "outputs" else right.mT
        return right

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file; a failure leaves the old file, if any, as it was.

        Args:
            path: The file.

        Raises:
            ImportError: If safetensors is not installed.
        """
        tensors = {f"{i}/{j}": total for i, pair in enumerate(self.values()) for j, total in enumerate(pair)}
        facts = {
            "modules": json.dumps(list(self)),
            "n_samples": str(self.n_samples),
            "n_rows": json.dumps(self.n_rows),
            "gradients": self.gradients,
            "coverage": json.dumps(self.coverage),
        }
        _FILE.save(path, tensors, facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> KroneckerFactors:
        """Read what ``save`` has written.

        Args:
            path: The file.
            device: Where to put the tensors.

        Returns:
            The factors.

        Raises:
            ImportError: If safetensors is not installed.
            ValueError: If the file holds something else.
        """
        tensors, facts = _FILE.load(path)
        with _FILE.understood(path):
            return cls(
                {
                    name: (tensors[f"{i}/0"].to(device), tensors[f"{i}/1"].to(device))
                    for i, name in enumerate(names_in(facts["modules"], len(tensors) // 2))
                },
                int(facts["n_samples"]),
                json.loads(facts["n_rows"]),
                gradients=facts["gradients"],
                coverage=json.loads(facts["coverage"]),
            )

    def _combined(
        self,
        sign: str,
        other: KroneckerFactors,
        combine: Callable[[Tensor, Tensor], Tensor],
        n_samples: int,
        factor: int,
    ) -> KroneckerFactors:
        who = f"KroneckerFactors {sign}"
        if set(self) != set(other):
            raise ValueError(
                f"{who}: both must have the same modules, got {sorted(set(self) ^ set(other))} in one"
            )
        if self.gradients != other.gradients:
            raise ValueError(
                f"{who}: gradients must be of one loss, got {self.gradients!r} and {other.gradients!r}"
            )
        for name, pair in self.items():
            shapes = [[list(total.shape) for total in factors] for factors in (pair, other[name])]
            if shapes[0] != shapes[1]:
                raise ValueError(f"{who}: shapes must agree, got {shapes[0]} and {shapes[1]} for {name!r}")
        return KroneckerFactors(
            {
                name: (
                    combine(pair.inputs, other[name].inputs.to(pair.inputs.device)),
                    combine(pair.outputs, other[name].outputs.to(pair.outputs.device)),
                )
                for name, pair in self.items()
            },
            n_samples,
            {name: rows + factor * other.n_rows[name] for name, rows in self.n_rows.items()},
            gradients=self.gradients,
            coverage={**other.coverage, **self.coverage},
        )

    def _solved(self, key: str, mean: Tensor, right: Tensor, damping: float, keep: bool) -> Tensor:
        # Solve ``(mean + damping) X = right``; a one-dimensional mean is a diagonal.
        diagonal = mean.ndim == 1
        trace = mean.sum() if diagonal else mean.diagonal(dim1=-2, dim2=-1).sum(-1)
        shift = damping * trace / mean.shape[-1]
        if diagonal:
            if not bool(trace > 0):
                return torch.zeros_like(right)
            _check_positive(key, bool((mean + shift > 0).all()), damping)
            return right / (mean + shift).unsqueeze(-1)
        alive = (trace > 0)[..., None, None]
        others = [at for known, at in self._decompositions if known == key]
        if damping in others or not others:
            lower = self._decompositions.get((key, damping), (None,))[0]
            if lower is None:
                identity = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
                damped = torch.where(alive, mean + shift[..., None, None] * identity, identity)
                lower, info = torch.linalg.cholesky_ex(damped)
                _check_positive(key, not bool(info.any()), damping)
            if keep:
                self._decompositions[key, damping] = (lower,)
            solution = torch.cholesky_solve(right, lower)
        else:
            if (key, None) not in self._decompositions:
                for at in others:
                    del self._decompositions[key, at]
                self._decompositions[key, None] = tuple(torch.linalg.eigh(mean))
            values, vectors = self._decompositions[key, None]
            # What rounding leaves below zero is zero: the mean is a second moment.
            values = torch.where(alive.squeeze(-1), values.clamp(min=0) + shift.unsqueeze(-1), 1.0)
            _check_positive(key, bool((values > 0).all()), damping)
            solution = vectors @ ((vectors.mT @ right) / values.unsqueeze(-1))
        return torch.where(alive, solution, torch.zeros_like(solution))


def _check_positive(key: str, positive: bool, damping: float) -> None:
    if not positive:
        raise ValueError(
            f"KroneckerFactors.solve: damping must make the factors of {key} positive definite, got {damping}"
        )
