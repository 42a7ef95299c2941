"""What runs on every rank in test_sharded_failures.py: data that only one rank cannot use."""

import warnings

import torch
import torch.distributed as dist
from sharded_checks import own
from sharded_models import images, shard, shares, small
from sharded_training import random_masks

import unlearn_ext as ux
from unlearn_ext.methods.recorded import Record
from unlearn_ext.methods.until import measure

STEPS = {"epochs": 1, "lr": 1e-3}

CALLS = {
    "fisher_diagonal": lambda model, forget, retain: ux.fisher_diagonal(model, forget),
    "fisher_diagonal, drawn": lambda model, forget, retain: ux.fisher_diagonal(model, forget, estimator="mc"),
    "saliency": lambda model, forget, retain: ux.saliency(model, forget, score="grad"),
    "ssd": lambda model, forget, retain: ux.ssd(model, forget, retain, alpha=1.0),
    "ssd, in a loop": lambda model, forget, retain: ux.ssd(model, forget, retain, until=lambda _: False),
    "gradient_masking": lambda model, forget, retain: ux.gradient_masking(model, forget, retain, **STEPS),
    "gradient_masking, masks given": lambda model, forget, retain: ux.gradient_masking(
        model, forget, retain, masks=random_masks(small()), objective="ascend", **STEPS
    ),
    "salun": lambda model, forget, retain: ux.salun(model, forget, retain, **STEPS),
    "kfac_factors": lambda model, forget, retain: ux.kfac_factors(model, forget),
    "newton": lambda model, forget, retain: ux.newton(model, forget, retain, validation=retain),
    "activation_gram": lambda model, forget, retain: ux.activation_gram(model, forget),
    "measure": lambda model, forget, retain: measure(model, forget),
}


class Broken(list):
    """Batches, and a failure in the place of one."""

    def __iter__(self):
        for batch in super().__iter__():
            if batch is None:
                raise OSError("disk on fire")
            yield batch


# What becomes of a batch.
FAULTS = {
    "unreadable": lambda x, y: None,
    "no batch": lambda x, y: torch.zeros(3),
    "no tensors": lambda x, y: ("a", "b"),
    "unequal lengths": lambda x, y: (x, torch.cat([y, y])),
    "no labels": lambda x, y: (x,),
    "no classes": lambda x, y: (x, y + 7),
    "other labels": lambda x, y: (x, y.float()),
    "not finite": lambda x, y: (x * float("nan"), y),
    # These fail inside the model.
    "other sizes": lambda x, y: (x[..., :-1], y),
    "other dtype": lambda x, y: (x.double(), y),
}
SIZES = [[3, 2], [4, 2]]


def failing(call, fault, place):
    """How a call ends on this rank if a batch of rank 1 is of no use.

    Returns:
        Kind of the error and its message; whether the shards are as they were, without gradients.
    """
    model = small()
    model.stem[1] = torch.nn.GroupNorm(1, 3)  # statistics of a batch are refused
    model = shard(model)
    forget, retain = own(shares(images, 2, SIZES)), own(shares(images, 2, SIZES))
    before = [p.to_local().clone() for p in model.parameters()]
    if dist.get_rank() == 1:
        forget = Broken(FAULTS[fault](*batch) if i == place else batch for i, batch in enumerate(forget))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            CALLS[call](model, forget, retain)
            ended = "returned", ""
        except Exception as error:
            ended = type(error).__name__, str(error)
    kept = all(
        p.grad is None and torch.equal(a, p.to_local())
        for a, p in zip(before, model.parameters(), strict=True)
    )
    return *ended, kept


def all_failing(fault, place):
    """How every call ends."""
    return {call: failing(call, fault, place) for call in CALLS}


def failing_at_the_end():
    """What fails on one rank when the run is over: how it ends, and whether the shards are put back."""
    model = shard(small())
    forget, retain = own(shares(images, 2, SIZES)), own(shares(images, 2, SIZES))
    before = [p.to_local().clone() for p in model.parameters()]
    add = Record.added_to

    def failing(record, result):
        if dist.get_rank() == 1:
            raise OSError("no memory left")
        return add(record, result)

    Record.added_to = failing
    try:
        CALLS["gradient_masking, masks given"](model, forget, retain)
        ended = "returned", ""
    except OSError as error:
        ended = type(error).__name__, str(error)
    finally:
        Record.added_to = add
    return *ended, all(torch.equal(a, p.to_local()) for a, p in zip(before, model.parameters(), strict=True))
