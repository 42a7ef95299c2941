"""The closed loops where a sample is a text: judged by the loss, not by how many tokens are right."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import unlearn_ext as ux
from unlearn_ext.methods.until import Measured, UnlearningFailed, Watch, measure, perplexity_rise
from unlearn_ext.tasks import CausalLM, Classification, MaskedLM, Sequence2Sequence, TokenClassification

TASK = CausalLM()
WORDS, LENGTH = 12, 10


class Words(nn.Module):
    """Tells the next word from all before it."""

    def __init__(self):
        super().__init__()
        self.look_up = nn.Embedding(WORDS, 24)
        self.before = nn.Embedding(WORDS, 24)
        self.inner = nn.Linear(48, 96)
        self.deeper = nn.Linear(96, 96)
        self.head = nn.Linear(96, WORDS)

    def forward(self, input_ids):
        places = torch.arange(1, input_ids.shape[1] + 1).sqrt()[:, None]
        so_far = self.before(input_ids).cumsum(1) / places
        hidden = torch.relu(self.inner(torch.cat([self.look_up(input_ids), so_far], -1)))
        return self.head(torch.relu(self.deeper(hidden)))


def texts(seed, count):
    """Sequences in which every second word follows from the one before; the others are anybody's guess."""
    ids = torch.randint(WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 1::2] = (ids[:, ::2] + 1) % WORDS
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.fixture(scope="module")
def learnt():
    """A model that knows texts by heart, and the sets."""
    torch.manual_seed(0)
    sets = {"forget": [texts(1, 4)], "retain": [texts(2, 30), texts(3, 30)], "validation": [texts(4, 80)]}
    model = Words()
    known = sets["forget"] + sets["retain"]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(TASK.loss(model, batch).sum() for batch in known).div(64).backward()
        optimizer.step()
    return model, sets


def test_which_tasks_are_judged_by_their_loss():
    model = nn.Linear(1, 1)
    for task in (CausalLM(), MaskedLM(), Sequence2Sequence()):
        assert task.yardstick(model) == "loss"
    for task in (Classification(), TokenClassification(), ux.tasks.Segmentation()):
        assert task.yardstick(model) == "accuracy"
    inferred = ux.tasks.resolve(None)
    assert inferred.yardstick(model) == "accuracy"

    class TinyForCausalLM(nn.Module):
        pass

    assert inferred.yardstick(TinyForCausalLM()) == "loss"


def test_newton_brings_a_text_to_the_loss_of_unseen_ones(learnt):
    original, sets = learnt
    model = copy.deepcopy(original)
    before = {name: measure(model, data, TASK) for name, data in sets.items()}
    assert before["forget"].loss < 0.3 < 1 < before["validation"].loss
    # So small a model has little room: by default, 2 %, it refuses.
    result = ux.newton(
        model, sets["forget"], sets["retain"], validation=sets["validation"], task=TASK, budget=0.2
    )
    after = {name: measure(model, data, TASK) for name, data in sets.items()}
    assert result.reached
    # Unseen texts as the model answers them in the end: by the step it has lost some of them too.
    assert before["validation"].loss < after["validation"].loss <= after["forget"].loss
    assert after["forget"].loss < 1.1 * after["validation"].loss
    assert perplexity_rise(before["retain"].loss, after["retain"].loss) <= 0.2
    assert after["forget"].accuracy > 0.3  # every second word is still told
    assert result.hyperparameters["rounds"] == 4
    assert result.hyperparameters["damping"] == 0.1
    assert sum(name == "direction" for name in result.seconds) == 1
    for name, measured in after.items():
        assert result.after[f"{name}_loss"] == pytest.approx(measured.loss, rel=1e-6)


def test_newton_approaches_in_equal_parts(learnt):
    original, sets = learnt
    goal, start = (measure(original, sets[name], TASK).loss for name in ("validation", "forget"))
    result = ux.newton(
        copy.deepcopy(original),
        sets["forget"],
        sets["retain"],
        validation=sets["validation"],
        task=TASK,
        rounds=2,
        budget=1.0,
    )
    steps, losses = zip(
        *((entry["step"], entry["forget"]) for entry in result.history if entry["phase"] == "search"),
        strict=True,
    )
    half = start + (goal - start) / 2
    # Along the first direction, from below, to half of the way and no further than that takes.
    first = next(index for index, loss in enumerate(losses) if loss >= half)
    assert all(loss < half for loss in losses[:first])
    far = sorted(step for step, loss in zip(steps, losses, strict=True) if half <= loss < goal)
    # Along the second from there on: it begins with a quarter of the step that was taken.
    assert any(step == found / 4 for step in steps[first:] for found in far)
    assert result.after["forget_loss"] >= goal


def test_newton_refuses_what_costs_too_much_perplexity_and_puts_every_bit_back(learnt):
    original, sets = learnt
    model = copy.deepcopy(original)
    with pytest.warns(UserWarning, match=r"retain perplexity \d+\.\d % higher.*the model is as it was"):
        result = ux.newton(
            model, sets["forget"], sets["retain"], validation=sets["validation"], task=TASK, budget=0.0
        )
    assert result.reached is False
    assert result.after == result.before
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    with pytest.raises(UnlearningFailed, match="retain perplexity"):
        ux.newton(
            model,
            sets["forget"],
            sets["retain"],
            validation=sets["validation"],
            task=TASK,
            budget=0.0,
            strict=True,
        )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def test_newton_leaves_unknown_texts_alone(learnt):
    original, sets = learnt
    model = copy.deepcopy(original)
    result = ux.newton(model, sets["validation"], sets["retain"], validation=sets["forget"] * 20, task=TASK)
    assert result.reached
    assert result.changed == 0


@pytest.mark.parametrize("rounds", [0, -1])
def test_newton_wants_at_least_one_round(learnt, rounds):
    model, sets = learnt
    with pytest.raises(ValueError, match="newton: rounds must be >= 1"):
        ux.newton(
            model, sets["forget"], sets["retain"], validation=sets["validation"], task=TASK, rounds=rounds
        )


def test_perplexity_rise():
    assert perplexity_rise(2.0, 2.0) == 0
    assert perplexity_rise(1.0, 1.5) == pytest.approx(math.exp(1.5) / math.exp(1.0) - 1)
    assert perplexity_rise(0.0, 1e4) == math.inf


def watch_of(learnt, **settings):
    model, sets = learnt
    given = {"until": "unseen", "budget": 0.02, "validation": sets["validation"], "task": TASK}
    return Watch("test", model, sets["forget"], sets["retain"], **{**given, **settings})


def test_a_watch_of_texts_judges_by_the_loss(learnt):
    watch = watch_of(learnt)
    unseen = measure(learnt[0], learnt[1]["validation"], TASK)
    before = watch.before("retain")
    assert watch.goal == "a loss on the forget set no lower than on the validation set"
    assert watch.reached(Measured(accuracy=1.0, loss=unseen.loss, samples=1))
    assert not watch.reached(Measured(accuracy=0.0, loss=unseen.loss * 0.999, samples=1))
    lost = watch.lost(Measured(accuracy=0.0, loss=before.loss + math.log(1.03), samples=1))
    assert lost == pytest.approx(0.03)
    assert watch.in_words(lost) == "3.00 % of retain perplexity gained"
    assert watch.knows(Measured(0.5, 2.0, 1)) < watch.knows(Measured(0.4, 1.0, 1))


def test_a_watch_of_labels_judges_by_accuracy():
    data = [(torch.eye(3), torch.tensor([0, 1, 2]))]
    model = nn.Linear(3, 3)
    watch = Watch("test", model, data, data, until="unseen", budget=0.02, validation=data)
    accuracy = watch.before("retain").accuracy
    assert watch.lost(Measured(accuracy - 0.1, 99.0, 3)) == pytest.approx(0.1)
    assert watch.in_words(0.1) == "10.00 points of retain accuracy lost"
    assert watch.knows(Measured(0.5, 2.0, 1)) > watch.knows(Measured(0.4, 1.0, 1))


def test_ssd_stops_at_unseen_texts_where_they_are_given(learnt):
    original, sets = learnt
    model = copy.deepcopy(original)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.ssd(model, sets["forget"], sets["retain"], validation=sets["validation"], task=TASK)
    assert result.hyperparameters["until"] == "unseen"
    rise = perplexity_rise(result.before["retain_loss"], result.after["retain_loss"])
    assert rise <= 0.02  # or nothing was done
    if not result.reached:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))
    assert ux.plan_ssd(model, sets["forget"], sets["retain"], task=TASK).summary().count("points") == 0
