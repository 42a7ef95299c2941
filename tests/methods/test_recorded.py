"""What every method says of its run."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext.methods.recorded import MUCH, Record, recorded
from unlearn_ext.methods.until import measure
from unlearn_ext.results import UnlearnResult


@pytest.fixture(scope="module")
def learnt():
    """A network that tells three kinds of noise, a forget and a retain set, shuffled."""
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    x = torch.randn(3, 8)[y] + 0.4 * torch.randn(120, 8)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    parts = ux.data.split(TensorDataset(x, y), classes=0)
    return model.eval(), *(DataLoader(part, 16, shuffle=True) for part in parts)


def make():
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


SETTINGS = {
    "retrain": {"make_model": make, "train": lambda model, data: None},
    "ssd": {"alpha": "adaptive"},
    "pgu": {"until": None, "epochs": 2},
    "gradient_masking": {"epochs": 1},
    "msg": {"epochs": 1},
    "rmu": {"layer": "0"},
    "fisher_forgetting": {},
}


@pytest.mark.parametrize("name", list(ux.METHODS))
def test_every_method_records_what_was_measured_before_and_after(learnt, name):
    original, forget, retain = learnt
    if name == "newton":
        pytest.skip("measures its own guards, on validation data too: see test_newton.py")
    model = copy.deepcopy(original)
    before = [measure(model, data) for data in (forget, retain)]
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.unlearn(name, model, forget, retain, **SETTINGS.get(name, {}))
    assert torch.equal(torch.get_rng_state(), random_state)
    after = [measure(model, data) for data in (forget, retain)]
    for which, found in (("before", before), ("after", after)):
        told = getattr(result, which)
        assert told == pytest.approx(
            {
                "forget_accuracy": found[0].accuracy,
                "forget_loss": found[0].loss,
                "retain_accuracy": found[1].accuracy,
                "retain_loss": found[1].loss,
            },
            rel=1e-5,
        )
    assert result.passes >= 2


def test_what_is_answered_as_well_as_before_is_warned_about(learnt):
    original, forget, retain = learnt
    with pytest.warns(UserWarning, match=r"finetune: the forget set is answered as well as before: accuracy"):
        ux.methods.finetune(copy.deepcopy(original), forget, retain, epochs=1, lr=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ux.methods.random_label(copy.deepcopy(original), forget, retain, epochs=10, lr=1e-2)
    assert result.after["forget_accuracy"] < result.before["forget_accuracy"]


def test_much_lost_on_the_retain_set_is_warned_about(learnt):
    original, forget, retain = learnt
    model = copy.deepcopy(original)
    with pytest.warns(
        UserWarning, match=r"random_label: the retain set lost [\d.]+ points of accuracy"
    ) as told:
        result = ux.methods.random_label(model, forget, retain, epochs=1, lr=10.0)
    lost = result.before["retain_accuracy"] - result.after["retain_accuracy"]
    assert lost > MUCH
    assert any(f"lost {100 * lost:.1f} points" in str(warning.message) for warning in told)


def test_what_the_retain_set_lost_is_counted_as_it_stands():
    x = torch.eye(2).repeat(20, 1)
    data, blank = [(x, torch.arange(2).repeat(20))], UnlearnResult("m", {}, {}, 0.0, {}, ())
    model = nn.Identity()
    record = Record(model, None, data, None)
    for wrong, is_much in ((1, False), (3, True)):  # of 40
        model.register_forward_hook(
            lambda _, __, out, n=wrong: torch.cat([out[:n].flip(1), out[n:]]), always_call=True
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            record.measure_again()
            record.added_to(blank)
        model._forward_hooks.clear()
        assert [f"lost {100 * wrong / 40:.1f} points" in str(w.message) for w in told] == [True] * is_much


def test_without_accuracy_the_loss_decides():
    x = torch.randn(8, 2)
    model, data = nn.Linear(2, 1), [(x, x[:, :1])]
    blank = UnlearnResult("m", {}, {}, 0.0, {}, ())
    record = Record(model, data, None, ux.tasks.Regression())
    with pytest.warns(UserWarning, match="m: the forget set is answered as well as before: loss"):
        result = record.added_to(blank)
    assert set(result.after) == {"forget_accuracy", "forget_loss"}
    with torch.no_grad():
        model.weight.mul_(-30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        record.added_to(blank)


def test_what_cannot_be_measured_is_left_out_and_errors_are_the_methods_own(learnt):
    model, forget, _ = learnt
    calls = []

    @recorded
    def method(model, forget, retain=None, *, task=None):
        calls.append((forget, retain))
        if forget == "wrong":
            raise TypeError("mine")
        return UnlearnResult("m", {}, {}, 0.0, {}, ())

    importance = ux.fisher_diagonal(model, forget)
    for data in (importance, [(torch.zeros(2, 8),)], None, []):
        assert method(model, data).before == {}
    with pytest.raises(TypeError, match="mine"):
        method(model, "wrong")
    with pytest.raises(TypeError, match="unexpected"):
        method(model, forget, nothing=1)
    assert len(calls) == 5


def test_figures_that_a_method_has_measured_itself_stay():
    own = UnlearnResult("m", {}, {}, 0.0, {}, (), before={"forget_accuracy": 0.25}, passes=1.0)
    record = Record(nn.Identity(), [(torch.eye(2), torch.tensor([0, 1]))], None, None)
    assert record.added_to(own) is own


def test_labels_that_are_corrected_are_no_failure_to_forget():
    x, y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 2
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    for objective in ("relabel", "random_relabel"):
        settings = {"epochs": 1, "lr": 1e-6, "objective": objective}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            ux.gradient_masking(copy.deepcopy(model), [(x[:6], y[:6])], [(x[6:], y[6:])], **settings)
        is_told = any("answered as well as before" in str(warning.message) for warning in told)
        assert is_told == (objective == "random_relabel")
