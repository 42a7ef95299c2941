"""What is easily taken for logits: probabilities, and features beside them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn_ext as ux


class Returning(nn.Module):
    """A classifier that returns what a function makes of its features and logits."""

    def __init__(self, what: object) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.what = nn.Linear(6, 8), nn.Linear(8, 3), what

    def forward(self, x: Tensor) -> object:
        features = torch.tanh(self.body(x))
        return self.what(features, self.head(features))


def _data(dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in (9, 8, 1):
        inputs = torch.randn(n, 6, generator=generator).to(dtype)
        made.append((inputs, torch.randint(3, (n,), generator=generator)))
    return made


CALLS = {
    "fisher": lambda model, data: ux.fisher_diagonal(model, data),
    "factors": lambda model, data: ux.kfac_factors(model, data),
    "attack": lambda model, data: ux.metrics.mia(
        model, forget=data, test=data, convention="loss", bootstrap=0
    ),
    "distance": lambda model, data: ux.metrics.js_divergence(model, model, data),
    "finetune": lambda model, data: ux.METHODS["finetune"](model, data, data, epochs=1),
    "ssd": lambda model, data: ux.plan_ssd(model, data, data, alpha="adaptive"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probabilities_are_refused(call: str, dtype: torch.dtype) -> None:
    model = Returning(lambda features, logits: logits.softmax(-1)).to(dtype)
    with pytest.raises(ValueError, match="rows of probabilities"):
        CALLS[call](model, _data(dtype))


def test_logarithms_of_probabilities_are_logits() -> None:
    found, expected = (
        ux.fisher_diagonal(Returning(what), _data())
        for what in (lambda features, logits: logits.log_softmax(-1), lambda features, logits: logits)
    )
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_probabilities_with_a_loss_of_their_own_are_the_users_business() -> None:
    model = Returning(lambda features, logits: logits.softmax(-1))
    found = ux.fisher_diagonal(
        model, _data(), loss_fn=lambda m, batch: F.nll_loss(m(batch[0]).log(), batch[1], reduction="none")
    )
    expected = ux.fisher_diagonal(Returning(lambda features, logits: logits), _data())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)
    assert 0 <= ux.metrics.accuracy(model, _data()) <= 1  # which probabilities tell as well


@pytest.mark.parametrize(
    "logits",
    [
        torch.tensor([[0.25, 0.75]]),  # one row may be so by chance
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        torch.tensor([[0.5, 0.5], [0.5, 0.6]]),
        torch.tensor([[0.0, 0.0], [0.0, 0.0]]),
        torch.tensor([[1.0], [1.0]]),
    ],
)
def test_what_might_be_logits_is_taken_for_them(logits: Tensor) -> None:
    labels = torch.zeros(len(logits), dtype=torch.long)
    if logits.shape[1] > 1:
        expected = F.cross_entropy(logits, labels, reduction="none")
        torch.testing.assert_close(ux.tasks.Classification().losses(logits, (None, labels)), expected)


def test_pixels_too() -> None:
    outputs, labels = torch.randn(2, 3, 4, 4).softmax(1), torch.randint(3, (2, 4, 4))
    with pytest.raises(ValueError, match="rows of probabilities"):
        ux.tasks.Segmentation().losses(outputs, (None, labels))


FEATURES_FIRST = lambda features, logits: (features, logits)  # noqa: E731


@pytest.mark.parametrize("call", [*CALLS, "accuracy"])
def test_features_in_the_place_of_logits_are_refused(call: str) -> None:
    calls = {**CALLS, "accuracy": lambda model, data: ux.metrics.accuracy(model, data)}
    model = Returning(FEATURES_FIRST)
    state = torch.get_rng_state()
    for _ in range(2):  # whoever tries again is told again
        with pytest.raises(ValueError, match="it is features"):
            calls[call](model, _data())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "what",
    [
        lambda features, logits: (logits, features),
        lambda features, logits: (logits, logits.softmax(-1)),
        lambda features, logits: (logits, logits.argmax(-1, keepdim=True)),
        lambda features, logits: (logits, None),
        lambda features, logits: (logits,),
    ],
)
def test_tuples_that_start_with_the_logits_are_read(what: object) -> None:
    plain = Returning(lambda features, logits: logits)
    expected = ux.fisher_diagonal(plain, _data())
    model = Returning(what)
    assert ux.metrics.accuracy(model, _data()) == ux.metrics.accuracy(plain, _data())
    found = ux.fisher_diagonal(model, _data())
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
