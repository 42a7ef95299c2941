"""Importances and accuracy of ten layouts of data, against single samples one after the other.

The oracle reads the batches by hand, as the user who made them would, and knows nothing of tasks.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import unlearn_ext as ux

_spec = importlib.util.spec_from_file_location(
    "layouts", Path(__file__).parents[1] / "examples" / "layouts.py"
)
layouts = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(layouts)


def regression(model, batch):
    for x, y in zip(*batch, strict=True):
        answer = model(x[None]).squeeze()
        yield (answer - y) ** 2, [abs(answer.item() - y.item()) <= 1]


def multi_label(model, batch):
    for x, y in zip(*batch, strict=True):
        pairs = list(zip(model(x[None])[0], y, strict=True))
        losses = [-(logit if one else -logit).sigmoid().log() for logit, one in pairs]
        yield sum(losses) / len(losses), [bool(logit > 0) == bool(one) for logit, one in pairs]


def binary(model, batch):
    for x, y in zip(*batch, strict=True):
        logit = model(x[None])[0, 0]
        yield -(logit if y else -logit).sigmoid().log(), [bool(logit > 0) == bool(y)]


def segmentation(model, batch):
    for image, mask in zip(*batch, strict=True):
        scores = model(image[None])[0]
        known = [(r, c) for r in range(mask.shape[0]) for c in range(mask.shape[1]) if mask[r, c] != 255]
        assert len(known) == 48
        losses = [F.cross_entropy(scores[:, r, c], mask[r, c]) for r, c in known]
        yield sum(losses) / len(losses), [int(scores[:, r, c].argmax()) == int(mask[r, c]) for r, c in known]


def detection(model, batch):
    for image, target in zip(*batch, strict=True):
        off = model(image[None])[0] - target["box"]
        yield (off[0] ** 2 + off[1] ** 2 + off[2] ** 2 + off[3] ** 2) / 4, [max(map(abs, off.tolist())) < 0.3]


def token_classification(model, batch):
    for ids, mask, tags in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        scores = model(ids[None], mask[None])["logits"][0]
        known = [position for position, tag in enumerate(tags.tolist()) if tag != -100]
        losses = [F.cross_entropy(scores[position], tags[position]) for position in known]
        yield sum(losses) / len(losses), [int(scores[t].argmax()) == int(tags[t]) for t in known]


def recommender(model, batch):
    for user, item, clicked in zip(*batch, strict=True):
        logit = (model.users.weight[user] * model.items.weight[item]).sum()
        yield -(logit if clicked else -logit).sigmoid().log(), [bool(logit > 0) == bool(clicked)]


def graph_nodes(model, batch):
    for node, y in zip(batch["nodes"], batch["y"], strict=True):
        scores = model(batch["x"], batch["edges"], node[None])[0]
        yield F.cross_entropy(scores, y), [int(scores.argmax()) == int(y)]


def ctc(model, batch):
    start = 0
    for frames, length in zip(batch["frames"], batch["lengths"].tolist(), strict=True):
        text = batch["targets"][start : start + length]
        start += length
        scores = model(frames[None])[0]
        loss = F.ctc_loss(scores.log_softmax(-1), text, [len(frames)], [length], reduction="sum")
        best = scores.argmax(-1).tolist()
        read = [letter for at, letter in enumerate(best) if letter and (not at or letter != best[at - 1])]
        yield loss, [read == text.tolist()]
    assert start == len(batch["targets"])


def causal_lm(model, batch):
    for text in batch["input_ids"]:
        pairs = list(zip(model(input_ids=text[None]).logits[0, :-1], text[1:], strict=True))
        losses = [F.cross_entropy(scores, word) for scores, word in pairs]
        yield sum(losses) / len(losses), [int(scores.argmax()) == int(word) for scores, word in pairs]


ORACLES = [
    *(regression, multi_label, binary, segmentation, detection),
    *(token_classification, recommender, graph_nodes, ctc, causal_lm),
]
# Their batches hold what is not cut along the samples, which no kernel's rule covers: a loop over samples.
NOT_FUSED = {"detection", "graph_nodes"}

# Steps of training until some answers are right and some are not.
STEPS = {"detection": 20, "ctc": 30}


def converted(value, dtype):
    """A batch with its floats of another type."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: converted(part, dtype) for key, part in value.items()}
    return type(value)(converted(part, dtype) for part in value)


@pytest.fixture(params=ORACLES, ids=lambda oracle: oracle.__name__)
def case(request):
    """A layout not trained (no gradient vanishes), all its batches, and its oracle."""
    if request.param is causal_lm:
        pytest.importorskip("transformers")
    state = torch.get_rng_state()
    torch.manual_seed(1)
    layout = layouts.LAYOUTS[request.param.__name__]()
    torch.set_rng_state(state)
    return layout, layout.forget + layout.retain, request.param


def test_every_layout_has_an_oracle():
    assert [oracle.__name__ for oracle in ORACLES] == list(layouts.LAYOUTS)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_importances_are_those_of_single_samples(case, dtype, tolerance):
    layout, batches, oracle = case
    model, task = layout.model.to(dtype), layout.task
    found = ux.fisher_diagonal(model, [converted(batch, dtype) for batch in batches], task=task)
    parameters = dict(model.double().eval().named_parameters())
    totals, count = {name: torch.zeros_like(p) for name, p in parameters.items()}, 0
    for batch in batches:
        for loss, _ in oracle(model, converted(batch, torch.float64)):
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                totals[name] += 0 if grad is None else grad**2
            count += 1
    assert found.n_samples == count
    assert set(found) == set(totals)
    for name, total in totals.items():
        expected = total / count
        assert expected.max() > 0, name
        assert (found[name] - expected).abs().max() <= tolerance * expected.max(), name
    if oracle.__name__ not in NOT_FUSED:
        assert set(found.coverage.values()) == {"fused"}


def test_accuracy_is_the_share_of_what_was_counted_by_hand(case):
    layout, batches, oracle = case
    model = layout.model.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS.get(oracle.__name__, 0)):
        optimizer.zero_grad()
        sum(loss for loss, _ in oracle(model, batches[-1])).backward()
        optimizer.step()
    answers = [right for batch in batches for _, rights in oracle(model, batch) for right in rights]
    share = sum(answers) / len(answers)
    assert ux.metrics.accuracy(model, batches, task=layout.task) == pytest.approx(share)
    assert 0 < share < 1
