"""SSD on LoRA adapters: on A and B by themselves, on their product, and on the merged weights.

    python -m bench.lora_delta                  # writes bench/results/methods/lora-delta.md and .json

Two small transformers are trained on other data first and learn what is to be forgotten through adapters of
LoRA alone (rank 8, scaled by 2, on every matrix):

    classes   a ViT of digits upside down and inverted, then of digits; one of the ten classes is forgotten
    head      the same, with the classifier trained, saved and dampened beside the adapters
    texts     a Llama of other users' texts, then of twelve users' by heart; one of these users is forgotten

SSD runs in its closed loop with its defaults, on the same layers each time:

    A and B           ``params="adapters"``: both factors, scalar by scalar
    product           the scaled product B A, scalar by scalar, added to frozen weights
    product, rank 8   the same, cut back to the adapter's rank by an SVD of every dampened product
    merged            base weights and product together, as ``merge_and_unload`` leaves them
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import unlearn_ext as ux
from bench import table
from bench.user_texts import LENGTH, VOCABULARY, batches, make_texts
from unlearn_ext import demo
from unlearn_ext.methods.until import measure, perplexity_rise

RESULT = Path(__file__).parent / "results" / "methods" / "lora-delta"
RANK = 8
KINDS = ("classes", "head", "texts")
BUDGET = 0.02  # of retain accuracy or perplexity, SSD's default
VARIANTS = ("A and B", "product", "merged")
Data = list[dict[str, Tensor]]


class Problem(NamedTuple):
    """A model with adapters, and the sets of one request."""

    adapted: Any
    forget: Data
    retain: Data
    test: Data  # of what stays
    validation: Data | None
    is_text: bool


class Split(nn.Module):
    """A linear layer, and beside it what an adapter adds to it as one matrix."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.base = layer.base_layer
        change = layer.get_delta_weight(layer.active_adapters[0]).detach()
        self.delta = nn.Linear(change.shape[1], change.shape[0], bias=False)
        self.delta.weight.data = change.clone()

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        return self.base(x) + self.delta(x)


def split(adapted: Any) -> nn.Module:
    """Copy a model with the products of its adapters as trainable matrices, and what is saved with them."""
    model = copy.deepcopy(adapted).base_model.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in list(model.named_modules()):
        replaced: nn.Module | None = None
        if hasattr(module, "get_delta_weight"):
            replaced = Split(module)
        elif hasattr(module, "modules_to_save"):
            replaced = module.modules_to_save[module.active_adapters[0]].requires_grad_(True)
        if replaced is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, replaced)
    return model


@torch.no_grad()
def cut(model: nn.Module, before: nn.Module) -> tuple[nn.Module, float]:
    """Cut every product of a dampened model to the adapter's rank.

    What that moves is told in terms of what the dampening moved: the ratio of their norms.
    """
    model = copy.deepcopy(model)
    originals = dict(before.named_modules())
    lost = changed = 0.0
    for name, module in model.named_modules():
        if isinstance(module, Split):
            dampened = module.delta.weight
            u, s, v = torch.linalg.svd(dampened.double(), full_matrices=False)
            short = (u[:, :RANK] * s[:RANK]) @ v[:RANK]
            lost += float((short - dampened).square().sum())
            changed += float((dampened - originals[name].delta.weight).double().square().sum())
            dampened.copy_(short)
    return model, (lost / changed) ** 0.5 if changed else 0.0


def train(model: nn.Module, data: list[Any], collate: Callable, epochs: int, lr: float, seed: int) -> None:
    """AdamW with one cycle of the learning rate."""
    rng, size = random.Random(seed), 32
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(free, lr)
    steps = epochs * -(-len(data) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(epochs):
        shuffled = rng.sample(data, len(data))
        for start in range(0, len(data), size):
            optimizer.zero_grad()
            model(**collate(shuffled[start : start + size])).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def with_adapters(model: nn.Module, seed: int, **settings: object) -> Any:
    """Put adapters on every matrix of the blocks."""
    import peft

    torch.manual_seed(seed)
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, **settings))


def images(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Collate digits."""
    pixels, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(pixels), "labels": torch.stack(labels)}


def digits(seed: int, *, head: bool = False) -> Callable[[int], Problem]:
    """Train the network of digits; what is returned makes a request of a class."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 10}
    widths = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = ViTForImageClassification(ViTConfig(**sizes, **widths, **none))
    known, unseen = (list(zip(*found.tensors, strict=True)) for found in demo.load_digits())
    train(model, [(x.max() - x.flip(1), y) for x, y in known], images, 20, 3e-3, seed)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense"]
    saved = ["classifier"] if head else None
    adapted = with_adapters(model, seed, target_modules=targets, modules_to_save=saved)
    train(adapted, known, images, 20, 3e-3, seed)

    def data(samples: list, label: int, *, of: bool) -> Data:
        chosen = [sample for sample in samples if (int(sample[1]) == label) == of]
        return [images(chosen[start : start + 128]) for start in range(0, len(chosen), 128)]

    def request(label: int) -> Problem:
        forget, retain = (data(known, label, of=of) for of in (True, False))
        return Problem(adapted, forget, retain, data(unseen, label, of=False), None, False)

    return request


def users(seed: int) -> Callable[[int], Problem]:
    """Train the language model; what is returned makes a request of a user."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    texts = make_texts(seed, users=12, others=40, each=8, public=0, public_unseen=0)
    widths = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **widths, **ends)
    )
    collate = lambda own: batches(own, len(own))[0]  # noqa: E731 - one use
    others = [text for own in texts.unseen[:30] for text in own]
    train(model, others, collate, 30, 3e-3, seed)
    adapted = with_adapters(model, seed, target_modules=r".*_proj")
    train(adapted, [text for own in texts.known for text in own], collate, 100, 1e-2, seed)
    validation, test = (
        batches([t for own in texts.unseen[a:b] for t in own]) for a, b in ((30, 35), (35, 40))
    )

    def request(user: int) -> Problem:
        kept = [text for index, own in enumerate(texts.known) for text in own if index != user]
        return Problem(adapted, batches(texts.known[user]), batches(kept), test, validation, True)

    return request


def figures(model: nn.Module, problem: Problem, before: dict[str, float]) -> dict[str, float]:
    """What is known of the request, and what the rest lost since before."""
    found = {}
    for name in ("forget", "retain", "test"):
        seen = measure(model, getattr(problem, name))
        found |= {f"{name} accuracy": 100 * seen.accuracy, f"{name} loss": seen.loss}
    if before:
        found["retain lost"] = 100 * (
            perplexity_rise(before["retain loss"], found["retain loss"])
            if problem.is_text
            else 1 - found["retain accuracy"] / before["retain accuracy"]
        )
    return found


def variant(name: str, problem: Problem) -> tuple[nn.Module, dict[str, object]]:
    """The copy of the model that a variant works on, and which parameters."""
    if name == "product":
        return split(problem.adapted), {}
    model = copy.deepcopy(problem.adapted)
    if name == "A and B":
        return model, {"params": "adapters"}
    model = model.merge_and_unload()
    layers = [name for name, module in split(problem.adapted).named_modules() if isinstance(module, Split)]
    saved = problem.adapted.peft_config["default"].modules_to_save or []
    for key, parameter in model.named_parameters():
        own = key.removesuffix(".weight")
        parameter.requires_grad_(own in layers or key.split(".")[0] in saved)
    return model, {}


def rows_of(problem: Problem) -> Iterator[dict[str, object]]:
    """Forget with every variant."""
    before = figures(problem.adapted, problem, {})
    yield {"variant": "original", **before}
    for name in VARIANTS:
        model, chosen = variant(name, problem)
        start = time.perf_counter()
        settings = {**chosen, "validation": problem.validation}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = ux.plan_ssd(model, problem.forget, problem.retain, **settings)
            plan.apply()
        seconds = time.perf_counter() - start
        costs = [tried.lost for tried in plan.candidates if tried.reached and tried.lost is not None]
        row = {"variant": name, "reached": plan.reached, "seconds": seconds, "tried": len(plan.candidates)}
        row["cheapest"] = 100 * min(costs) if costs else None
        within = [
            tried.forget for tried in plan.candidates if tried.lost is not None and tried.lost <= BUDGET
        ]
        row["within"] = max((seen.loss for seen in within), default=None)
        yield {**row, **figures(model, problem, before)}
        if name == "product":
            short, lost = cut(model, split(problem.adapted))
            found = figures(short, problem, before)
            yield {"variant": f"product, rank {RANK}", "reached": plan.reached, "cut": lost, **found}


def page(record: dict) -> str:
    """The results as Markdown."""
    lines = ["## SSD on LoRA adapters: factors, product, merged weights", "", *__doc__.splitlines()[4:]]
    lines += ["", *(f"- {name}: {value}" for name, value in record["facts"].items())]
    for kind in KINDS:
        rows = [row for row in record["rows"] if row["kind"] == kind]
        if not rows:
            continue
        loss_or, lost = ("loss", "perplexity") if kind == "texts" else ("accuracy", "accuracy")
        known = f"forget {loss_or}"
        requests = ", ".join(dict.fromkeys(f"{row['request']} (seed {row['seed']})" for row in rows))
        lines += ["", f"### {kind.title()}: {requests}", ""]
        head = [
            "variant",
            "reached",
            known,
            f"retain {lost} lost, %",
            "cheapest that forgets, % (where any does)",
        ]
        head.append("highest forget loss within the budget")
        head += [f"test {loss_or}", "cut off, % of the change"]
        lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for name in dict.fromkeys(row["variant"] for row in rows):
            own = [row for row in rows if row["variant"] == name]
            reached = sum(bool(row.get("reached")) for row in own)
            cells = [name, f"{reached} of {len(own)}" if "reached" in own[0] else ""]
            found = ", ".join(f"{row['cheapest']:.1f}" for row in own if row.get("cheapest") is not None)
            cells += [_mean(own, known), _mean(own, "retain lost"), found, _mean(own, "within")]
            changed = [row for row in own if row.get("reached")]  # else there is nothing to cut off
            cells += [_mean(own, f"test {loss_or}"), _mean(changed, "cut", 100)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _mean(rows: list[dict], key: str, scale: float = 1.0) -> str:
    values = [scale * row[key] for row in rows if row.get(key) is not None]
    return f"{statistics.fmean(values):.2f}" if values else ""


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.lora_delta", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="others are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[0, 1, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    path = RESULT.with_suffix(".json")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in rows if row["kind"] not in options.kinds]
    made = {"classes": digits, "head": functools.partial(digits, head=True), "texts": users}
    for kind in options.kinds:
        for seed in options.seeds:
            request = made[kind](seed)
            for number in options.requests:
                for row in rows_of(request(number)):
                    rows.append({"kind": kind, "seed": seed, "request": number, **row, "commit": commit})
                    print(rows[-1], flush=True)
    record = {
        "facts": {
            "torch": torch.__version__,
            "device": "CPU, 1 thread",
            "command": "`python -m bench.lora_delta`, kind by kind",
        },
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(page(record), encoding="utf-8")
    table.write_results()
    print(page(record))


if __name__ == "__main__":
    main()
