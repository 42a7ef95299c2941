"""What a method is to reach, and what was measured before and after."""

import math

import pytest
import torch
from torch import nn

from unlearn_ext.methods.until import Watch, figures, measure
from unlearn_ext.results import UnlearnResult


class Counting(nn.Module):
    """Answers with its inputs, times a scalar, and counts the samples it is shown."""

    def __init__(self):
        super().__init__()
        self.sign = nn.Parameter(torch.ones(()))
        self.shown = 0

    def forward(self, x):
        self.shown += len(x)
        return self.sign * x


FORGET = [(torch.eye(4)[:3], torch.tensor([0, 1, 3])), (torch.eye(4)[3:], torch.tensor([3]))]
RETAIN = [(torch.eye(4), torch.tensor([0, 1, 2, 0]))]
UNSEEN = [(torch.eye(4), torch.tensor([0, 0, 0, 0]))]


def watch(model=None, until="forgotten", **settings):
    return Watch("m", model or Counting(), FORGET, RETAIN, until=until, **{"budget": 0.02, **settings})


def test_accuracy_and_loss_are_those_of_plain_pytorch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 3))
    x, y = torch.randn(20, 5), torch.randint(3, (20,))
    y[3] = -100
    found = measure(model, [(x[:7], y[:7]), (x[:0], y[:0]), (x[7:], y[7:])])
    assert model.training
    model.eval()
    with torch.no_grad():
        scores = model(x)
    kept = y >= 0
    assert found.samples == 20
    assert found.accuracy == pytest.approx(float((scores.argmax(1) == y)[kept].float().mean()))
    losses = nn.functional.cross_entropy(scores, y, reduction="none", ignore_index=-100)
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)


def test_positions_count_each_and_losses_are_means_within_a_sample():
    scores, labels = torch.randn(2, 3, 4), torch.tensor([[1, 2, -100], [0, -100, -100]])
    found = measure(nn.Identity(), [(scores, labels)])
    own = scores.log_softmax(-1)
    right = scores.argmax(-1) == labels
    assert found.accuracy == pytest.approx(float(right.sum()) / 3)
    first = -(own[0, 0, 1] + own[0, 1, 2]) / 2
    assert found.loss == pytest.approx(float(first - own[1, 0, 0]) / 2, rel=1e-6)


def test_measuring_draws_nothing_that_others_would_miss():
    data = torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    loader = torch.utils.data.DataLoader(data, 2, shuffle=True)
    own = torch.utils.data.DataLoader(data, 2, shuffle=True, generator=torch.Generator().manual_seed(3))
    states = torch.get_rng_state(), own.generator.get_state()
    assert measure(nn.Identity(), loader).accuracy == measure(nn.Identity(), own).accuracy == 0.75
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.generator.get_state(), states[1])


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="at least one sample, got none"):
        measure(nn.Identity(), [])


def test_what_was_measured_before_stays_and_every_pass_is_counted():
    model = Counting()
    seen = watch(model)
    assert (seen.before("forget").accuracy, seen.before("retain").accuracy) == (0.75, 0.75)
    assert (seen.passes, model.shown) == (1.0, 8)
    with torch.no_grad():
        model.sign.neg_()
    now = seen.now("retain")
    assert now.accuracy == 0.25
    assert seen.lost(now) == 0.5
    assert (seen.passes, model.shown) == (1.5, 12)
    assert seen.before("retain").accuracy == 0.75
    seen.count(4)
    assert seen.passes == 2.0


@pytest.mark.parametrize(
    "until, settings, before, after",
    [
        ("forgotten", {}, False, True),
        (0.75, {}, True, True),
        (0.5, {}, False, True),
        (0, {}, False, True),
        ("unseen", {"validation": UNSEEN}, False, True),
        ("unseen", {"validation": RETAIN}, True, True),
        (lambda model: model.sign.item() < 0, {}, False, True),
        (lambda model: model.sign.item() > 0, {}, True, False),
    ],
    ids=["forgotten", "a number", "a lower number", "zero", "unseen", "unseen, met", "callable", "never"],
)
def test_a_goal_is_judged_by_what_it_says(until, settings, before, after):
    model = Counting()
    seen = watch(model, until, **settings)
    assert seen.reached(seen.now("forget")) is before
    with torch.no_grad():
        model.sign.neg_()
    assert seen.reached(seen.now("forget")) is after


def test_one_percent_counts_as_forgotten_and_more_does_not():
    seen = watch()
    state = seen.before("forget")
    assert seen.reached(type(state)(0.01, 1.0, 100))
    assert not seen.reached(type(state)(0.0101, 1.0, 100))
    assert not seen.reached(type(state)(math.nan, 1.0, 100))


def test_the_passes_over_validation_data_count_too():
    model = Counting()
    seen = watch(model, "unseen", validation=UNSEEN)
    seen.reached(seen.before("forget"))
    assert (seen.passes, model.shown) == (1.5, 12)


def test_labels_of_both_sets_are_known():
    assert watch().shared_classes == [0, 1]
    alone = Watch("m", Counting(), FORGET, None, until=0.5, budget=0.0)
    assert alone.shared_classes == []
    assert not alone.has_retain


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (
            {"until": "gone"},
            ValueError,
            "m: until must be 'forgotten' or 'unseen' if it is a name, got 'gone'",
        ),
        ({"until": 1.5}, ValueError, r"m: until must lie in \[0, 1\]"),
        ({"until": math.nan}, ValueError, r"m: until must lie in \[0, 1\]"),
        ({"until": [0.5]}, TypeError, "m: until must be 'forgotten', 'unseen', a number, .*, got list"),
        ({"until": True}, TypeError, "got bool"),
        ({"budget": -0.1}, ValueError, r"m: budget must lie in \[0, 1\], got -0.1"),
        ({"budget": math.nan}, ValueError, r"m: budget must lie in \[0, 1\]"),
        ({"until": "unseen"}, ValueError, "m: validation must be given for until='unseen'"),
        ({"until": "unseen", "validation": iter([])}, ValueError, "validation must be re-iterable"),
    ],
)
def test_a_goal_that_cannot_be_judged_is_refused_before_the_model_runs(settings, error, message):
    model = Counting()
    with pytest.raises(error, match=message):
        watch(model, **settings)
    assert model.shown == 0


def test_the_record_names_set_and_figure_and_the_text_tells_them():
    seen = watch()
    before = figures({name: seen.before(name) for name in ("forget", "retain")})
    assert set(before) == {"forget_accuracy", "forget_loss", "retain_accuracy", "retain_loss"}
    result = UnlearnResult("m", {}, {}, 0.5, {}, (), reached=False, before=before, after=before)
    assert "forget accuracy 75.0% -> 75.0%; retain accuracy 75.0% -> 75.0%; goal not reached" in str(result)
