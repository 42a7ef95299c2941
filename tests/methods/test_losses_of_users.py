"""What a user's loss and a user's batches may be: one value per sample, of batches that have any."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn_ext as ux

METHODS = ["finetune", "gradient_ascent", "neg_grad_plus", "random_label", "scrub", "msg", "salun", "unsir"]


def _model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def _batches(classes: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat(8)
    inputs = torch.randn(len(labels), 6, generator=generator) + 2 * torch.eye(3, 6)[labels]
    return [(inputs[i : i + 8], labels[i : i + 8]) for i in range(0, len(labels), 8)]


FORGET, RETAIN = _batches((2,), 0), _batches((0, 1), 1)


def _call(name: str, model: nn.Module, forget: object, retain: object, **settings: object) -> object:
    method = ux.METHODS[name]
    if "epochs" in inspect.signature(method).parameters:
        settings["epochs"] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return method(model, forget, retain, **settings)


def _cross_entropy(reduction: str) -> object:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)


WRONG = {
    "mean": _cross_entropy("mean"),
    "sum": _cross_entropy("sum"),
    "column": lambda model, batch: _cross_entropy("none")(model, batch).unsqueeze(1),
    "tuple": lambda model, batch: (_cross_entropy("none")(model, batch), model),
    "number": lambda model, batch: 1.0,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_loss_that_is_not_one_per_sample_is_refused(name: str, kind: str) -> None:
    model = _model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"one (value|loss) per sample"):
        _call(name, model, FORGET, RETAIN, loss_fn=WRONG[kind])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["mean", "column"])
@pytest.mark.parametrize("pass_", ["saliency", "kfac_factors"])
def test_passes_refuse_it_too(pass_: str, kind: str) -> None:
    settings = {"score": "grad"} if pass_ == "saliency" else {}
    with pytest.raises(ValueError, match=r"one (value|loss) per sample"):
        getattr(ux, pass_)(_model(), FORGET, loss_fn=WRONG[kind], **settings)


def test_a_task_whose_drawn_loss_is_a_mean_has_no_factors() -> None:
    class Mean(ux.tasks.Classification):
        def losses(self, outputs: Tensor, batch: object) -> Tensor:
            return super().losses(outputs, batch).mean()

    with pytest.raises(ValueError, match="one value per sample"):
        ux.kfac_factors(_model(), RETAIN, task=Mean())


def test_a_loss_of_the_whole_batch_trains_as_in_a_loop_of_ones_own() -> None:
    def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = F.normalize(model(batch[0]), dim=1)
        alike = batch[1].unsqueeze(0) == batch[1].unsqueeze(1)
        values = (found @ found.T / 0.5).log_softmax(1)
        return -(values * alike).sum() / alike.sum()

    model, own = _model(), _model().double()
    _call(
        "finetune",
        model,
        FORGET,
        RETAIN,
        loss_fn=lambda model, batch: contrastive(model, batch).expand(len(batch[1])),
        lr=0.1,
    )
    defaults = inspect.signature(ux.METHODS["finetune"]).parameters
    settings = {key: defaults[key].default for key in ("momentum", "weight_decay") if key in defaults}
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, **settings)
    for inputs, labels in RETAIN:
        optimizer.zero_grad()
        contrastive(own, (inputs.double(), labels)).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*METHODS, "gradient_masking", "npo", "simnpo", "bad_teacher", "pgu"])
def test_batches_without_a_sample_change_nothing(name: str) -> None:
    none = [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))]
    found = []
    for forget, retain in ((FORGET, RETAIN), (none + FORGET, [*RETAIN, *none])):
        model = _model()
        _call(name, model, forget, retain, generator=torch.Generator().manual_seed(0))
        found.append(model)
    for a, b in zip(*(model.parameters() for model in found), strict=True):
        assert torch.isfinite(b).all()
        if name in ("finetune", "gradient_ascent"):  # others pair the sets' batches, or count them
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_loss_that_is_a_constant_is_refused() -> None:
    with pytest.raises(ValueError, match="depend on the parameters"):
        _call("finetune", _model(), FORGET, RETAIN, loss_fn=lambda model, batch: torch.ones(len(batch[1])))


class Words(nn.Module):
    def __init__(self, is_sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(9, 6, sparse=is_sparse), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))


@pytest.mark.parametrize(
    "name", ["finetune", "random_label", "scrub", "msg", "salun", "gradient_masking", "npo"]
)
def test_sparse_gradients_of_embeddings_are_those_of_dense_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    forget, retain = (
        [(torch.randint(9, (8, 4), generator=generator), torch.randint(3, (8,), generator=generator))] * 2
        for _ in range(2)
    )
    sparse, dense = Words(True), Words(False)
    for model in (sparse, dense):
        _call(name, model, forget, retain, generator=torch.Generator().manual_seed(1))
    for a, b in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b)
