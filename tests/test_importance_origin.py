"""What importances remember of where they come from, and what is refused because of it."""

import copy
import functools

import pytest
import torch
from torch import nn

import unlearn_ext as ux
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext.fisher.importance import Importance, check_covers, check_same_kind, check_weights

CROSS_ENTROPY = "unlearn_ext.losses.cross_entropy"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3)).eval()


@pytest.fixture(scope="module")
def sets():
    torch.manual_seed(1)
    x, y = torch.randn(60, 6), torch.arange(60) % 3
    return [(x[y == 0], y[y == 0])], [(x[y > 0], y[y > 0])]


def test_importances_know_their_weights_and_their_loss(model, sets):
    importance = ux.fisher_diagonal(model, sets[0])
    assert importance.loss == CROSS_ENTROPY
    assert importance.weights_digest == weights_fingerprint(model)
    assert (
        ux.fisher_diagonal(model, sets[0], loss_fn=ux.losses.log_odds).loss == "unlearn_ext.losses.log_odds"
    )
    shifted = functools.partial(ux.losses.cross_entropy, shift=False)
    assert ux.fisher_diagonal(model, sets[0], loss_fn=shifted).loss == f"{CROSS_ENTROPY}(shift=False)"


def test_they_keep_it_through_sums_differences_and_files(model, sets, tmp_path):
    a, b = (ux.fisher_diagonal(model, part) for part in sets)
    for importance in (a + b, (a + b) - b):
        assert (importance.loss, importance.weights_digest) == (a.loss, a.weights_digest)
    (a + b).save(tmp_path / "i.safetensors")
    loaded = Importance.load(tmp_path / "i.safetensors")
    assert (loaded.loss, loaded.weights_digest) == (a.loss, a.weights_digest)


def test_files_from_before_load_as_of_unknown_origin(model, sets, tmp_path, monkeypatch):
    import unlearn_ext.fisher.importance as module

    a = ux.fisher_diagonal(model, sets[0])
    with monkeypatch.context() as patch:
        dumps = module.json.dumps
        old = {"loss", "weights_digest"}
        patch.setattr(
            module.json,
            "dumps",
            lambda meta, **how: dumps({k: v for k, v in meta.items() if k not in old}, **how),
        )
        a.save(tmp_path / "old.safetensors")
    loaded = Importance.load(tmp_path / "old.safetensors")
    assert (loaded.loss, loaded.weights_digest) == (None, None)
    assert torch.equal(loaded["0.weight"], a["0.weight"])
    assert (loaded + a).weights_digest is None
    check_weights("who", loaded, nn.Linear(1, 1))


def test_what_does_not_belong_together_is_not_combined(model, sets):
    a = ux.fisher_diagonal(model, sets[0])
    odds = ux.fisher_diagonal(model, sets[1], loss_fn=ux.losses.log_odds)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[3].bias += 1e-3
    later = ux.fisher_diagonal(trained, sets[1])
    for combine in (lambda x, y: x + y, lambda x, y: x - y):
        with pytest.raises(ValueError, match=r"the losses must agree, got .*cross_entropy and .*log_odds"):
            combine(a, odds)
        with pytest.raises(ValueError, match=r"weights .* must agree, .*compute both again on the model"):
            combine(a, later)
    with pytest.raises(ValueError, match="the losses must agree"):
        check_same_kind("who", a, odds)
    check_same_kind("who", a, later)
    later.weights_digest = None
    assert (a + later).n_samples == 60


def test_importances_of_another_model_are_told(model, sets):
    a = ux.fisher_diagonal(model, sets[0])
    check_weights("who", a, copy.deepcopy(model))
    check_weights("who", a, torch.compile(model, backend="eager"))
    other = copy.deepcopy(model)
    other[1].running_mean[0] += 1
    with pytest.raises(
        ValueError, match=r"who: importances must be those of the model's weights.*compute them"
    ):
        check_weights("who", a, other)
    a.weights_digest = None
    check_weights("who", a, other)


def test_a_fingerprint_sees_every_scalar_and_no_layout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(300, 301))
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(copy.deepcopy(model).to(memory_format=torch.channels_last))
    assert before != weights_fingerprint(copy.deepcopy(model).double())
    assert before != weights_fingerprint(nn.Sequential(model))
    for name, tensor in model.state_dict().items():
        for position in {0, tensor.numel() // 2, tensor.numel() - 1}:
            flat = tensor.view(-1)
            kept = flat[position].clone()
            flat[position] += 1
            assert weights_fingerprint(model) != before, (name, position)
            flat[position] = kept
    assert weights_fingerprint(model) == before
    weight = model[2].weight.detach()
    swapped = copy.deepcopy(model)
    swapped[2].weight.data[[0, 7]] = weight[[7, 0]]
    assert weights_fingerprint(swapped) != before


def test_odd_sizes_and_kinds_of_tensors_have_fingerprints():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.short = nn.Parameter(torch.randn(7, dtype=torch.float16))
            self.view = nn.Parameter(torch.randn(70001)[1:])
            self.register_buffer("flag", torch.tensor(True))
            self.register_buffer("none", torch.zeros(0))
            self.register_buffer("wave", torch.randn(5, dtype=torch.complex64))

    one = Odd()
    two = copy.deepcopy(one)
    assert weights_fingerprint(one) == weights_fingerprint(two)
    two.flag.fill_(False)
    assert weights_fingerprint(one) != weights_fingerprint(two)
    assert len(weights_fingerprint(nn.Identity())) == 32


# ---- the full set must hold the forget set


def test_full_importances_with_the_forget_set_in_them_pass(model, sets):
    for power in (1, 2):
        a, b = (ux.fisher_diagonal(model, part, power=power) for part in sets)
        check_covers("who", a + b, a)
        check_covers("who", ux.fisher_diagonal(model, sets[0] + sets[1], power=power), a)
        check_covers("who", a, a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )
    model.to(dtype).eval()
    x, y = torch.randn(48, 6, dtype=dtype), torch.arange(48) % 3
    forget = ux.fisher_diagonal(model, [(x[:16], y[:16])])
    full = ux.fisher_diagonal(
        model, [(part, labels) for part, labels in zip(x.split(7), y.split(7), strict=True)]
    )
    check_covers("who", full, forget)


def test_importances_of_the_retain_set_are_not_taken_for_the_full_set(model, sets):
    forget, retain = (ux.fisher_diagonal(model, part) for part in sets)
    with pytest.raises(ValueError, match=r"who: .* must cover the forget set, got \d+\.\d+% of the scalars"):
        check_covers("who", retain, forget)


def test_the_share_is_that_of_the_scalars_that_break_the_rule():
    full = Importance.from_dict({"a": torch.tensor([1.0, 1.0, 1.0, 1.0])}, n_samples=10)
    forget = Importance.from_dict({"a": torch.tensor([1.0, 2.0, 2.2, 9.0])}, n_samples=5)
    with pytest.raises(
        ValueError, match=r"got 50\.00% of the scalars with F_forget > \(n / n_forget\) F_full"
    ):
        check_covers("who", full, forget)
    fewer = Importance.from_dict({"a": torch.ones(4)}, n_samples=4)
    with pytest.raises(ValueError, match="got 4 samples for 5 to forget"):
        check_covers("who", fewer, forget)


@pytest.mark.parametrize("estimator", ["mc", "batch"])
def test_estimators_without_such_a_rule_are_let_pass(estimator):
    full = Importance.from_dict({"a": torch.ones(2)}, n_samples=10, estimator=estimator)
    forget = Importance.from_dict({"a": torch.full((2,), 9.0)}, n_samples=5, estimator=estimator)
    check_covers("who", full, forget)
