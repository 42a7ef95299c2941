"""The four methods, end to end, against plain PyTorch renditions of the published algorithms.

``python -m bench.bench_method_speed --digits`` (or ``--data cifar10_jpeg.npz --retain 5000``) forgets a class
of a trained network both ways, on the same batches and with the same settings, turn by turn, and compares
seconds and accuracies. A rendition does what the published algorithm says with autograd and tensor
expressions alone: no kernel, optimizer or hook of the package.
"""

import argparse
import copy
import json
import math
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import bench_methods, cifar
from bench.bench_methods import Batches, Problem, Task, accuracy, markdown
from unlearn_ext import gradient_masking, salun, select_mask, ssd, unsir
from unlearn_ext import saliency as saliency_of
from unlearn_ext.methods.pgu import pgu_from_sets
from unlearn_ext.ops.masks import unpack_mask

Way = Callable[[nn.Module, Batches, Batches], object]
OURS, PLAIN = "ours", "plain torch"


def _loss(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _norms_in_eval(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def plain_ssd(model: nn.Module, forget: Batches, retain: Batches, alpha: float, lambda_: float) -> None:
    """Squares of batch-mean gradients on the forget set and on all data; then dampen what stands out."""
    model.eval()
    parameters = list(model.parameters())

    def importances(*sets: Batches) -> list[Tensor]:
        totals, n = [torch.zeros_like(p) for p in parameters], 0
        for data in sets:
            for batch in data:
                for total, grad in zip(
                    totals, torch.autograd.grad(_loss(model, batch), parameters), strict=True
                ):
                    total += grad.square()
                n += 1
        return [total / n for total in totals]

    of_forget, of_all = importances(forget), importances(forget, retain)
    with torch.no_grad():
        for p, part, full in zip(parameters, of_forget, of_all, strict=True):
            chosen = part > alpha * full
            factors = (lambda_ * full[chosen] / part[chosen]).clamp(max=1)
            p[chosen] *= factors


def plain_unsir(
    model: nn.Module,
    label: int,
    retain: Batches,
    *,
    rows: int,
    steps: int,
    share: float,
    lrs: Sequence[float],
) -> None:
    """Noise that maximises the class's error, an epoch with it among the data, an epoch without.

    In the latter the learning rate falls linearly to 0.
    """
    images = next(iter(retain))[0]
    noise = torch.randn(rows, *images.shape[1:], device=images.device, requires_grad=True)
    labels = torch.full((rows,), label, device=images.device)
    optimizer = torch.optim.Adam([noise], 0.1)
    model.eval()
    for _ in range(steps):
        loss = 0.1 * noise.square().flatten(1).sum(1).mean() - _loss(model, (noise, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.train()
    fixed = noise.detach()
    for lr, mixed in zip(lrs, (True, False), strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr)
        end = 1.0 if mixed else 0.0
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=len(retain))
        for images, targets in retain:
            batch = images, targets
            if mixed:
                n = max(1, round(len(images) * share / (1 - share)))
                order = torch.randperm(rows)[:n].to(images.device)
                batch = torch.cat([images, fixed[order]]), torch.cat([targets, labels[order]])
            optimizer.zero_grad()
            _loss(model, batch).backward()
            optimizer.step()
            schedule.step()


def _train_masked(
    model: nn.Module,
    epoch: Callable[[], Iterable[Callable[[], Tensor]]],
    epochs: int,
    masks: Sequence[Tensor],
    lr: float,
    weight_decay: float,
) -> None:
    # Gradients times mask, then SGD; what momentum and decay moved elsewhere is put back. The learning rate
    # falls along a cosine.
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr, 0.9, weight_decay=weight_decay)
    for index in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * (0.55 + 0.45 * math.cos(math.pi * index / epochs))
        for loss in epoch():
            optimizer.zero_grad()
            loss().backward()
            for p, mask in zip(parameters, masks, strict=True):
                assert p.grad is not None
                p.grad *= mask
            optimizer.step()
            with torch.no_grad():
                for p, mask, old in zip(parameters, masks, before, strict=True):
                    p.copy_(torch.where(mask, p, old))


def plain_salun(model: nn.Module, forget: Batches, retain: Batches, *, density: float, epochs: int) -> None:
    """Random labels for the forget set, then the rest, into the half with the largest |gradient|."""
    parameters = list(model.parameters())
    model.eval()
    totals = [torch.zeros_like(p) for p in parameters]
    for batch in forget:
        for total, grad in zip(totals, torch.autograd.grad(_loss(model, batch), parameters), strict=True):
            total += grad
    scores = torch.cat([total.abs().flatten() for total in totals])
    ranks = scores.argsort(descending=True).argsort()
    chosen = (ranks < int(density * len(scores))).split([p.numel() for p in parameters])
    masks = [mask.view_as(p) for mask, p in zip(chosen, parameters, strict=True)]
    model.train()

    def epoch() -> Iterable[Callable[[], Tensor]]:
        for x, y in forget:
            wrong = (y + torch.randint_like(y, 1, 10)) % 10
            yield lambda x=x, wrong=wrong: _loss(model, (x, wrong))
        for batch in retain:
            yield lambda batch=batch: _loss(model, batch)

    _train_masked(model, epoch, epochs, masks, 0.03, 5e-4)


def plain_masking(
    model: nn.Module, forget: Batches, retain: Batches, masks: Mapping[str, Tensor], epochs: int
) -> None:
    """Random labels for the forget set beside the retain set, into given neurons."""
    chosen = [
        unpack_mask(masks[name], list(p.shape)) if name in masks else torch.zeros_like(p, dtype=torch.bool)
        for name, p in model.named_parameters()
    ]
    _norms_in_eval(model)

    def epoch() -> Iterable[Callable[[], Tensor]]:
        others = iter(retain)
        for x, y in forget:
            other = next(others, None)
            if other is None:
                others = iter(retain)
                other = next(others)
            wrong = (y + torch.randint_like(y, 1, 10)) % 10
            yield lambda x=x, wrong=wrong, other=other: _loss(model, (x, wrong)) + _loss(model, other)

    _train_masked(model, epoch, epochs, chosen, 0.003, 0.0)


def plain_pgu(model: nn.Module, forget: Batches, retain: Batches, *, energy: float, epochs: int) -> None:
    """Second moments of every layer's inputs, their leading directions, and steps at right angles to them."""
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    model.eval()

    def moments(*sets: Batches) -> dict[nn.Module, Tensor]:
        totals: dict[nn.Module, Tensor] = {}

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
            rows = inputs[0]
            if isinstance(layer, nn.Conv2d):
                columns = F.unfold(rows, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                rows = columns.mT.flatten(0, 1)
            totals[layer] = totals.get(layer, 0) + (rows.T @ rows).double()

        handles = [layer.register_forward_hook(add) for layer in layers]
        with torch.no_grad():
            for data in sets:
                for batch in data:
                    model(batch[0])
        for handle in handles:
            handle.remove()
        return totals

    full, part = moments(forget, retain), moments(forget)
    projections = {}
    for layer in layers:
        vectors, values, _ = torch.linalg.svd(full[layer] - part[layer])
        k = int((values.cumsum(0) / values.sum() < energy).sum()) + 1
        basis = vectors[:, :k].float()
        projections[layer] = basis @ basis.T
    _norms_in_eval(model)
    for epoch in range(epochs):
        lr = 0.05 * 0.2 ** (epoch / max(1, epochs - 1))
        for x, y in forget:
            logs = model(x).log_softmax(1)
            p = logs.exp()
            known = -(1 - p.gather(1, y[:, None]) + 0.05).log().mean()
            loss = known + 0.2 * (p * logs).sum(1).mean()
            grads = torch.autograd.grad(loss, [layer.weight for layer in layers])
            with torch.no_grad():
                for layer, grad in zip(layers, grads, strict=True):
                    flat = grad.flatten(1)
                    layer.weight -= lr * (flat - flat @ projections[layer]).view_as(grad)


@dataclass(frozen=True)
class Contest:
    """Two ways to the same end; ``settings`` are what both are called with."""

    method: str
    settings: str
    ours: Way
    plain: Way


def contests(model: nn.Module, task: Task, size: int) -> list[Contest]:
    """Make the pairs.

    Args:
        model: The original network, for the neurons that masking trains.
        task: A class to forget.
        size: Of batches.

    Returns:
        One per method.
    """
    label, epochs = int(task.target), 3
    forget, retain = Batches(task.forget, size), Batches(task.given, size)
    masks = select_mask(saliency_of(model, forget, retain), 0.05, granularity="neuron", min_depth=0.5)
    return [
        Contest(
            "SSD",
            "squares of batch means, alpha 2, lambda 1",
            lambda m, f, r: ssd(m, f, r, estimator="batch", alpha=2.0, lambda_=1.0),
            lambda m, f, r: plain_ssd(m, f, r, 2.0, 1.0),
        ),
        Contest(
            "SSD",
            "ours: exact Fisher, adaptive; plain: as above",
            lambda m, f, r: ssd(m, f, r),
            lambda m, f, r: plain_ssd(m, f, r, 2.0, 1.0),
        ),
        Contest(
            "UNSIR",
            "256 noise rows, 40 steps, one epoch each",
            lambda m, f, r: unsir(m, label, r, repair_steps_min=0),
            lambda m, f, r: plain_unsir(m, label, r, rows=256, steps=40, share=0.02, lrs=(0.003, 0.003)),
        ),
        Contest(
            "SalUn",
            f"half of the scalars, {epochs} epochs",
            lambda m, f, r: salun(m, f, r, epochs=epochs),
            lambda m, f, r: plain_salun(m, f, r, density=0.5, epochs=epochs),
        ),
        Contest(
            "gradient masking",
            f"given masks of 5 % of the deeper neurons, {epochs} epochs",
            lambda m, f, r: gradient_masking(m, f, r, masks=masks, epochs=epochs),
            lambda m, f, r: plain_masking(m, f, r, masks, epochs),
        ),
        Contest(
            "PGU",
            f"energy 0.95, {epochs} epochs",
            lambda m, f, r: pgu_from_sets(m, f, r, epochs=epochs, leak=None),
            lambda m, f, r: plain_pgu(m, f, r, energy=0.95, epochs=epochs),
        ),
    ]


def measure(problem: Problem, label: int, laps: int) -> list[dict[str, object]]:
    """Time every contest; the two ways take turns.

    Args:
        problem: Data and network.
        label: The class to forget.
        laps: Of each.

    Returns:
        One row per contest.
    """
    original, _ = problem.learn(problem.train, 0, False)
    task = bench_methods.class_task(problem, label)
    device = task.forget.tensors[0].device
    forget, retain = (Batches(part, problem.batch_size) for part in (task.forget, task.given))
    rows: list[dict[str, object]] = []
    for contest in contests(original, task, problem.batch_size):
        seconds: dict[str, list[float]] = {OURS: [], PLAIN: []}
        reached: dict[str, dict[str, float]] = {}
        for lap in range(laps):
            for name, way in ((OURS, contest.ours), (PLAIN, contest.plain)):
                model = copy.deepcopy(original)
                torch.manual_seed(lap)
                seconds[name].append(_timed(lambda m=model, w=way: w(m, forget, retain), device))
                parts = ("test retain", "test forget")
                reached[name] = {part: accuracy(model, task.measures[part]) for part in parts}
        rows.append(
            {
                "method": contest.method,
                "settings": contest.settings,
                "seconds": seconds,
                "ratio": statistics.median(seconds[PLAIN]) / statistics.median(seconds[OURS]),
                "accuracies": reached,
            }
        )
        print(f"{contest.method} ({contest.settings}): {rows[-1]['ratio']:.2f}", flush=True)
    return rows


def _timed(run: Callable[[], object], device: torch.device) -> float:
    # On the CPU the process's own time, of one thread: what else the computer does is not in it.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Write the rows as Markdown."""
    header = ["method", "settings", "ours, s", "plain torch, s", "plain / ours"]
    header += ["ours: retain / forget", "plain: retain / forget"]
    return markdown(
        header,
        (
            [
                row["method"],
                row["settings"],
                *(f"{statistics.median(row['seconds'][name]):.2f}" for name in (OURS, PLAIN)),
                f"{row['ratio']:.2f}",
                *(" / ".join(f"{v:.1%}" for v in row["accuracies"][name].values()) for name in (OURS, PLAIN)),
            ]
            for row in rows
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.bench_method_speed", description=__doc__)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one file of JPEGs")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits")
    parser.add_argument("--label", type=int, default=0, help="class to forget")
    parser.add_argument("--laps", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=cifar.CPU.epochs, help="of the CIFAR-10 network")
    parser.add_argument("--retain", type=int, help="how much of the other classes methods get")
    parser.add_argument("--out", type=Path, default=bench_methods.RESULTS, help="folder")
    options = parser.parse_args(arguments)
    if options.digits == (options.data is not None):
        parser.error("give either --data or --digits")
    torch.set_num_threads(1)
    if options.digits:
        problem = bench_methods.digits()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        recipe = replace(cifar.CPU if device.type == "cpu" else cifar.GPU, epochs=options.epochs)
        problem = bench_methods.cifar10(options.data, device, recipe, options.retain)
    rows = measure(problem, options.label, options.laps)
    _save(options.out / f"speed-{problem.name}", rows, problem.name)
    return 0


def _save(stem: Path, rows: Sequence[Mapping[str, object]], name: str) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread, process time"
    arguments = [Path(text).name if text.endswith(".npz") else text for text in sys.argv[1:]]
    page = "\n".join(
        [
            f"## Whole methods against plain PyTorch: {name}",
            "",
            "A class is forgotten by the package and by a rendition of the published algorithm in autograd",
            "and tensor expressions, on the same network and batches, turn by turn. Medians; accuracies are",
            "those of the last turn, on the test set's other classes and on the class.",
            "",
            f"- commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}, {device}",
            f"- reproduce with `{shlex.join(['python', '-m', 'bench.bench_method_speed', *arguments])}`",
            "",
            table(rows),
            "",
        ]
    )
    Path(f"{stem}.md").write_text(page)
    print(f"\n{page}\nwrote {stem}.json and {stem}.md")


if __name__ == "__main__":
    raise SystemExit(main())
