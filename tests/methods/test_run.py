"""All or nothing: what is kept of a model during a run, and what is put back."""

import pytest
import torch
from torch import nn

import unlearn_ext as ux
from unlearn_ext.methods.run import Run, unlearning


def _model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def _data(n=24):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.arange(n) % 3)]


def test_only_what_may_change_is_kept_and_put_back():
    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def failing():
        with unlearning(model, "test", {}, changes=["0.weight"]) as run, torch.no_grad():
            run.keep(["3.bias", "0.weight"])
            assert set(run._before) == {"0.weight", "3.bias"}
            for parameter in (model[0].weight, model[3].bias):
                parameter.add_(1)
            model[1].running_mean.add_(1)
            assert torch.equal(run.original("0.weight"), before["0.weight"])
            assert run.original("3.weight").data_ptr() == model[3].weight.data_ptr()
            changed = run.result().changed_per_parameter
            assert {name for name, share in changed.items() if share} == {"0.weight", "3.bias"}
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("failing", [False, True])
def test_methods_that_change_a_part_keep_that_part(failing, monkeypatch):
    kept = []
    keep = Run.keep

    def noting(self, names):
        keep(self, names)
        kept.append(set(self._before))

    monkeypatch.setattr(Run, "keep", noting)
    model, data = _model(), _data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = [0]

    def loss(model, batch):
        calls[0] += model.training
        values = ux.losses.cross_entropy(model, batch)
        return values * torch.nan if failing and calls[0] > 3 else values

    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    masks["3.weight"][0] = True

    def run():
        return ux.gradient_masking(
            model, data, objective="relabel", masks=masks, epochs=4, lr=0.1, loss_fn=loss
        )

    if failing:
        with pytest.raises(FloatingPointError, match="the loss must be finite"):
            run()
    else:
        assert run().changed_per_parameter["3.weight"] == pytest.approx(1 / 3)
    assert max(kept, key=len) == {"3.weight"}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != (name == "3.weight" and not failing)


def test_full_set_takes_the_place_of_what_was_measured():
    model, data = _model(), _data()
    stored = [ux.fisher_diagonal(model, part) for part in (data, _data(30))]
    values = [{name: tensor.clone() for name, tensor in each.items()} for each in stored]
    given = ux.plan_ssd(model, stored[0], stored[1], alpha=1.1)
    for each, value in zip(stored, values, strict=True):  # the caller's are left alone
        assert all(torch.equal(each[name], tensor) for name, tensor in value.items())
    fresh = ux.plan_ssd(model, data, _data(30), alpha=1.1, loss_fn=ux.losses.cross_entropy)
    for name, tensor in given.importance_full.items():
        torch.testing.assert_close(fresh.importance_full[name], tensor, rtol=1e-6, atol=0)
