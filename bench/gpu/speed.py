"""The stages that measure: ceilings, list ops, Fisher kernels, whole networks, torch.compile, methods.

``python -m bench.gpu.speed STAGE [options] FILE`` runs one and writes what it measures to FILE, row by row.
Every contender has shown that it computes the right thing before it is timed. Times are medians of laps that
the contenders take in turns, between CUDA events, with a cold L2 cache. Shares of a copy are of one of a
gigabyte, timed in the same process.
"""

import argparse
import contextlib
import copy
import dataclasses
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench import bench_fisher, bench_fisher_ops, bench_ops, shapes, traffic
from bench.bench_ops import COMPILED, FOREACH, OURS
from bench.gpu.stages import NOTHING_TO_DO, Notes
from bench.models import MODELS, Model
from bench.race import FLOOR, Race, run_race, take_turns

# What is asked of the kernels on an H100 or H200.
COPY_SHARE = {"resnet18": 0.85, "vit_b16": 0.9}
TOPK_PASSES = 6.0
GEMM_SHARE = 0.6
STEP_RATIO, LOOP_RATIO = 1.2, 10.0
NOISE = 1.02  # two versions closer than this are equally fast

WALKS = ("fisher_accumulate_", "selective_dampen_", "apply_mask_", "masked_sgd_", "masked_adamw_")
OTHERS = ("selected_counts", "ratio_quantile", "pack_mask", "unpack_mask", "topk_mask")
FUSED = [f"torch.optim.{name}({how})" for name in ("SGD", "AdamW") for how in ("foreach", "fused")]
# Samples per batch, by the first word of a layer's name; the CPU's are fewer.
SAMPLES = {"resnet18": 128, "vit_b16": 32, "gpt2": 8}
ROWS = 32_768  # samples times positions of the square layers

# Times a contender may take, in seconds, and its laps.
PACE = (0.1, (5, 50))


@dataclasses.dataclass(frozen=True)
class Options:
    """How a stage runs: where, and whether it only has to go through."""

    device: torch.device
    dry: bool
    data: Path | None

    @property
    def pace(self) -> tuple[float, tuple[int, int]]:
        return (0.0, (1, 1)) if self.dry else PACE


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Let products of float32 round their operands if the name is "tf32", and only then."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def medians(times: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(laps) for name, laps in times.items()}


class Table:
    """The rows of a stage. What goes wrong in one costs that row only, and the stage its success.

    Attributes:
        code: The stage's exit code: 1 if our op failed in a row. A peer that cannot do it does not count.
    """

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self._bad: list[str] = []

    @property
    def code(self) -> int:
        if self._bad:
            self._notes["failed"] = f"wrong or failed: {'; '.join(self._bad)}"[:300]
        return int(bool(self._bad))

    @contextlib.contextmanager
    def row(self, **label: object) -> Iterator[dict[str, Any]]:
        """Fill a row, noted in the end; its ``"failures"`` say who did not do it, by name, and why."""
        row: dict[str, Any] = dict(label)
        try:
            yield row
        except Exception as error:
            traceback.print_exc()
            row.setdefault("failures", {})[OURS] = f"{type(error).__name__}: {error}"[:300]
        if OURS in row.get("failures", {}):
            self._bad.append(" ".join(map(str, label.values())))
        self._notes.row(**row)


# ---- Ceilings


def copy_rate(options: Options) -> float:
    """Measure the bytes per second, read and written, of a large copy on the device."""
    source = torch.ones(2**20 if options.dry else 2**28, device=options.device).uniform_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median(lambda: target.copy_(source), options)


def product_rate(dtype: torch.dtype, options: Options) -> float:
    """Measure the operations per second of a large matrix product."""
    n = 256 if options.dry else 8192
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _median(lambda: torch.mm(a, b, out=out), options)


def _median(run: Callable[[], object], options: Options) -> float:
    for _ in range(1 if options.dry else 5):
        run()
    return medians(take_turns({"": run}, options.device, *options.pace))[""]


PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


def _precisions(options: Options) -> list[str]:
    return [name for name in PRECISIONS if name != "tf32" or options.device.type == "cuda"]


def ceilings(notes: Notes, options: Options) -> int:
    notes["copy, bytes/s"] = copy_rate(options)
    for name in _precisions(options):
        with precision(name):
            notes[f"product in {name}, operations/s"] = product_rate(PRECISIONS[name], options)
    return 0


# ---- List ops


def _groups(
    names: Sequence[str], models: Sequence[str], dtypes: Sequence[torch.dtype]
) -> Iterator[bench_ops.Group]:
    known = {}
    for group in bench_ops.GROUPS:
        known.setdefault(group.op, group)
    for model in models:
        for name in names:
            for dtype in dtypes:
                if dtype == torch.float32 or name in WALKS:
                    yield dataclasses.replace(known[name], model=model, dtype=dtype)


def _raced(race: Race, wanted: Sequence[str], options: Options) -> tuple[dict[str, float], dict[str, str]]:
    race.only([name for name in wanted if name in race.contenders], "")
    times = run_race(race, options.device, *options.pace)
    return medians(times.laps), times.failures


def _card(options: Options) -> traffic.Card | None:
    return traffic.card_of(torch.cuda.get_device_name()) if options.device.type == "cuda" else None


def _list_row(
    row: dict[str, object], group: bench_ops.Group, wanted: Sequence[str], ceiling: float, options: Options
) -> None:
    torch.manual_seed(0)
    race = group.build(group, options.device)
    found, row["failures"] = _raced(race, wanted, options)
    if OURS not in found:
        return
    ours = found.pop(OURS)
    share = race.bytes_moved / ours / ceiling
    row |= {"seconds": ours, "bytes": race.bytes_moved, "share": share}
    if card := _card(options):
        tensors = len(shapes.MODELS[group.model]())
        dtype = str(group.dtype).removeprefix("torch.")
        row["predicted"] = traffic.list_seconds(group.op, dtype, race.bytes_moved, tensors, card)
    if FLOOR in found:
        row["share of the same copy"] = race.bytes_moved / ours / (race.floor_bytes / found.pop(FLOOR))
    row["others"] = found
    slower = [name for name, seconds in found.items() if ours > NOISE * seconds]
    if group.op == "topk_mask":
        passes = ours * ceiling / (race.bytes_moved * 32 / 33)  # over the scores; the rest are bits written
        row |= {"passes": passes, "target": f"<= {TOPK_PASSES:g} passes", "met": passes <= TOPK_PASSES}
    elif group.op in WALKS:
        least = COPY_SHARE.get(group.model, min(COPY_SHARE.values()))
        row |= {"target": f">= {least:g} of a copy, no other faster", "met": share >= least and not slower}


def list_ops(notes: Notes, options: Options) -> int:
    """Time every list op against its bytes, and against torch's own list ops."""
    notes["copy, bytes/s"] = ceiling = copy_rate(options)
    models = ["tiny"] if options.dry else ["resnet18", "vit_b16"]
    wanted = [OURS, FOREACH, *FUSED, "torch.kthvalue", "torch.topk", FLOOR]
    table = Table(notes)
    for group in _groups((*WALKS, *OTHERS), models, (torch.float32, torch.bfloat16)):
        if group.op in ("selected_counts", "ratio_quantile") and group.model == "vit_b16":
            continue  # torch.quantile and the exact reference stop at sixteen million
        # More scores than floats can number have ties, which the others break as they like.
        many = group.op == "topk_mask" and group.model == "vit_b16"
        with table.row(**_label(group)) as row:
            _list_row(row, group, [OURS, FLOOR] if many else wanted, ceiling, options)
    return table.code


def _label(group: bench_ops.Group) -> dict[str, str]:
    return {"op": group.op, "tensors": group.model, "dtype": str(group.dtype)[6:]}


# ---- Fisher kernels


def _layers(options: Options) -> Iterator[shapes.Layer]:
    for layer in shapes.LAYERS:
        first = layer.name.split()[0]
        if options.dry:
            if layer.name in ("resnet18 head", "resnet18 512, 3x3", "gpt2 projection"):
                yield dataclasses.replace(layer, samples=2)
        else:
            samples = SAMPLES.get(first, min(1024, ROWS // layer.positions))
            yield dataclasses.replace(layer, samples=samples)


def layers(notes: Notes, options: Options) -> int:
    """Time the per-sample Fisher kernels against the plain weight gradient of cuBLAS or cuDNN."""
    torch.backends.cudnn.benchmark = True  # the best that cuDNN has
    table = Table(notes)
    for layer in _layers(options):
        for name in _precisions(options):
            with table.row(layer=layer.name, precision=name) as row:
                _layer_row(row, layer, name, options)
    return table.code


def _layer_row(row: dict[str, Any], layer: shapes.Layer, name: str, options: Options) -> None:
    plain = bench_fisher_ops.PLAIN
    torch.manual_seed(0)
    race = bench_fisher_ops.Group(layer, PRECISIONS[name]).build(options.device)
    race.only([OURS, plain], "")
    # The reference is exact also where operands may be rounded; sums of squares then err by their roundings.
    race.reference = _exactly(race.reference)
    race.rtol = 5e-3 if name == "tf32" else race.rtol
    with precision(name):
        times = run_race(race, options.device, *options.pace)
    found = medians(times.laps)
    row |= {"samples": layer.samples, "positions": layer.positions, "failures": times.failures}
    if OURS in found and plain in found:
        share = found[plain] / found[OURS]
        row |= {"seconds": found[OURS], "plain": found[plain], "operations": layer.operations}
        row |= {"share": share, "target": f">= {GEMM_SHARE:g}", "met": share >= GEMM_SHARE}
        if card := _card(options):
            row["predicted"] = traffic.layer_seconds(layer, name, card)


def _exactly(run: Callable[[], object]) -> Callable[[], object]:
    def exact() -> object:
        with precision("float32"):
            return run()

    return exact


# ---- Whole networks


@dataclasses.dataclass(frozen=True)
class Network:
    """One of bench.models, and how it is raced.

    Attributes:
        model: The key in MODELS.
        samples: Batch size.
        chunk: Samples whose gradients vmap keeps at a time.
        sizes: Keyword arguments of the network.
        batch: Those of its batches.
    """

    model: str
    samples: int
    chunk: int
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    batch: Mapping[str, int] = dataclasses.field(default_factory=dict)


_VIT = {"width": 768, "depth": 12, "heads": 12, "patch": 16, "size": 224, "classes": 1000}
_GPT = {"width": 768, "depth": 12, "heads": 12, "length": 512, "vocabulary": 50_257}
NETWORKS = {
    "ResNet-18, 128 of 32x32": Network("resnet18", 128, 32),
    "ViT-B/16, 32 of 224x224": Network("vit", 32, 8, _VIT, {"size": 224}),
    "GPT-2 small, 8 of 512": Network("gpt", 8, 4, _GPT, {"length": 512, "vocabulary": 50_257}),
}
TINY_NETWORKS = {
    "tiny ResNet-18": Network("resnet18", 4, 2, {"width": 4}),
    "tiny GPT": Network(
        "gpt",
        4,
        2,
        {"width": 16, "depth": 1, "heads": 2, "length": 8, "vocabulary": 32},
        {"length": 8, "vocabulary": 32},
    ),
}
CHECKED, LOOPED = 3, 8  # samples compared with float64, and samples the loop is timed on


def _made(
    network: Network, options: Options
) -> tuple[nn.Module, Callable[[int, torch.dtype], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    recipe: Model = MODELS[network.model]
    model = recipe.build(**network.sizes).to(options.device).eval()

    def batch(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, y = (tensor.to(options.device) for tensor in recipe.batch(n, **network.batch))
        return x.to(dtype) if x.is_floating_point() else x, y

    return model, batch


def networks(notes: Notes, options: Options) -> int:
    """Time fisher_diagonal against a training step's passes, the single-sample loop and vmap."""
    table = Table(notes)
    for name, network in (TINY_NETWORKS if options.dry else NETWORKS).items():
        model, batch = _made(network, options)
        for rounding in _precisions(options):
            with table.row(network=name, precision=rounding) as row, precision(rounding):
                rounded = copy.deepcopy(model).to(PRECISIONS[rounding])
                _network_row(row, network, rounded, batch, options)
    return table.code


def _network_row(
    row: dict[str, Any],
    network: Network,
    model: nn.Module,
    batch: Callable[[int, torch.dtype], tuple[Tensor, Tensor]],
    options: Options,
) -> None:
    plain, vmap, loop = bench_fisher.PLAIN, bench_fisher.VMAP, bench_fisher.LOOP
    dtype = next(model.parameters()).dtype
    row["failures"] = failures = {}
    row["errors"] = errors = _errors(model, batch(CHECKED, dtype))
    # Rounding is no fault: the loop of single samples in the same precision has it too.
    if not errors[OURS] <= 2 * errors[loop] + 1e-3:
        failures[OURS] = f"off by {errors[OURS]:.1e}, the loop by {errors[loop]:.1e}"
    full = [batch(network.samples, dtype)]
    looped = min(LOOPED, network.samples)
    few = [tuple(tensor[:looped] for tensor in full[0])]
    runs = {
        OURS: bench_fisher.ours(model, full),
        plain: bench_fisher.plain(model, full),
        vmap: bench_fisher.vmapped(model, full, network.chunk),
    }
    found = _timed(runs, failures, options)
    for name, seconds in _timed({loop: bench_fisher.loop(model, few)}, failures, options).items():
        found[name] = seconds * network.samples / looped
    row |= {"samples": network.samples, "looped": looped, "times": found}
    if all(name in found for name in (OURS, plain, loop)):
        step, against_loop = found[OURS] / found[plain], found[loop] / found[OURS]
        row |= {"of a step": step, "target": f"<= {STEP_RATIO:g} of a step, loop >= {LOOP_RATIO:g}"}
        row["met"] = step <= STEP_RATIO and against_loop >= LOOP_RATIO


def _timed(
    runs: dict[str, Callable[[], object]], failures: dict[str, str], options: Options
) -> dict[str, float]:
    # One that cannot do it (for want of memory, say) is out, and the others go on.
    able = {}
    for name, run in runs.items():
        try:
            run()
            able[name] = run
        except Exception as error:
            failures[name] = f"{type(error).__name__}: {error}"[:300]
    pace = (0.0, (1, 1)) if options.dry else (0.5, (3, 20))
    return medians(take_turns(able, options.device, *pace))


def _errors(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    x, y = batch
    wide = [(x.double() if x.is_floating_point() else x, y)]
    oracle = bench_fisher.loop(copy.deepcopy(model).double(), wide)()
    return {
        name: bench_fisher.largest_error(bench_fisher.WAYS[name](model, [batch])(), oracle)
        for name in (bench_fisher.OURS, bench_fisher.LOOP)
    }


# ---- torch.compile


def compiled(notes: Notes, options: Options) -> int:
    """Time what torch.compile makes of the same formulas, and of vmap over a network."""
    notes["copy, bytes/s"] = ceiling = copy_rate(options)
    table = Table(notes)
    names = ("fisher_accumulate_",) if options.dry else [name for name in WALKS if name != "apply_mask_"]
    for group in _groups(names, ["tiny"] if options.dry else ["resnet18", "vit_b16"], (torch.float32,)):
        with table.row(**_label(group)) as row:
            _list_row(row, group, [OURS, COMPILED], ceiling, options)
    for name, network in {} if options.dry else NETWORKS.items():  # minutes of compiling on a CPU
        with table.row(op="fisher_diagonal", tensors=name, dtype="bfloat16") as row:
            model, batch = _made(network, options)
            model, full = model.bfloat16(), [batch(network.samples, torch.bfloat16)]
            torch._dynamo.reset()
            runs = {
                OURS: bench_fisher.ours(model, full),
                "torch.compile of vmap": bench_fisher.vmapped(model, full, network.chunk, compiled=True),
                "torch.compile of a plain step": bench_fisher.plain(model, full, compiled=True),
            }
            row["failures"] = failures = {}
            found = _timed(runs, failures, options)
            if OURS in found:
                row |= {"seconds": found.pop(OURS), "others": found}
    return table.code


# ---- Methods


def methods(notes: Notes, options: Options) -> int:
    """Forget a class of CIFAR-10 with a network that is trained here."""
    if options.data is None:
        notes["skipped"] = "no --data"
        return NOTHING_TO_DO
    from bench import bench_methods, cifar

    train, test = (
        TensorDataset(*(tensor.to(options.device) for tensor in part.tensors))
        for part in cifar.load(options.data)
    )
    recipe = dataclasses.replace(cifar.GPU, epochs=12)
    if options.dry:
        train, test = (TensorDataset(*(tensor[:256] for tensor in part.tensors)) for part in (train, test))
        recipe = dataclasses.replace(cifar.CPU, epochs=1)
    start = time.perf_counter()
    original, seconds = cifar.trained(train, recipe, 0, say=lambda line: print(line, flush=True))
    notes["training, s"], notes["of which now, s"] = seconds, time.perf_counter() - start
    notes["network"] = f"{recipe.network}, {recipe.epochs} epochs"
    parts = _by_class(train), _by_class(test)
    measured = dict(
        zip(("forget", "retain", "test forget", "test retain"), (*parts[0], *parts[1]), strict=True)
    )
    notes.row(method="original", accuracies=_accuracies(original, measured))
    settings: dict[str, dict[str, object]] = {"pgu": {"epochs": 1}} if options.dry else {}
    table = Table(notes)
    for name in ("ssd", "gradient_masking", "pgu"):
        with table.row(method=name) as row:
            model = copy.deepcopy(original)
            torch.manual_seed(0)
            sets = (bench_methods.Batches(part, 128) for part in parts[0])
            start = time.perf_counter()
            result = bench_methods.METHODS[name](model, *sets, **settings.get(name, {}))
            if options.device.type == "cuda":
                torch.cuda.synchronize()
            row["seconds"] = time.perf_counter() - start
            row["steps"] = {step: float(value) for step, value in result.seconds.items()}
            row["accuracies"] = _accuracies(model, measured)
    return table.code


def _by_class(data: TensorDataset) -> tuple[TensorDataset, TensorDataset]:
    # Class 0, and the rest.
    chosen = data.tensors[1] == 0
    return tuple(TensorDataset(*(tensor[mask] for tensor in data.tensors)) for mask in (chosen, ~chosen))


def _accuracies(model: nn.Module, measured: Mapping[str, TensorDataset]) -> dict[str, float]:
    from bench import bench_methods

    return {name: bench_methods.accuracy(model, data) for name, data in measured.items()}


STAGES: dict[str, Callable[[Notes, Options], int]] = {
    "ceilings": ceilings,
    "list-ops": list_ops,
    "layers": layers,
    "networks": networks,
    "compiled": compiled,
    "methods": methods,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.speed", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--dry", action="store_true", help="small sizes, on the CPU where there is no GPU")
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one file of JPEGs")
    parser.add_argument("found", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    notes = Notes(given.found)
    if device.type == "cpu" and not given.dry:
        notes["failed"] = "torch sees no GPU"
        return 1
    return STAGES[given.stage](notes, Options(device, given.dry, given.data))


if __name__ == "__main__":
    sys.exit(main())
