"""Fisher diagonals with and without the CPU's instructions for bfloat16, beside plain passes.

``python -m bench.matrix_unit [--laps 5]`` with transformers installed: on a CPU with AMX it writes
``bench/results/matrix_unit.md``, on one with AVX512_BF16 alone ``bench/results/bf16_dots.md``; with ``--only
padded`` it prints the rows with this in their name instead. One process per capability stays up; they run in
turns, each lap the pass and, right after it, as many plain forward and backward passes. Processor time, one
thread, medians of the laps' ratios. Errors are those of one batch against a float64 loop of its samples, as a
share of a parameter's largest value.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.models import MODELS
from unlearn_ext import fisher_diagonal, ops
from unlearn_ext.tasks import CausalLM, Classification

RESULTS = Path(__file__).parent / "results"
# What the best capability adds to AVX-512, and the page of its rows.
UNITS = {"amx": ("the CPU's matrix unit", "matrix_unit.md"), "avx512_bf16": ("dot products", "bf16_dots.md")}
WITHOUT = "avx512"
# Network, dtype of its weights, batches of a pass.
ROWS = [
    *(("mlp", "float32", 16), ("cnn", "float32", 4), ("resnet18", "float32", 2), ("vit", "float32", 2)),
    *(("gpt", "float32", 2), ("llama", "float32", 8), ("llama", "float32", 1)),
    *(("llama", "bfloat16", 8), ("llama", "bfloat16", 1)),
    *(("llama, padded", "float32", 8), ("llama, padded", "bfloat16", 8), ("gpt", "bfloat16", 8)),
]


def llama() -> nn.Module:
    """Build a Llama of 45.3 million parameters."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=9,
        num_attention_heads=9,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config)


def made(name: str, dtype: str) -> tuple[nn.Module, Any, Any]:
    """A network, a batch, and their task."""
    torch.manual_seed(0)
    if name.startswith("llama"):
        ids = torch.randint(3, 8192, (8, 128))
        batch = {"input_ids": ids, "labels": ids.clone()}
        if name.endswith("padded"):  # all texts but one, each by eight tokens more
            batch["attention_mask"] = (torch.arange(128) < 128 - 8 * torch.arange(8)[:, None]).long()
            batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
        return llama().to(getattr(torch, dtype)).eval(), batch, CausalLM()
    return MODELS[name].build().to(getattr(torch, dtype)).eval(), MODELS[name].batch(32), Classification()


def split(batch: Any) -> list[Any]:
    """The batch's samples, one by one."""
    if isinstance(batch, dict):
        return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]
    return [tuple(t[i : i + 1] for t in batch) for i in range(len(batch[1]))]


def looped(model: nn.Module, batch: Any, task: Any) -> dict[str, torch.Tensor]:
    """Mean squares of single samples' gradients in float64, in the model's own precision before."""
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    samples = split(batch)
    for sample in samples:
        loss = task.loss(model, sample).mean()
        for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += grad.double().square() / len(samples)
    return total


def error(found: Any, oracle: dict[str, torch.Tensor]) -> float:
    return max(float((found[n].double() - o).abs().max() / o.abs().max()) for n, o in oracle.items())


def work() -> None:
    """Answer the requests of the other process: a line in, a line out."""
    torch.set_num_threads(1)
    model: nn.Module
    for line in sys.stdin:
        name, dtype, count, what = json.loads(line)
        if what == "make":
            model, batch, task = made(name, dtype)
            answer: Any = ops.build_info()["cpu_capability"]
            fisher_diagonal(model, [batch], task=task)
        elif what == "error":
            wide = copy.deepcopy(model).double()
            as_wide = (
                batch
                if isinstance(batch, dict)
                else (batch[0].double() if batch[0].is_floating_point() else batch[0], batch[1])
            )
            oracle = looped(wide, as_wide, task)
            answer = [
                error(fisher_diagonal(model, [batch], task=task), oracle),
                error(looped(model, batch, task), oracle),
            ]
        else:
            start = time.process_time()
            fisher_diagonal(model, [batch] * count, task=task)
            middle = time.process_time()
            for _ in range(count):
                torch.autograd.grad(task.loss(model, batch).mean(), list(model.parameters()))
            answer = [middle - start, time.process_time() - middle]
        print(json.dumps(answer), flush=True)


class Side:
    """A process with one capability."""

    def __init__(self, capability: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.matrix_unit", "--work"],
            env={**os.environ, "UNLEARN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, row: tuple[str, str, int], what: str) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([*row, what]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a side has ended")
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()


def measured(row: tuple[str, str, int], unit: str, laps: int) -> str:
    """A line of the table."""
    # Of float32 only the matrix unit makes anything else.
    names = (unit, WITHOUT) if unit == "amx" or row[1] == "bfloat16" else (unit,)
    sides = {name: Side(name) for name in names}
    try:
        for name, side in sides.items():
            if (got := side.ask(row, "make")) != name:
                raise SystemExit(f"this CPU or build has no {name}: it runs {got}")
        ratios: dict[str, list[float]] = {name: [] for name in sides}
        for lap in range(laps):
            for name in sides if lap % 2 == 0 else reversed(sides):
                ours, plain = sides[name].ask(row, "lap")
                ratios[name].append(ours / plain)
        errors = {name: side.ask(row, "error") for name, side in sides.items()}
    finally:
        for side in sides.values():
            side.close()
    last = names[-1]
    cells = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios.values()]
    found = [f"{errors[name][0]:.0e}" for name in names]
    if len(names) == 1:
        cells, found = [*cells, ""], [*found, ""]
    return f"| {' | '.join([row[0], row[1], str(row[2]), *cells, *found, f'{errors[last][1]:.0e}'])} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laps", type=int, default=5)
    parser.add_argument("--only", default="", help="print the rows of these networks, write nothing")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        work()
        return 0
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    unit = ops.build_info()["cpu_capability"]
    if unit not in UNITS:
        raise SystemExit(f"this CPU or build has neither {' nor '.join(UNITS)}: it runs {unit}")
    rows = [row for row in ROWS if given.only in f"{row[0]} {row[1]}"]
    lines = [
        f"## Fisher diagonals by {UNITS[unit][0]} of bfloat16",
        "",
        "Time of `fisher_diagonal` over that of as many plain forward and backward passes (in brackets",
        f"least and most of all laps), with `{unit}` and, by `UNLEARN_CPU_CAPABILITY={WITHOUT}`, without,",
        "errors against a float64 loop of single samples, and those of such a loop in the weights' dtype.",
        "Llama: 45 M parameters, 8 x 128 tokens; the others are those of `bench/models.py`, 32 samples.",
        "",
        f"| network | weights | batches of a pass | {unit} | {WITHOUT} | error, {unit} | error, {WITHOUT} | "
        "error, loop |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(measured(row, unit, given.laps))
        print(lines[-1], flush=True)
    lines += [
        "",
        f"- commit {commit}, torch {torch.__version__}, one thread; processor time, {given.laps} laps",
        "- reproduce with `python -m bench.matrix_unit`",
        "",
    ]
    if not given.only:
        (RESULTS / UNITS[unit][1]).write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
