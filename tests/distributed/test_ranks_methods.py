"""Methods that train on ranks: every step is that of all ranks' batches together, and all end alike."""

import many
import pytest
import torch
import torch.distributed as dist
import work
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import unlearn_ext as ux

EPOCHS = 2


def _sets(world, form):
    """Each rank's batches of the forget and of the retain set; ragged, and one rank may have none."""
    inputs, labels = work.samples(60, seed=4)
    forget = work.batches(inputs[:20], labels[:20], 4)
    retain = work.batches(inputs[20:], labels[20:], 5)
    return work.shares(forget, world, form), work.shares(retain, world, form)


def _joined(batches):
    present = [batch for batch in batches if batch is not None]
    return tuple(torch.cat(column) for column in zip(*present, strict=True))


def _together(shares):
    """The batches of all ranks, step by step."""
    longest = max(map(len, shares))
    return [_joined([share[i] if i < len(share) else None for share in shares]) for i in range(longest)]


def _beside(first, second):
    """Of pairs: the second set's batches for all steps of all epochs, each rank going on in its own."""
    at, found = [0] * len(first), []
    for _ in range(EPOCHS):
        for step in range(max(map(len, first))):
            batches = []
            for rank, share in enumerate(first):
                if step < len(share) and second[rank]:
                    batches.append(second[rank][at[rank] % len(second[rank])])
                    at[rank] += 1
            found.append(_joined(batches))
    return found


def _masked(model, forget, retain, **settings):
    torch.manual_seed(0)
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in model.named_parameters()}
    return ux.gradient_masking(
        model, forget, retain, objective="relabel", epochs=EPOCHS, lr=0.05, masks=masks, **settings
    )


def _teachers(model, forget, retain, **settings):
    return ux.methods.bad_teacher(
        model, forget, retain, incompetent=work.model_of(work.Plain, 9), retain_share=1.0, **settings
    )


METHODS = {
    "finetune": (ux.methods.finetune, {"epochs": EPOCHS}, None),
    "gradient_ascent": (ux.methods.gradient_ascent, {"epochs": EPOCHS, "lr": 0.01}, None),
    "neg_grad_plus": (ux.methods.neg_grad_plus, {"epochs": EPOCHS}, "retain"),
    # Its first step away from the original starts where the gradient is nothing but rounding.
    "scrub": (ux.methods.scrub, {"epochs": EPOCHS, "forget_epochs": 0, "lr": 0.003}, None),
    "bad_teacher": (_teachers, {"epochs": EPOCHS, "lr": 0.003}, "retain"),
    "gradient_masking": (_masked, {}, "forget"),
    "pgu": (ux.pgu, {"epochs": EPOCHS, "until": None, "leak": None}, None),
    "newton": (ux.newton, {"loss_fn": ux.losses.cross_entropy}, None),
}


def _outcome(model, result):
    facts = {"changed": result.changed, "epochs": [e["steps"] for e in result.history if "steps" in e]}
    losses = [e["loss"] for e in result.history if "loss" in e]
    return dict(model.state_dict()), facts, losses


def _alone(name, world, form):
    forget, retain = _sets(world, form)
    _, _, first = METHODS[name]
    both = [_together(forget), _together(retain)]
    if first == "retain":
        both[0] = _beside(retain, forget)
    if first == "forget":
        both[1] = _beside(forget, retain)
    return _run(name, *both, whole=_together(forget) + _together(retain))


def _run(name, forget, retain, *, whole, **group):
    method, settings, _ = METHODS[name]
    model = work.model_of(work.Plain)
    settings = dict(settings)
    if name == "newton":
        settings["validation"] = [(x + 0.3, y) for x, y in retain]
        # At the labels there are: drawn ones are each rank's own.
        settings["factors"] = ux.kfac_factors(model, retain, loss_fn=ux.losses.cross_entropy, **group)
        settings["budget"] = settings["class_budget"] = settings["validation_budget"] = 1.0
    if name == "pgu":
        settings["gram"] = ux.activation_gram(model, whole)
    wrapped = DistributedDataParallel(model) if group else model
    return _outcome(model, method(wrapped, forget, retain, **settings, **group))


def _on_rank(rank, world, form, names):
    forget, retain = _sets(world, form)
    whole = _together(forget) + _together(retain)
    group = dist.group.WORLD
    return {name: _run(name, forget[rank], retain[rank], whole=whole, process_group=group) for name in names}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("world, form", [(2, "ragged"), (3, "even")])
def test_steps_are_those_of_all_batches_together(world, form):
    names = [name for name in METHODS if name != "newton" or form == "even"]
    found = many.run(_on_rank, world, form, names)
    for name in names:
        weights, facts, losses = _alone(name, world, form)
        assert all(many.same_bits(each[name], found[0][name]) for each in found), name
        ours, our_facts, our_losses = found[0][name]
        assert our_facts == facts, name
        assert facts["changed"] > 0
        assert our_losses == pytest.approx(losses, rel=1e-4), name
        assert many.difference(ours, weights) <= 2e-5, name


def _goal(model, forget, retain, **group):
    """What is measured against the goal, with steps too small to change an answer."""
    settings = {"until": "forgotten", "epochs": 1, "lr": 1e-7, "lr_end": 1e-7, "leak": None}
    gram = ux.activation_gram(model, _together(_sets(2, "ragged")[0]) + _together(_sets(2, "ragged")[1]))
    return ux.pgu(model, forget, retain, gram=gram, **settings, **group).before


def _few(rank, world):
    forget, retain = (shares[rank] for shares in _sets(world, "ragged"))
    inputs, labels = work.samples(1)
    model = work.model_of(work.Plain)
    mine = [(inputs, labels)] if rank else []
    ux.methods.finetune(model, None, mine, epochs=EPOCHS, process_group=dist.group.WORLD)
    return _goal(
        work.model_of(work.Plain), forget, retain, process_group=dist.group.WORLD
    ), model.state_dict()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_goals_are_measured_on_the_data_of_all_ranks_and_one_sample_is_enough():
    forget, retain = ([batch for share in shares for batch in share] for shares in _sets(2, "ragged"))
    before = _goal(work.model_of(work.Plain), forget, retain)
    model = work.model_of(work.Plain)
    ux.methods.finetune(model, None, [work.samples(1)], epochs=EPOCHS)
    for found, weights in many.run(_few, 2):
        assert found == pytest.approx(before, rel=1e-5)
        assert many.difference(weights, model.state_dict()) <= 1e-6


def _randomly(rank, world):
    """Methods with random choices; a wrapper that is used before and after; failures; normalisation."""
    group, found = dist.group.WORLD, {}
    forget, retain = (shares[rank] for shares in _sets(world, "empty" if world == 3 else "even"))
    for name, settings in {
        "salun": {"epochs": 1, "density": 0.3},
        "gradient_masking": {"epochs": 1},
        "random_label": {"epochs": 1},
        "bad_teacher": {"epochs": 1},
        "scrub": {"epochs": 2, "forget_epochs": 1},
        "fisher_forgetting": {"forget_classes": [1]},
    }.items():
        torch.manual_seed(rank)
        model = work.model_of(work.Plain)
        wrapped = DistributedDataParallel(model)
        result = ux.unlearn(name, wrapped, forget, retain, process_group=group, **settings)
        found[name] = _outcome(model, result)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        inputs, labels = work.samples(8, seed=rank)
        nn.functional.cross_entropy(wrapped(inputs), labels).backward()
        found[f"{name} after"] = {name: p.grad for name, p in model.named_parameters()}

    model = work.model_of(work.Plain)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bad = [(x * torch.inf, y) for x, y in forget] if rank == world - 1 else forget

    def told(function, *args, **settings):
        try:
            function(*args, process_group=group, **settings)
        except Exception as error:
            return type(error).__name__, str(error)
        return None

    found["bad"] = [
        told(ux.methods.gradient_ascent, model, bad, cap=1.0, epochs=1),
        told(_masked, model, bad, retain),
        told(ux.newton, model, bad, retain, validation=retain),
        told(ux.methods.finetune, model, None, [], epochs=1),
        told(ux.methods.finetune, work.model_of(), None, retain, epochs=1),
        told(ux.unsir, model, forget, retain),
        told(ux.methods.msg, model, forget, retain),
    ]

    def diverging(model, batch):
        values = ux.losses.cross_entropy(model, batch)
        with torch.no_grad():
            model.head.bias.add_(1e-3 * rank)
        return values

    found["diverging"] = told(ux.methods.finetune, model, None, retain, epochs=1, loss_fn=diverging)
    assert many.same_bits(before, dict(model.state_dict()))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("world", [2, 3])
def test_random_choices_failures_and_wrappers(world):
    found = many.run(_randomly, world)
    for name in found[0]:
        if name not in ("bad", "diverging"):
            assert all(many.same_bits(each[name], found[0][name]) for each in found), name
    last = world - 1
    for rank, each in enumerate(found):
        kinds = [told and told[0] for told in each["bad"]]
        assert kinds == [*["FloatingPointError"] * 3, "ValueError", *["NotImplementedError"] * 3], each["bad"]
        assert all((f"rank {last}: " in told[1]) == (rank != last) for told in each["bad"][:2])
        assert "at least one sample" in each["bad"][3][1] or "must hold" in each["bad"][3][1]
        assert "norm normalises the samples" in each["bad"][4][1]
        assert each["diverging"][0] == "RuntimeError"
        assert "head.bias" in each["diverging"][1]
