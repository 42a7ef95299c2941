"""What a method says of its run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from unlearn_ext._internal.plain import plain

NOTICE = (
    "Approximate unlearning: these figures tell what was changed and measured. They do not prove that the "
    "data has no influence left."
)


@dataclass(frozen=True, slots=True)
class UnlearnResult:
    """The record of one unlearning run.

    Attributes:
        method: Name of the method.
        hyperparameters: What it was called with; ``alpha="adaptive"`` is joined by the value it came to.
        seconds: Wall-clock seconds per phase.
        changed: Share of the model's scalar parameters whose value changed, in [0, 1].
        changed_per_parameter: The same for each parameter, by name.
        history: What happened, phase by phase or step by step.
        coverage: Parameter name to how its importances were computed, ``"fused"`` or ``"fallback: why"``, or
            to whether it has Kronecker factors, ``"factored"`` or why not, where the method computed any.
        reached: Whether the goal was reached within the budget; False means that the model is as it was. None
            where there was no goal.
        before: What was measured of the model as it was: ``forget_accuracy``, ``forget_loss``,
            ``retain_accuracy``, ``retain_loss``, as far as there were data.
        after: The same of the model as it is now.
        passes: Forward passes made to measure, in passes over the forget and retain data together.

    Example:
        >>> result = UnlearnResult("ssd", {"alpha": 2.0}, {"importance": 0.5}, 0.1, {"weight": 0.1}, ())
        >>> print(result)
        ssd: 10.0% of the parameters changed in 0.50 s
    """

    method: str
    hyperparameters: Mapping[str, object]
    seconds: Mapping[str, float]
    changed: float
    changed_per_parameter: Mapping[str, float]
    history: Sequence[Mapping[str, object]]
    coverage: Mapping[str, str] = field(default_factory=dict)
    reached: bool | None = None
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    passes: float = 0.0

    def __str__(self) -> str:
        seconds = sum(self.seconds.values())
        text = f"{self.method}: {self.changed:.1%} of the parameters changed in {seconds:.2f} s"
        for name, value in self.after.items():
            if name.endswith("_accuracy") and name in self.before:
                text += f"; {name.replace('_', ' ')} {self.before[name]:.1%} -> {value:.1%}"
        return text + ("; goal not reached" if self.reached is False else "")

    def to_json(self) -> str:
        """Return the record as a JSON object.

        NaN and infinities, which JSON does not know, are written as strings; a function by its full name.

        Returns:
            JSON with the attributes as keys, and ``notice``: what the record does not say.
        """
        return json.dumps(plain({**asdict(self), "notice": NOTICE}), indent=2)
