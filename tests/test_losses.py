from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unlearn_ext import metrics
from unlearn_ext.tasks import losses


class Fixed(nn.Module):
    """A model that returns what it was made with, whatever it is given."""

    def __init__(self, logits, **config):
        super().__init__()
        self.scores = nn.Parameter(logits)
        self.config = SimpleNamespace(**config)

    def forward(self, *inputs, **named):
        return self.scores


class FixedForCausalLM(Fixed):
    """The same, of a class that says what it predicts."""


def test_classification_is_torchs_cross_entropy(generator):
    logits, labels = torch.randn(5, 3, generator=generator), torch.tensor([0, 2, 1, 1, -100])
    values = losses.cross_entropy(Fixed(logits), (None, labels))
    assert torch.equal(values, F.cross_entropy(logits, labels, reduction="none"))
    assert values[4] == 0


def test_class_probabilities(generator):
    logits = torch.randn(5, 3, generator=generator)
    labels = torch.rand(5, 3, generator=generator).softmax(-1)
    torch.testing.assert_close(
        losses.cross_entropy(Fixed(logits), (None, labels)), F.cross_entropy(logits, labels, reduction="none")
    )
    with pytest.raises(ValueError, match="class probabilities must have the logits' shape"):
        losses.cross_entropy(Fixed(logits), (None, labels[:, :2]))


def test_a_causal_language_model_is_shifted_and_averaged_over_its_own_tokens(generator):
    logits = torch.randn(3, 4, 5, generator=generator)
    labels = torch.tensor([[1, 2, 3, 4], [0, -100, -100, 2], [-100] * 4])
    values = losses.cross_entropy(FixedForCausalLM(logits), {"input_ids": labels, "labels": labels})
    whole = F.cross_entropy(logits[0, :-1], labels[0, 1:])
    padded = F.cross_entropy(logits[1, 2:3], labels[1, 3:])
    torch.testing.assert_close(values.detach(), torch.stack([whole, padded, torch.zeros(())]))
    assert values.requires_grad


@pytest.mark.parametrize("form", ["tuple", "shift=False", "encoder-decoder"])
def test_aligned_sequences_are_not_shifted(form, generator):
    logits, labels = torch.randn(3, 4, 5, generator=generator), torch.randint(5, (3, 4), generator=generator)
    expected = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="none").mean(1)
    loss_fn, batch = losses.cross_entropy, {"labels": labels}
    if form == "tuple":
        batch = (None, labels)
    elif form == "shift=False":
        loss_fn = partial(losses.cross_entropy, shift=False)
    model = Fixed(logits, is_encoder_decoder=form == "encoder-decoder")
    torch.testing.assert_close(loss_fn(model, batch).detach(), expected)


def test_dense_prediction_has_its_classes_in_dimension_one(generator):
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    expected = F.cross_entropy(logits, labels, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(losses.cross_entropy(Fixed(logits), (None, labels)).detach(), expected)


def test_a_sequence_of_one_token_has_nothing_to_predict():
    values = losses.cross_entropy(
        FixedForCausalLM(torch.randn(2, 1, 3)), {"labels": torch.zeros(2, 1, dtype=torch.long)}
    )
    assert values.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(4,), (5, 1), (5, 3, 2), ()])
def test_labels_of_another_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match="labels must have the shape of the logits without the class dimension"
    ):
        losses.cross_entropy(Fixed(torch.randn(5, 3)), (None, torch.zeros(shape, dtype=torch.long)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_give_float32_losses(dtype):
    logits = torch.tensor([[60000.0, 0.0], [1.0, 1.0]]).to(dtype)
    assert losses.cross_entropy(Fixed(logits), (None, torch.tensor([0, 0]))).dtype == torch.float32
    norms = losses.logit_norm(Fixed(logits), (None,))
    assert norms.dtype == torch.float32
    assert torch.isfinite(norms).all()


def test_logit_norm_sums_squares_per_sample_without_labels():
    logits = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [2.0, 0.0]]])
    assert losses.logit_norm(Fixed(logits), {"x": torch.zeros(2)}).tolist() == [26.0, 4.0]


def test_accuracy_counts_positions_and_leaves_ignored_ones_out():
    logits = F.one_hot(torch.tensor([[1, 2, 0], [0, 0, 0]]), 4).float()
    labels = torch.tensor([[2, 1, 2], [0, -100, 1]])
    # shifted: position 0 predicts label 1 and so on; right, right / ignored, wrong
    assert metrics.accuracy(FixedForCausalLM(logits), [{"labels": labels}]) == pytest.approx(2 / 3)
    assert metrics.accuracy(Fixed(logits), [(None, labels)]) == pytest.approx(1 / 5)


def test_accuracy_is_over_samples_not_over_batches():
    batches = [(torch.eye(3), torch.tensor([0, 1, 2])), (torch.eye(3)[:1], torch.tensor([1]))]
    assert metrics.accuracy(nn.Identity(), batches) == 0.75


def test_accuracy_leaves_the_model_as_it_was_and_needs_labels():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    model[1].eval()
    metrics.accuracy(model, [(torch.randn(8, 2), torch.zeros(8, dtype=torch.long))])
    assert [model.training, model[0].training, model[1].training] == [True, True, False]
    assert model[0].num_batches_tracked == 0
    with pytest.raises(ValueError, match="at least one label"):
        metrics.accuracy(model, [])
    with pytest.raises(ValueError, match="re-iterable"):
        metrics.accuracy(model, iter([]))


def test_log_odds_is_the_cross_entropy_without_saturation():
    scores = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(4, (6,))
    batch = (scores, labels)
    values = losses.log_odds(nn.Identity(), batch)
    p = scores.softmax(-1).gather(1, labels[:, None]).squeeze(1)
    assert torch.allclose(values, ((1 - p) / p).log())
    (own,) = torch.autograd.grad(values.sum(), scores)
    (plain,) = torch.autograd.grad(losses.cross_entropy(nn.Identity(), batch).sum(), scores)
    assert torch.allclose(own * (1 - p.detach())[:, None], plain)


def test_log_odds_of_certain_and_ignored_labels_is_finite():
    scores = torch.tensor([[400.0, 0.0], [1.0, 1.0]], requires_grad=True)
    values = losses.log_odds(nn.Identity(), (scores, torch.tensor([0, -100])))
    assert values.tolist() == [-400.0, 0.0]
    values.sum().backward()
    assert scores.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


def test_log_odds_of_sequences_are_means_over_positions():
    scores, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    labels[0, 2:] = -100
    values = losses.log_odds(nn.Identity(), (scores, labels))
    expected = losses.log_odds(nn.Identity(), (scores[0, :2], labels[0, :2])).mean()
    assert values.shape == (3,)
    assert torch.allclose(values[0], expected)
