"""What the CUDA kernels move, as counted on a CPU, and how long that should take on a card.

``tests/native/traffic.json`` holds the counts (``make check-traffic``), ``traffic_first.json`` those of the
day they were first taken. Everything about time is an estimate from data sheets, to be confirmed or corrected
by the first run on a card: ``make gpu`` shows its prediction beside each measurement.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.shapes import Layer

COUNTS = Path(__file__).parents[1] / "tests" / "native" / "traffic.json"
FIRST = COUNTS.with_name("traffic_first.json")


@dataclass(frozen=True)
class Card:
    """What NVIDIA's data sheets say of a card (SXM, dense, without sparsity).

    Attributes:
        bytes: Of device memory, per second.
        operations: Multiplications and additions per second, by precision.
        mma: The part of the tensor cores' rate that mma.sync, which our kernels use, is taken to reach: all
            of it on an A100; from the H100 on only wgmma and its successors do, and this is a guess.
    """

    bytes: float
    operations: Mapping[str, float]
    mma: float


CARDS = {
    "A100": Card(2.039e12, {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12}, 1.0),
    "H100": Card(3.35e12, {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}, 0.62),
    "H200": Card(4.8e12, {"float32": 67e12, "tf32": 494e12, "bfloat16": 989e12}, 0.62),
    "B200": Card(8e12, {"float32": 75e12, "tf32": 1100e12, "bfloat16": 2250e12}, 0.3),
}
# Of the time a card needs by its data sheet: what a plain copy, and a plain product, are known to leave.
MEMORY_SHARE, UNIT_SHARE = 0.92, 0.8
LAUNCH = 3e-6  # seconds between dependent kernels

# The counted case that stands for an op, by dtype; a dtype without one is taken to behave like float32.
_CASES = {
    "fisher_accumulate_": "fisher_accumulate",
    "selective_dampen_": "selective_dampen",
    "apply_mask_": "apply_mask",
    "masked_sgd_": "masked_sgd",
    "masked_adamw_": "masked_adamw",
    "selected_counts": "selected_counts",
    "ratio_quantile": "ratio_quantile",
    "topk_mask": "topk_mask",
    "pack_mask": "pack_mask",
    "unpack_mask": "unpack_mask",
}
_SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "bf16"}
# These ops take one mask, a launch for each; their cases are lists of nine masks in one.
_PER_TENSOR = ("pack_mask", "unpack_mask")


@cache
def counts() -> dict[str, dict[str, float]]:
    """The counts, by case."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def card_of(device: str) -> Card | None:
    """The card whose name is part of a device's; None for others."""
    return next((card for name, card in CARDS.items() if name in device), None)


def list_seconds(op: str, dtype: str, n_bytes: float, tensors: int, card: Card) -> float | None:
    """Predict an op on lists.

    Args:
        op: As in ``unlearn_ext.ops``.
        dtype: Of the first list, ``"float32"``.
        n_bytes: That an ideal implementation moves.
        tensors: Per list.
        card: Where.

    Returns:
        Seconds; None for an op that is not counted.
    """
    name = _CASES.get(op, "")
    case = counts().get(f"{name} {_SHORT[dtype]}") or counts().get(f"{name} f32") or counts().get(name)
    if case is None:
        return None
    launches = tensors if op in _PER_TENSOR else case["launches"]
    return n_bytes * case["memory"] / (card.bytes * MEMORY_SHARE) + launches * LAUNCH


def layer_seconds(layer: Layer, precision: str, card: Card) -> float:
    """Predict the Fisher diagonal of a layer: by its multiplications or by its bytes, whichever takes longer.

    Args:
        layer: Linear, or a convolution.
        precision: ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        card: Where.

    Returns:
        Seconds.
    """
    outputs, columns = layer.weight[0], math.prod(layer.weight[1:])
    # As fisher_plan.h chooses tiles, and pads samples to whole steps or, where that saves much, to half ones.
    if precision == "float32" or layer.positions == 1:
        m, n, step, rate = 64, 128, 4, card.operations["float32"]
    else:
        m = n = 128 if outputs > 64 and columns > 64 else 64
        step, rate = 8 if precision == "tf32" else 16, card.operations[precision] * card.mma
        if (layer.positions - 1) % step < step // 2 and layer.positions <= step * 3 // 2:
            step //= 2
    if layer.positions == 1:
        n, step = 64, 1
    padded = [math.ceil(size / unit) * unit for size, unit in ((outputs, m), (columns, n))]
    operations = 2 * layer.samples * math.ceil(layer.positions / step) * step * math.prod(padded)
    size = 2 if precision == "bfloat16" else 4
    n_bytes = size * (math.prod(layer.inputs) + math.prod(layer.outputs)) + 8 * layer.scalars
    return max(operations / (rate * UNIT_SHARE), n_bytes / (card.bytes * MEMORY_SHARE)) + LAUNCH


# ---- Pages

_FIGURES = ("memory", "moved", "efficiency", "width", "passes", "conflicts", "barriers", "mmas", "launches")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.3g}"


def section() -> str:
    """Write the counts, first and now, and what they predict."""
    first = json.loads(FIRST.read_text(encoding="utf-8"))
    rows = []
    for name, now in counts().items():
        before = first.get(name, {})
        cells = []
        for figure in _FIGURES:
            new, old = _number(now[figure]), _number(before[figure]) if before else ""
            cells.append(new if not old or old == new else f"{old} → {new}")
        rows.append([f"`{name}`", *cells])
    return "\n\n".join(
        [
            "## Traffic of the CUDA kernels, counted without a GPU",
            "Every load and store of the kernels, run by the CUDA checker: `make check-traffic`, budgets "
            "in `tests/native/traffic.json`. Where a figure has changed since it was first counted, both are "
            "given. Counted as the source is written: no caches, no time.",
            """- *memory*: 32-byte sectors touched in a launch, once each, over the floor (inputs read once,
  outputs written once)
- *moved*: the same, of every warp instruction, which the caches serve
- *efficiency*: bytes used of the sectors moved; *width*: bytes per lane and instruction, 16 at most
- *passes*: bytes of the inputs that are loaded, over their size
- *conflicts*: wavefronts of shared memory beyond those without bank conflicts
- *mmas*: instructions of the tensor cores; one of half the depth counts half""",
            _table(["case", *_FIGURES], rows),
            "### What that predicts: estimates, not measurements",
            "Microseconds for the counted bytes of 11.2 million scalars in 62 tensors (ResNet-18), at "
            f"{MEMORY_SHARE:.0%} of the data sheet's bandwidth and {LAUNCH * 1e6:.0f} µs per launch. "
            "`make gpu` shows the same figures beside what it measures.",
            _predicted(),
        ]
    )


# Bytes per scalar that an ideal implementation moves, in float32; half of the mask's bits are set.
_BYTES = {
    "fisher_accumulate_": 12,
    "selective_dampen_": 16,
    "apply_mask_": 8.125,
    "masked_sgd_": 20.125,
    "masked_adamw_": 28.125,
    "selected_counts": 8,
    "ratio_quantile": 8,
    "topk_mask": 4.125,
    "pack_mask": 1.125,
    "unpack_mask": 1.125,
}
_SCALARS, _TENSORS = 11_173_962, 62


def _predicted() -> str:
    rows = []
    for op, per_scalar in _BYTES.items():
        seconds = [
            list_seconds(op, "float32", per_scalar * _SCALARS, _TENSORS, card) for card in CARDS.values()
        ]
        rows.append([f"`{op}`", *("" if s is None else f"{s * 1e6:.0f}" for s in seconds)])
    return _table(["op", *CARDS], rows)
