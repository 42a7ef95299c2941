import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unlearn_ext as ux
from unlearn_ext import Scores, fisher_diagonal, ops, saliency, select_mask
from unlearn_ext.masks.saliency import SCORES


def bits(masks, shapes):
    return {name: ops.unpack_mask(mask, list(shapes[name].shape)) for name, mask in masks.items()}


def flat(masks, scores):
    return torch.cat([ops.unpack_mask(masks[name], [t.numel()]) for name, t in scores.items()])


@pytest.fixture
def sets():
    torch.manual_seed(0)
    forget = [(torch.randn(5, 4), torch.arange(5) % 3), (torch.randn(2, 4), torch.tensor([0, 1]))]
    return forget, [(torch.randn(9, 4), torch.arange(9) % 3)]


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def gradient(model, data):
    """The mean over samples, one by one."""
    model = copy.deepcopy(model).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    samples = [(x[i : i + 1], y[i : i + 1]) for x, y in data for i in range(len(x))]
    for x, y in samples:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad / len(samples)
    return total


def test_scores_are_what_their_formulas_say(sets):
    forget, retain = sets
    model = small()
    mean = gradient(model, forget)
    fisher, fisher_retain = fisher_diagonal(model, forget), fisher_diagonal(model, retain)
    floor = 0.1 * torch.cat([f.flatten() for f in fisher_retain.values()]).mean()
    expected = {
        "grad": lambda n, p: mean[n].abs(),
        "taylor": lambda n, p: (p * mean[n]).abs(),
        "fisher": lambda n, p: fisher[n],
        "grad_abs": lambda n, p: fisher_diagonal(model, forget, power=1)[n],
        "obd": lambda n, p: p.square() * fisher[n] / 2,
        "ratio": lambda n, p: (fisher[n] + floor) / (fisher_retain[n] + floor),
    }
    assert {*expected, "random"} == set(SCORES)
    for score, formula in expected.items():
        got = saliency(model, forget, retain, score=score)
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name], formula(name, p.detach()), rtol=1e-4, atol=1e-7, msg=score)


def test_random_scores_follow_the_generator(sets):
    def draw(seed):
        return saliency(small(), sets[0], score="random", generator=torch.Generator().manual_seed(seed))[
            "0.weight"
        ]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert 0 <= draw(1).min() <= draw(1).max() < 1


def test_the_model_is_left_as_it_was(sets):
    model = small().train()
    model[0].bias.requires_grad_(False)
    model(torch.randn(3, 4)).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    scores = saliency(model, *sets)
    assert "0.bias" not in scores
    assert "0.bias" not in {part.name for group in scores.groups for part in group.parts}
    assert model.training
    assert not model[0].bias.requires_grad
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"score": "magic"}, "score must be one of ratio, grad"),
        ({"score": "ratio", "retain": None}, "retain must be given"),
        ({"forget": iter([])}, "re-iterable"),
    ],
)
def test_saliency_refuses(sets, settings, message):
    arguments = {"forget": sets[0], "retain": sets[1], **settings}
    with pytest.raises(ValueError, match=message):
        saliency(small(), **arguments)


def test_a_loss_that_is_not_finite_is_reported(sets):
    forget = [(torch.full((2, 4), math.nan), torch.tensor([0, 1]))]
    with pytest.raises(FloatingPointError, match="loss must be finite"):
        saliency(small(), forget, score="grad")


@pytest.fixture
def scores(generator):
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 3, 2), "b.bias": (4,), "free": ()}
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("density", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("largest", [True, False])
def test_elements_are_those_a_sort_finds(scores, density, largest):
    values = torch.cat([t.flatten() for t in scores.values()])
    k = max(1, round(density * values.numel()))
    expected = torch.zeros_like(values, dtype=torch.bool)
    expected[values.argsort(descending=largest, stable=True)[:k]] = True
    assert torch.equal(flat(select_mask(scores, density, largest=largest), scores), expected)


def test_ties_go_to_the_lowest_index():
    scores = {"a": torch.ones(3), "b": torch.ones(3)}
    assert flat(select_mask(scores, 0.67), scores).tolist() == [True] * 4 + [False] * 2


def test_masks_of_growing_density_are_nested(scores):
    for granularity in ("element", "neuron"):
        smaller = torch.zeros(65, dtype=torch.bool)
        for density in (0.05, 0.2, 0.5, 0.9):
            larger = flat(select_mask(scores, density, granularity=granularity), scores)
            assert not bool((smaller & ~larger).any())
            smaller = larger


def test_neurons_are_marked_whole_and_by_their_mean(scores):
    masks = bits(select_mask(scores, 0.3, granularity="neuron"), scores)
    means = torch.cat(
        [
            (scores["a.weight"].sum(1) + scores["a.bias"]) / 6,
            (scores["b.weight"].sum((1, 2)) + scores["b.bias"]) / 7,
            scores["free"].reshape(1),
        ]
    )
    marked = torch.cat([masks["a.bias"], masks["b.bias"], masks["free"].reshape(1)])
    assert set(marked.nonzero().flatten().tolist()) == set(means.topk(3).indices.tolist())
    assert torch.equal(masks["a.weight"], masks["a.bias"][:, None].expand(6, 5))
    assert torch.equal(masks["b.weight"], masks["b.bias"][:, None, None].expand(4, 3, 2))


@pytest.mark.parametrize("reduction", ["sum", "max", "l2", "first"])
def test_other_reductions(scores, reduction):
    rows = torch.cat([scores["a.weight"], scores["a.bias"][:, None]], 1)
    expected = {
        "sum": rows.sum(1),
        "max": rows.amax(1),
        "l2": rows.norm(dim=1),
        "first": rows[:, 0],
    }[reduction]
    mask = select_mask(scores, 1 / 6, granularity="neuron", include="a.*", reduction=reduction)
    assert bits(mask, scores)["a.bias"].nonzero().flatten().tolist() == [int(expected.argmax())]


def test_layers_and_patterns(scores):
    masks = bits(select_mask(scores, 0.4, granularity="layer", exclude=["free"]), scores)
    assert masks["a.weight"].float().mean() + masks["b.weight"].float().mean() == 1
    assert not masks["free"]
    masks = bits(select_mask(scores, 1.0, include=["*.bias", "free"], exclude="b.*"), scores)
    assert {name: bool(mask.all()) for name, mask in masks.items()} == {
        name: name in ("a.bias", "free") for name in scores
    }
    assert not any(bool(masks[name].any()) for name in ("a.weight", "b.weight", "b.bias"))
    masks = bits(select_mask(scores, 1.0, min_depth=0.5), scores)
    assert not masks["a.weight"].any()
    assert masks["b.weight"].all()


@pytest.mark.parametrize("granularity", ["element", "neuron"])
def test_scope_layer_marks_the_same_share_everywhere(scores, granularity):
    masks = bits(select_mask(scores, 0.5, granularity=granularity, scope="layer"), scores)
    for prefix, neurons in (("a", 6), ("b", 4)):
        both = torch.cat([masks[f"{prefix}.weight"].flatten(), masks[f"{prefix}.bias"].flatten()])
        assert both.float().mean() == 0.5
        if granularity == "neuron":
            assert masks[f"{prefix}.bias"].sum() == neurons / 2


def test_rules():
    scores = {"a": torch.tensor([8.0, 1.0, 4.0, 2.0, 1.0])}

    def marked(density, rule, largest=True):
        return (
            flat(select_mask(scores, density, rule=rule, largest=largest), scores)
            .nonzero()
            .flatten()
            .tolist()
        )

    assert marked(2.0, "threshold") == [0, 2, 3]
    assert marked(2.0, "threshold", largest=False) == [1, 3, 4]
    assert marked(99.0, "threshold") == [0]  # at least one
    assert marked(0.2, "quantile", largest=False) == [1, 4]  # ties included
    assert marked(0.6, "quantile") == [0, 2]
    assert marked(0.5, "mass") == [0]  # exactly half of 16
    assert marked(0.51, "mass") == [0, 2]
    assert marked(1.0, "mass") == [0, 1, 2, 3, 4]
    assert marked(0.1, "mass", largest=False) == [1, 4]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"density": 1.5}, "density must lie"),
        ({"density": math.nan}, "density must lie"),
        ({"granularity": "row"}, "granularity must be one of"),
        ({"scope": "all"}, "scope must be one of"),
        ({"rule": "best"}, "rule must be one of"),
        ({"granularity": "layer", "scope": "layer"}, "scope must be 'global'"),
        ({"include": "nothing*"}, "must leave a parameter"),
        ({"min_depth": 1.0}, "min_depth must lie"),
        ({"granularity": "neuron", "reduction": "median"}, "reduction must be one of"),
    ],
)
def test_select_mask_refuses(scores, settings, message):
    with pytest.raises(ValueError, match=message):
        select_mask(scores, **{"density": 0.5, **settings})


def test_bad_scores_are_refused():
    for rule in ("density", "threshold", "mass"):
        with pytest.raises(ValueError, match="NaN"):
            select_mask({"a": torch.tensor([1.0, math.nan])}, 0.5, rule=rule)
    with pytest.raises(ValueError, match="non-negative"):
        select_mask({"a": torch.tensor([1.0, -1.0])}, 0.5, rule="mass")


def test_a_neurons_ratio_is_that_of_its_means(sets):
    forget, retain = sets
    model = small()
    scores = saliency(model, forget, retain)
    above, below = fisher_diagonal(model, forget), fisher_diagonal(model, retain)
    floor = 0.1 * torch.cat([f.flatten() for f in below.values()]).mean()
    means = [torch.cat([f["3.weight"], f["3.bias"][:, None]], 1).mean(1) + floor for f in (above, below)]
    torch.testing.assert_close(scores.of_neurons(scores.groups[1]), means[0] / means[1])


def test_a_random_neuron_is_as_likely_large_as_small():
    """With means of many draws in one group, 5 % would all come from the group of few."""
    shapes = {"wide.weight": (200, 400), "narrow.scale": (200,)}
    tensors = {n: torch.rand(s, generator=torch.Generator().manual_seed(0)) for n, s in shapes.items()}
    masks = bits(select_mask(Scores(tensors, score="random"), 0.1, granularity="neuron"), tensors)
    assert 10 <= int(masks["wide.weight"][:, 0].sum()) <= 30


def test_the_package_gives_them_out():
    assert ux.saliency is saliency
    assert ux.select_mask is select_mask
