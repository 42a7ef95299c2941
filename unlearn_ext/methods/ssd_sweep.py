"""Tables of what selective synaptic dampening would do, over a grid of settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One setting of a sweep.

    Attributes:
        alpha: Selection threshold.
        lambda_: Dampening constant.
        selected: Share of the covered scalars that would be dampened, in [0, 1].
        mean_factor: Mean factor of the selected scalars, in [0, 1] by default; NaN if none is selected.
    """

    alpha: float
    lambda_: float
    selected: float
    mean_factor: float


@dataclass(frozen=True, slots=True)
class Sweep:
    """Selected share and mean factor over a grid of settings; ``str()`` is a table.

    Attributes:
        rows: One per (alpha, lambda), alphas outermost.

    Example:
        >>> print(Sweep((SweepRow(2.0, 1.0, 0.25, 0.125),)))
         alpha  lambda  selected  mean factor
             2       1   25.000%       0.1250
    """

    rows: tuple[SweepRow, ...]

    def __iter__(self) -> Iterator[SweepRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        lines = [f"{'alpha':>6}  {'lambda':>6}  {'selected':>8}  {'mean factor':>11}"]
        lines += [
            f"{row.alpha:6.4g}  {row.lambda_:6.4g}  {row.selected:8.3%}  {row.mean_factor:11.4f}"
            for row in self
        ]
        return "\n".join(lines)
