"""All or nothing, and the loop: what every method that trains relies on."""

import pytest
import torch
from torch import nn

from unlearn_ext.methods.loop import train
from unlearn_ext.methods.run import unlearning


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def make_data(n_batches=3):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 4, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(n_batches)
    ]


def objective(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def run_once(model, seed, **settings):
    with unlearning(model, "test", {}, generator=torch.Generator().manual_seed(seed)) as run:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps = train(run, "fit", make_data(), objective, optimizer, **settings)
    return run.result(), steps


def test_it_trains_and_records():
    model = make_model()
    before = state_of(model)
    result, steps = run_once(model, 0, epochs=2)
    assert steps == 6
    assert [(entry["epoch"], entry["steps"]) for entry in result.history] == [(0, 3), (1, 3)]
    assert result.history[1]["loss"] != result.history[0]["loss"]
    assert set(result.seconds) == {"fit"}
    assert result.changed_per_parameter["0.weight"] > 0.5
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])


def test_the_generator_decides_everything():
    models = [make_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        run_once(model, seed)
    assert same(state_of(models[0]), state_of(models[1]))  # dropout included
    assert not same(state_of(models[0]), state_of(models[2]))


def test_the_global_random_state_is_put_back():
    model = make_model()
    torch.rand(3)  # the state is none that making a model or a run begins with
    state = torch.get_rng_state()
    run_once(model, 0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_failure_leaves_the_model_as_it_was(error):
    model = make_model()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    model[1].eval()
    before, grad = state_of(model), model[4].weight.grad
    pointers = [p.data_ptr() for p in model.parameters()]
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("half-way")
        return objective(model, batch)

    def attempt():
        with unlearning(model, "test", {}) as run:
            model.train()
            model[0].bias.requires_grad_(True)
            train(run, "fit", make_data(), failing, torch.optim.SGD(model.parameters(), lr=0.1))

    with pytest.raises(error, match="half-way"):
        attempt()
    assert calls == 3
    assert same(before, state_of(model))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert model[4].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert not model[0].bias.requires_grad
    assert model.training
    assert not model[1].training


def test_a_failure_leaves_values_that_train_and_eval_change():
    class Adapter(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                with torch.no_grad():
                    self.weight.mul_(0.5 if mode else 2.0)
                    self.calls = torch.full_like(self.calls, float(mode))
            return super().train(mode)

    adapter = Adapter(2, 2)
    adapter.register_buffer("calls", torch.zeros(()))
    before, calls = state_of(adapter), adapter.calls

    def attempt():
        with unlearning(adapter, "test", {}):
            adapter.eval()
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        attempt()
    assert adapter.training
    assert same(before, state_of(adapter))
    assert adapter.calls is calls


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_failure_is_undone_where_the_caller_has_turned_autograd_off(off):
    model = make_model()
    before = state_of(model)

    def attempt():
        with off(), unlearning(model, "test", {}) as run:
            model.train()
            train(run, "fit", make_data(), objective, torch.optim.SGD(model.parameters(), lr=0.1))
            assert not same(before, state_of(model))
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        attempt()
    assert same(before, state_of(model))
    objective(model, make_data()[0]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_success_keeps_values_and_restores_flags():
    model = make_model().eval()
    run_once(model, 0)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_loss_that_is_not_finite_says_where():
    model = make_model()
    before = state_of(model)
    data = [*make_data(), (torch.full((5, 4), torch.inf), torch.zeros(5, dtype=torch.long))]
    with (
        pytest.raises(FloatingPointError, match=r"test: the loss must be finite.*'fit', epoch 0, batch 3"),
        unlearning(model, "test", {}) as run,
    ):
        train(run, "fit", data, objective, torch.optim.SGD(model.parameters(), lr=0.1))
    assert same(before, state_of(model))


def test_steps_min_goes_on_in_whole_steps():
    _, steps = run_once(make_model(), 0, epochs=1, steps_min=7)
    assert steps == 7
    assert run_once(make_model(), 0, epochs=0, steps_min=0)[1] == 0


def test_schedule_and_early_end():
    model = make_model()
    with unlearning(model, "test", {}) as run:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        train(
            run,
            "fit",
            make_data(),
            objective,
            optimizer,
            epochs=5,
            schedule=lambda epoch: 0.1 / (epoch + 1),
            after_epoch=lambda epoch: epoch == 1,
        )
    assert [entry["lr"] for entry in run.history] == [0.1, 0.05]


def test_data_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="'fit' must hold a batch"), unlearning(make_model(), "t", {}) as run:
        train(run, "fit", [], objective, torch.optim.SGD(run.model.parameters(), lr=0.1))


def test_nothing_changed_is_said():
    model = make_model()
    with unlearning(model, "nothing", {"a": 1}) as run:
        pass
    result = run.result()
    assert result.changed == 0
    assert result.hyperparameters == {"a": 1}
    assert set(result.changed_per_parameter) == {name for name, _ in model.named_parameters()}
