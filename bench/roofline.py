"""A roofline plot of a CPU run: what the ops reach, against the memory and the arithmetic of the computer.

Both roofs are measured at the end of the run: additions in place to a large tensor, and fused multiply-adds
on registers (``peak.cpp``). An op's bytes are those that an ideal implementation moves, its operations those
of its formula; what an op reaches is its operations over its median time.
"""

import math
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench.shapes import LAYERS, MODELS

# Operations per scalar of the first list, counted from the formulas in unlearn_ext.ops; a comparison is one.
LIST_OPS = {
    "fisher_accumulate_": 3,
    "selective_dampen_": 6,
    "selected_counts": 20,  # ten alphas
    "apply_mask_": 1,
    "masked_sgd_": 6,
    "masked_adamw_": 15,
}
FAMILIES = {"list ops": "tab:blue", "Fisher kernels": "tab:red", "subspaces": "tab:green"}


def ceilings() -> dict[str, float]:
    """Measure bytes and float32 operations per second of all threads that torch uses.

    Returns:
        ``bytes_per_second``, and ``operations_per_second`` where there is a C++ compiler.
    """
    a, b = (torch.ones(2**25) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        a.add_(b)
        times.append(time.perf_counter() - start)
    found = {"bytes_per_second": 3 * a.nbytes / min(times)}
    compiler = shutil.which("c++")
    if compiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            program, source = Path(folder) / "peak", Path(__file__).with_name("peak.cpp")
            flags = ["-O3", "-march=native", "-ffp-contract=fast", "-pthread"]
            subprocess.run([compiler, *flags, source, "-o", program], check=True)
            threads = str(torch.get_num_threads())
            run = subprocess.run([program, threads], check=True, capture_output=True, text=True)
        found["operations_per_second"] = float(run.stdout)
    return found


def points(benchmarks: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, float, float]]:
    """Return family, label, operations per byte and operations per second of our entries in float32."""
    found = []
    for benchmark in benchmarks:
        op, model, dtype, _ = benchmark["group"].split("/")
        extra, seconds = benchmark["extra_info"], benchmark["stats"]["median"]
        if extra["contender"] != "ours" or dtype != "float32":
            continue
        if cost := _cost(op, model, extra):
            family, label, operations, n_bytes = cost
            found.append((family, label, operations / n_bytes, operations / seconds))
    return found


def _cost(op: str, model: str, extra: Mapping[str, Any]) -> tuple[str, str, float, float] | None:
    if op in LIST_OPS and model in MODELS:
        scalars = sum(math.prod(shape) for shape in MODELS[model]())
        return "list ops", f"{op} {model}", LIST_OPS[op] * scalars, extra["bytes_moved"]
    layer = next((layer for layer in LAYERS if layer.name == model), None)
    if layer is not None and extra.get("operations"):
        moved = 4 * (math.prod(layer.inputs) + math.prod(layer.outputs) + 2 * layer.scalars)
        return "Fisher kernels", f"{op} {model}", extra["operations"], moved
    if op == "gram_accumulate_":  # one triangle of X^T X
        return "subspaces", op, 4096 * 768 * 769, 4 * (4096 * 768 + 2 * 768**2)
    return None


def draw(document: Mapping[str, Any], path: Path) -> bool:
    """Draw a run.

    Args:
        document: pytest-benchmark's JSON.
        path: Of the SVG file.

    Returns:
        Whether there was something to draw, and matplotlib to draw it.
    """
    roofs = document["machine_info"].get("ceilings", {})
    found = points(document["benchmarks"])
    if not found or len(roofs) < 2:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "unlearn_ext"
    memory, arithmetic = roofs["bytes_per_second"], roofs["operations_per_second"]
    low = min(intensity for _, _, intensity, _ in found) / 2
    high = max(arithmetic / memory, *(intensity for _, _, intensity, _ in found)) * 2
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    corner = arithmetic / memory
    axes.plot([low, corner, high], [low * memory / 1e9, arithmetic / 1e9, arithmetic / 1e9], color="black")
    middle = math.sqrt(low * corner)
    axes.annotate(
        f"{memory / 1e9:.0f} GB/s", (middle, middle * memory / 1e9), (-55, 6), textcoords="offset points"
    )
    axes.annotate(
        f"{arithmetic / 1e9:.0f} GFLOP/s", (high, arithmetic / 1e9), (-80, 6), textcoords="offset points"
    )
    for family, color in FAMILIES.items():
        mine = [(label, intensity, rate / 1e9) for name, label, intensity, rate in found if name == family]
        if not mine:
            continue
        labels, intensities, rates = zip(*mine, strict=True)
        axes.scatter(intensities, rates, s=18, color=color, label=family)
        if family != "Fisher kernels":  # as many as all others, and close together
            for label, *at in zip(labels, intensities, rates, strict=True):
                axes.annotate(label, at, (4, -8), textcoords="offset points", fontsize=6)
    axes.set(
        xscale="log", yscale="log", xlabel="operations per byte of an ideal implementation", ylabel="GFLOP/s"
    )
    axes.legend(loc="lower right")
    axes.grid(which="both", alpha=0.2)
    info = document["machine_info"]
    axes.set_title(f"{info['cpu']}, {info['threads']} thread(s), float32")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return True
