"""Models as users have them: looked at and left as they were, or refused with what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import unlearn_ext as ux
from unlearn_ext.methods.teachers import _initialised_afresh

Data = list[tuple[Tensor, Tensor]]
Call = Callable[[nn.Module, Data], object]

PASSES: dict[str, Call] = {
    "fisher_diagonal": lambda model, data: ux.fisher_diagonal(model, data),
    "batch": lambda model, data: ux.fisher_diagonal(model, data, estimator="batch"),
    "saliency": lambda model, data: ux.saliency(model, data, score="grad"),
    "activation_gram": lambda model, data: ux.activation_gram(model, data),
    "kfac_factors": lambda model, data: ux.kfac_factors(model, data),
    "plan_ssd": lambda model, data: ux.plan_ssd(model, data, data, alpha="adaptive"),
    "accuracy": lambda model, data: ux.metrics.accuracy(model, data),
    "mia": lambda model, data: ux.metrics.mia(model, forget=data, test=data, convention="loss", bootstrap=0),
}


def _images(n: int = 10) -> Data:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 1, 6, 6, generator=generator)
    return [(inputs, torch.randint(3, (n,), generator=generator))]


def _rows(n: int = 10) -> Data:
    return [(inputs.flatten(1), labels) for inputs, labels in _images(n)]


def _discriminator() -> nn.Module:
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(1, 4, 3)),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(),
        norm(nn.ConvTranspose2d(4, 2, 2)),
        nn.Flatten(),
        norm(nn.Linear(50, 6)),
        nn.Linear(6, 3),
    )


@pytest.mark.parametrize("name", PASSES)
def test_computed_weights_are_not_moved_by_looking_at_them(name: str) -> None:
    # In train mode, spectral_norm makes a step of its power iteration whenever its weight is read.
    model = _discriminator().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    PASSES[name](model, _images())
    after = model.state_dict()
    assert [key for key, value in before.items() if not torch.equal(value, after[key])] == []


def test_computed_weights_alone_leave_projection_nothing() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(36, 3)))
    with pytest.raises(ValueError, match=r"whose weight is a parameter.*remove_parametrizations"):
        ux.pgu(model, _rows(), _rows(), epochs=1)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Keeping(Small):
    """Keeps its features, with their graph, as many do that are looked at later."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = {"last": [torch.tanh(self.body(x))]}
        return self.head(self.features["last"][0])


def _pruned() -> nn.Module:
    model = Small()
    prune.l1_unstructured(model.body, "weight", 0.4)
    return model


def _normed() -> nn.Module:
    model = Small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older form, which many models have
        torch.nn.utils.weight_norm(model.body)
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {"keeps": Keeping, "pruned": _pruned, "normed": _normed}
SCRIPTED: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(Small()),
    "traced": lambda: torch.jit.trace(Small(), torch.randn(4, 36)),
    "scripted part": lambda: nn.Sequential(nn.Linear(36, 8), torch.jit.script(nn.Linear(8, 3))),
}

COPYING: dict[str, Call] = {
    **{
        name: lambda model, data, name=name: ux.METHODS[name](model, data, data, epochs=1)
        for name in ("scrub", "bad_teacher", "npo")
    },
    "relearn_steps": lambda model, data: ux.metrics.relearn_steps(model, data, 1.1, most=2),
}


@pytest.mark.parametrize("name", [*COPYING, "rmu", "compare"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pass_has_left_in_a_model_may_be_copied(kind: str, name: str) -> None:
    model, data = KINDS[kind](), _rows()
    model(data[0][0])  # leaves tensors with a graph, which deepcopy refuses
    calls = {
        **COPYING,
        "rmu": lambda model, data: ux.METHODS["rmu"](model, data, data, layer="body", epochs=1),
        "compare": lambda model, data: ux.compare(model, data, data, test=data, methods=["finetune"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls[name](model, data)


@pytest.mark.parametrize("kind", [*KINDS, *SCRIPTED])
def test_the_incompetent_teacher_knows_nothing(kind: str) -> None:
    model = {**KINDS, **SCRIPTED}[kind]()
    inputs = _rows(40)[0][0]
    with torch.no_grad():  # as trained: answers that no initialisation gives
        for parameter in model.parameters():
            parameter.mul_(30).add_(torch.linspace(0, 5, parameter.numel()).view(parameter.shape))
    fresh = _initialised_afresh(model)
    with torch.no_grad():
        assert model(inputs).abs().amax() > 30
        assert fresh(inputs).abs().amax() < 10


@pytest.mark.parametrize("kind", SCRIPTED)
@pytest.mark.parametrize(
    "name", ["fisher_diagonal", "batch", "saliency", "plan_ssd", "accuracy", "mia", *COPYING]
)
def test_scripted_models(kind: str, name: str) -> None:
    model, data = SCRIPTED[kind](), _rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        {**PASSES, **COPYING}[name](model, data)


@pytest.mark.parametrize("kind", SCRIPTED)
def test_importances_of_scripted_models(kind: str) -> None:
    model, data = SCRIPTED[kind](), _rows()
    found = ux.fisher_diagonal(model, data)
    expected = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    model.double()
    for inputs, label in zip(*data[0], strict=True):
        loss = nn.functional.cross_entropy(model(inputs.double().unsqueeze(0)), label.unsqueeze(0))
        for total, grad in zip(
            expected.values(), torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            total += grad.square() / len(data[0][1])
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-8)


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))


def _exported() -> nn.Module:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(Small(), (torch.randn(4, 36),), dynamic_shapes=dynamic).module()


class Complex(Small):
    def __init__(self) -> None:
        super().__init__()
        self.waves = nn.Parameter(torch.randn(36, 8, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(torch.cfloat) @ self.waves).abs())


def _unstatistical() -> nn.Module:
    norm = nn.BatchNorm1d(8, track_running_stats=False)
    return nn.Sequential(nn.Linear(36, 8), norm, nn.ReLU(), nn.Linear(8, 3))


PER_SAMPLE = {"fisher_diagonal", "kfac_factors", "plan_ssd"}
REFUSED: dict[str, tuple[Callable[[], nn.Module], set[str], str]] = {
    "lazy": (_lazy, PASSES.keys() - {"accuracy", "mia"}, "call the model once on a batch"),
    "exported": (
        _exported,
        set(PASSES) | {"scrub", "bad_teacher", "npo"},
        r"pass the module that torch\.export was given",
    ),
    "complex": (Complex, {"fisher_diagonal", "batch", "saliency", "plan_ssd"}, "view_as_complex"),
    "no statistics": (_unstatistical, PER_SAMPLE, "normalises it by the samples beside it"),
}


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind, (_, names, _) in REFUSED.items() for name in sorted(names)]
)
def test_what_cannot_be_is_refused_with_what_to_do(kind: str, name: str) -> None:
    make, _, message = REFUSED[kind]
    model, data = make(), _rows()
    if kind != "lazy":
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = {key: (p, p.detach().clone(), p.grad) for key, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        {**PASSES, **COPYING}[name](model, data)
    if kind != "lazy":
        for key, p in model.named_parameters():
            assert p is before[key][0]
            assert torch.equal(p, before[key][1])
            assert p.grad is before[key][2]
            assert p.requires_grad


def test_distances_of_complex_weights_count_both_parts() -> None:
    a, b = Complex(), Complex()
    b.load_state_dict(a.state_dict())
    with torch.no_grad():
        b.waves.add_(2j)
    found = ux.metrics.layer_distance(b, a, relative=False)["waves"]
    assert found == pytest.approx(2 * (36 * 8) ** 0.5)


class Shortening(nn.Module):
    """Tables whose rows a look-up shortens in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.words = nn.Embedding(20, 6, max_norm=1.0)
        self.bags, self.head = nn.EmbeddingBag(20, 6, max_norm=1.0), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1) + self.bags(x))


def _ids() -> Data:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(20, (12, 5), generator=generator), torch.randint(3, (12,), generator=generator))]


def _tables(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("head")}


@pytest.mark.parametrize("name", [*PASSES, "ssd"])
def test_tables_that_look_ups_write_to_are_put_back(name: str) -> None:
    model, data = Shortening(), _ids()
    before = _tables(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        {**PASSES, "ssd": lambda m, d: ux.ssd(m, d, d)}[name](model, data)
    for key, value in _tables(model).items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("name", ["gradient_masking", "salun"])
def test_part_of_a_table_that_look_ups_write_to_cannot_be_masked(name: str) -> None:
    model, data = Shortening(), _ids()
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    masks = {key: torch.zeros_like(p, dtype=torch.bool) for key, p in before.items()}
    masks["head.weight"][0], masks["words.weight"][:, :3] = True, True
    with pytest.raises(ValueError, match=r"words.weight must select all or nothing.* exclude"):
        ux.METHODS[name](model, data, data, masks=masks, epochs=1)
    for key, p in model.named_parameters():
        assert torch.equal(p, before[key])
    masks["words.weight"][:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ux.METHODS[name](model, data, data, masks=masks, epochs=1)
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert changed == {"head.weight", "words.weight"}
    assert torch.equal(model.head.weight[1:], before["head.weight"][1:])


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_tables_that_are_not_to_change_do_not(fails: bool, is_frozen: bool) -> None:
    model, data = Shortening(), _ids()
    if is_frozen:
        model.words.requires_grad_(False)
        model.bags.requires_grad_(False)
    before, head = _tables(model), model.head.weight.detach().clone()
    if fails:
        data = [*data, (data[0][0], torch.full_like(data[0][1], 7))]
    excluded = None if is_frozen else ["words", "bags"]
    with pytest.raises(ValueError, match="7") if fails else nullcontext():
        ux.METHODS["finetune"](model, data[:1], data, epochs=1, exclude=excluded)
    for key, value in _tables(model).items():
        assert torch.equal(value, before[key])
    assert torch.equal(model.head.weight, head) == fails


class Cut(torch.autograd.Function):
    """As int8 layers of ``torch.ao`` are: there is a graph, and nothing comes back through it."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


class CutOff(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(Cut.apply(self.inner(x)))
        return out


def test_gradients_of_none_are_zero() -> None:
    torch.manual_seed(1)
    model, x, y = CutOff(), torch.randn(6, 4), torch.arange(6) % 3
    values = ux.fisher_diagonal(model, [(x, y)])
    wanted = torch.zeros_like(model.head.weight)
    for n in range(6):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        wanted += torch.autograd.grad(loss, model.head.weight)[0].square() / 6
    assert torch.allclose(values["head.weight"], wanted, rtol=1e-4)
    assert not values["inner.weight"].any()


@pytest.mark.parametrize("name", ["gradient_masking", "fisher_forgetting", "msg"])
@pytest.mark.filterwarnings("ignore:.*answered as well as before")
def test_methods_take_gradients_of_none(name: str) -> None:
    model, batch = CutOff(), [(torch.randn(6, 4), torch.arange(6) % 3)]
    result = ux.METHODS[name](model, batch, batch, **({} if name == "fisher_forgetting" else {"epochs": 1}))
    assert result.changed_per_parameter["head.weight"] > 0
