"""Methods judged against many retrained networks: random samples of digits, a fifth of the labels wrong.

``python -m bench.audit`` writes ``audit-digits.md`` and ``.json`` under ``bench/results/methods``. Networks
and rows of margins are kept under ``build/audit``: a run that was stopped goes on where it was.
"""

import argparse
import json
import subprocess
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bench import samples
from unlearn_ext.evaluation import audit

RESULTS = Path(__file__).parent / "results" / "methods"
KEPT = Path(__file__).parents[1] / "build" / "audit"
EPOCHS = 40


def make_model() -> nn.Module:
    return samples.network(1)


def train(model: nn.Module, data: DataLoader) -> nn.Module:
    """The recipe of ``bench.samples``, with the global random state as the seed."""
    whole = TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    return samples.train(model, whole, EPOCHS, int(torch.randint(2**31, ())))


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--methods", nargs="+", default=["newton", "ssd", "finetune", "random_label"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = samples.wrong_labels()
    sets = samples.sets_of(problem, problem.forgotten(0))
    loaders = {name: DataLoader(TensorDataset(*sets[name]), samples.BATCH) for name in sets if name != "test"}
    found = audit(
        options.methods,
        **loaders,
        full=DataLoader(problem.train, samples.BATCH),
        make_model=make_model,
        train=train,
        n_models=options.models,
        cache=KEPT,
        code="bench.audit 1",
        progress=True,
    )
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    facts = {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": f"CPU, {options.threads} thread",
        "command": f"`python -m bench.audit --models {options.models} --methods {' '.join(options.methods)}`",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {"facts": facts, **json.loads(found.to_json())}
    (RESULTS / "audit-digits.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    told = [f"- {name}: {value}" for name, value in facts.items()]
    lines = ["## Audit: 150 of 1,347 digits, a fifth of the labels wrong", "", *told, "", found.to_markdown()]
    (RESULTS / "audit-digits.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
