"""What runs on every rank in test_ranks_audit.py: an audit whose networks the ranks share out."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext.evaluation import audit

sys.path.append(str(Path(__file__).parents[1]))
from test_audit import blobs, make_model, nothing, perfect, train

TRAINED = []
STOPS_AT = []


def noted(model, data):
    TRAINED.append(len(TRAINED))
    train(model, data, 2)
    if TRAINED[-1] in STOPS_AT:
        raise OSError("the disk is full")


def failing_later(model, forget, retain, generator):
    """Fails for two of the networks, which different ranks make."""
    seed = generator.initial_seed()
    if seed in (6, 7):
        raise ZeroDivisionError(f"seed {seed}")


METHODS = {"perfect": perfect, "nothing": nothing, "newton": "newton", "failing": failing_later}


def settings(**changed):
    known = blobs(60, 0)
    forget, retain = ux.data.split(known, ids=range(10))
    found = {
        "forget": DataLoader(forget, 5),
        "retain": DataLoader(retain, 25, shuffle=True),
        "validation": DataLoader(blobs(45, 1), 45),
        "full": DataLoader(known, 30, shuffle=True),
        "make_model": make_model,
        "train": noted,
        "n_models": 5,
        "bootstrap": 5,
    }
    return {**found, **changed}


def figures(found):
    margins = {
        label: {name: m.tobytes() for name, m in sets.items()} for label, sets in found.margins.items()
    }
    return found.to_json(), margins


def alone_and_together(cache=None):
    """An audit by all ranks, and by this one alone; how many networks each has trained."""
    torch.manual_seed(dist.get_rank())
    TRAINED.clear()
    together = audit(METHODS, **settings(cache=cache), process_group=dist.group.WORLD)
    mine = len(TRAINED)
    alone = audit(METHODS, **settings())
    return figures(together), figures(alone), mine, len(TRAINED) - mine


def of_one_model():
    """Everything is unlearned from one network."""
    torch.manual_seed(0)
    model = make_model()
    both = [
        audit(
            {"nothing": nothing, "perfect": perfect}, **settings(full=None, model=model), process_group=group
        )
        for group in (dist.group.WORLD, None)
    ]
    return [figures(found) for found in both]


def killed_and_gone_on(cache):
    """Rank 1 stops in its second network; afterwards every rank goes on from what is kept."""

    TRAINED.clear()
    STOPS_AT[:] = [1] if dist.get_rank() == 1 else []
    told = ""
    try:
        audit(METHODS, **settings(cache=cache), code="v1", process_group=dist.group.WORLD)
    except LookupError as error:
        told = str(error)
    STOPS_AT.clear()
    first = len(TRAINED)
    again = audit(METHODS, **settings(cache=cache), code="v1", process_group=dist.group.WORLD)
    return told, first, len(TRAINED) - first, figures(again), figures(audit(METHODS, **settings()))


def refused(what):
    """What differs between the ranks is refused on all of them."""
    rank = dist.get_rank()
    other = {
        "shares": {"retain": DataLoader(blobs(60 + rank, 0), 25)},
        "order": {"validation": [batch for batch in settings()["validation"]]},
        "n_models": {"n_models": 5 + rank},
        "methods": {},
        "bad": {"n_models": 5 - 4 * rank},
    }[what]
    if what == "order" and rank:
        other = {"validation": [tuple(part.flip(0) for part in batch) for batch in other["validation"]]}
    methods = {"newton": ("newton", {"damping": 0.1 + rank})} if what == "methods" else {"nothing": nothing}
    try:
        audit(methods, **settings(**other), process_group=dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)
    return "returned", ""
