"""The code of the pages on many processes, as it stands, on ranks that each have a share of the data."""

import os
import re
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from sharded_models import language_model
from torch import nn

DOCS = Path(__file__).parents[2] / "docs"


def _blocks(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    return [match[1] for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def _vectors():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        x, y = torch.randn(48, 4), torch.arange(48) % 3
    data = torch.utils.data.TensorDataset(x, y)
    parts = [torch.utils.data.Subset(data, chosen.nonzero().flatten().tolist()) for chosen in (y == 0, y > 0)]
    forget, retain = (torch.utils.data.DataLoader(part, batch_size=4) for part in parts)
    return {"model": model, "forget_loader": forget, "retain_loader": retain, "data": retain}


def _texts():
    draws = torch.Generator().manual_seed(dist.get_rank())
    own = [
        {"input_ids": (ids := torch.randint(40, (3, 8), generator=draws)), "labels": ids} for _ in range(6)
    ]
    share = {"own_share": own, "own_share_to_forget": own[:1], "own_forget": own[:1]}
    return {**share, "model": language_model("llama"), "own_retain": own[1:4], "own_held_out": own[4:]}


def run(page):
    """Run all blocks of a page.

    Returns:
        How many.
    """
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    before = os.getcwd()
    os.chdir(folder[0])
    namespace = {"torch": torch, **(_vectors() if page == "processes.md" else _texts())}
    blocks = _blocks(page)
    try:
        with warnings.catch_warnings(), mock.patch("torch.distributed.init_process_group"):
            warnings.simplefilter("ignore")
            for block in blocks:
                exec(compile(block, page, "exec"), namespace)
    finally:
        os.chdir(before)
    return len(blocks)
