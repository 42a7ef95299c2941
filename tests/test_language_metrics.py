"""Measures of what a language model still knows of texts, against values worked out by hand."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn

import unlearn_ext as ux
from unlearn_ext.evaluation.metrics import language
from unlearn_ext.tasks import CausalLM, Classification, TokenClassification

TASK = TokenClassification()


class Bigram(nn.Module):
    """Answers every token with a row of its own; causal."""

    def __init__(self, vocabulary=11, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rows = nn.Parameter(3 * torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, input_ids, attention_mask=None):
        return self.rows[input_ids]


def texts(count=7, length=9, vocabulary=11, seed=1):
    """Batches of sequences of different lengths, padded, each with a prompt that has no labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, length - row % 4 :] = -100
        labels[row, : row % 3] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return [{name: tensor[part] for name, tensor in batch.items()} for part in (slice(4), slice(4, count))]


def by_hand(model, data):
    """Tokens that count and the float64 log-probabilities before each, sequence by sequence."""
    rows = model.rows.detach().double().numpy()
    for batch in data:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            pairs = [(ids[t], labels[t + 1]) for t in range(len(ids) - 1) if labels[t + 1] != -100]
            logs = [rows[a] - math.log(sum(math.exp(v) for v in rows[a])) for a, _ in pairs]
            yield [b for _, b in pairs], logs


@pytest.fixture
def known():
    return Bigram(), texts()


def test_probability_is_normalised_by_length(known):
    want = [
        math.prod(math.exp(log[token]) for token, log in zip(tokens, logs, strict=True)) ** (1 / len(tokens))
        for tokens, logs in by_hand(*known)
    ]
    found = language.probabilities(*known, task=CausalLM())
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(want, rel=1e-12)
    assert language.probability(*known, task=CausalLM()) == pytest.approx(np.mean(want), rel=1e-12)


def test_extraction_strength_and_exact_match_by_hand():
    # Right, wrong, right, right: two of four are completed, three told. Then all wrong, all right.
    choices = torch.tensor([[1, 0, 2, 1], [0, 0, 0, 0], [2, 1, 2, 1]])
    labels = torch.tensor([[1, 2, 2, 1], [1, 2, 2, 1], [2, 1, 2, 1]])
    data = [(nn.functional.one_hot(choices, 3).float(), labels)]
    assert language.extraction_strength(nn.Identity(), data, task=TASK) == (0.5 + 0 + 1) / 3
    assert language.exact_memorization(nn.Identity(), data, task=TASK) == (0.75 + 0 + 1) / 3


def test_ignored_tokens_neither_help_nor_break_a_completion():
    choices = torch.tensor([[1, 0, 2, 0]])
    labels = torch.tensor([[1, -100, 2, -100]])
    data = [(nn.functional.one_hot(choices, 3).float(), labels)]
    assert language.extraction_strength(nn.Identity(), data, task=TASK) == 1
    assert language.exact_memorization(nn.Identity(), data, task=TASK) == 1


def answers_with(*chances):
    """One-token answers, each told with a probability."""
    logits = torch.tensor([[[p, 1 - p]] for p in chances]).log()
    return [(logits, torch.zeros(len(chances), 1, dtype=torch.long))]


@pytest.mark.parametrize(
    "mean, want",
    [("arithmetic", [(0.1 + 0.3) / 2 / 0.8, (0.6 + 0.6) / 2 / 0.3]), ("geometric", [0.03**0.5 / 0.8, 2.0])],
)
def test_truth_ratio_by_hand(mean, want):
    right, wrong = answers_with(0.8, 0.3), answers_with(0.1, 0.3, 0.6, 0.6)
    found = language.truth_ratios(nn.Identity(), right, wrong, mean=mean, task=TASK)
    assert found.tolist() == pytest.approx(want, rel=1e-6)
    forgotten = language.truth_ratio(nn.Identity(), right, wrong, mean=mean, task=TASK)
    assert forgotten == pytest.approx((want[0] + 1 / want[1]) / 2, rel=1e-6)
    kept = language.truth_ratio(nn.Identity(), right, wrong, known=True, mean=mean, task=TASK)
    assert kept == pytest.approx((1 - want[0] + 0) / 2, rel=1e-6)


def test_truth_ratio_reads_answers_as_its_task_says(known):
    """Labels beside logits are those of tokens, or, for a causal model, of the tokens that come next."""
    model, (batch, _) = known
    right = [(model(batch["input_ids"]), batch["labels"])]
    wrong = [(model(batch["input_ids"].flip(1)), batch["labels"])]
    chances = [
        math.exp(np.mean([row[b] for b, row in zip(tokens, logs, strict=True)]))
        for tokens, logs in by_hand(model, [batch])
    ]
    others = language.probabilities(nn.Identity(), wrong, task=CausalLM())
    want = np.mean([min(b / a, a / b) for a, b in zip(chances, others.tolist(), strict=True)])
    found = language.truth_ratio(nn.Identity(), right, wrong, task=CausalLM())
    assert found == pytest.approx(want, rel=1e-6)


def test_truth_ratio_of_answers_too_unlikely_for_a_float():
    """Gradient ascent leaves such: exp(-1000) is 0 in any float, the ratio of two of them is not."""
    logits = torch.tensor([[[2000.0, 1000.0, 999.0]]])
    right, wrong = ([(logits, torch.tensor([[label]]))] for label in (1, 2))
    found = language.truth_ratios(nn.Identity(), right, wrong, task=TASK)
    assert found.tolist() == pytest.approx([math.exp(-1)])
    impossible = [(torch.tensor([[[0.0, -torch.inf]]]), torch.tensor([[1]]))]
    with pytest.raises(ValueError, match=r"a probability above 0, got 0 for .* question 0"):
        language.truth_ratio(nn.Identity(), impossible, impossible, task=TASK)


def test_truth_ratio_wants_as_many_wrong_answers_to_every_question():
    with pytest.raises(ValueError, match="equally many answers to each of the 2 questions, got 3"):
        language.truth_ratios(nn.Identity(), answers_with(0.8, 0.3), answers_with(0.1, 0.3, 0.6), task=TASK)
    with pytest.raises(ValueError, match="'arithmetic' or 'geometric', got 'harmonic'"):
        language.truth_ratio(nn.Identity(), answers_with(0.8), answers_with(0.1), mean="harmonic", task=TASK)


def test_truth_ratio_pairs_answers_by_their_place_or_refuses():
    """Answers that would be left out or shuffled would be held against those to other questions."""
    right, wrong = answers_with(0.8, 0.3), answers_with(0.1, 0.3, 0.6, 0.6)
    ((logits, labels),) = wrong
    without = [(logits, labels.clone().index_fill_(0, torch.tensor([0, 2]), TASK.ignore_index))]
    with pytest.raises(
        ValueError, match="perturbed must have a token that counts in each of its 4 answers, got 2"
    ):
        language.truth_ratios(nn.Identity(), right, without, task=TASK)
    data = torch.utils.data.TensorDataset(*wrong[0])
    shuffled = torch.utils.data.DataLoader(data, 2, shuffle=True)
    with pytest.raises(
        ValueError, match="perturbed must come in the order of the questions, got shuffled data"
    ):
        language.truth_ratios(nn.Identity(), right, shuffled, task=TASK)
    ordered = torch.utils.data.DataLoader(data, 2)
    found = language.truth_ratios(nn.Identity(), right, ordered, task=TASK)
    assert torch.equal(found, language.truth_ratios(nn.Identity(), right, wrong, task=TASK))


@pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
def test_membership_scores_token_by_token(known, k):
    want = {"loss": [], "zlib": [], "min_k": [], "min_k++": []}
    for tokens, logs in by_hand(*known):
        own = [log[token] for token, log in zip(tokens, logs, strict=True)]
        want["loss"].append(sum(own) / len(own))
        want["zlib"].append(want["loss"][-1] / len(zlib.compress(bytes(tokens))))
        least = max(1, int(k * len(own)))
        want["min_k"].append(np.mean(sorted(own)[:least]))
        mean = [sum(math.exp(v) * v for v in log) for log in logs]
        spread = [
            math.sqrt(sum(math.exp(v) * v * v for v in log) - m * m)
            for log, m in zip(logs, mean, strict=True)
        ]
        scaled = [(a - m) / s for a, m, s in zip(own, mean, spread, strict=True)]
        want["min_k++"].append(np.mean(sorted(scaled)[:least]))
    found = language.membership_scores(*known, k=k, task=CausalLM())
    assert found.keys() == want.keys()
    for attack, scores in found.items():
        assert scores.tolist() == pytest.approx(want[attack], rel=1e-9), attack


def test_zlib_reads_the_text_that_decode_makes(known):
    def decode(labels):
        return " ".join(["word"] * len(labels))

    found = language.membership_scores(*known, decode=decode, attacks=["zlib", "loss"], task=CausalLM())
    sizes = [len(zlib.compress(decode(tokens).encode())) for tokens, _ in by_hand(*known)]
    assert (found["loss"] / found["zlib"]).tolist() == pytest.approx(sizes)


@pytest.mark.parametrize("vocabulary, width", [(200, 1), (256, 1), (300, 2), (70_000, 4)])
def test_without_decode_tokens_are_compressed_as_numbers_wide_enough(vocabulary, width):
    labels = torch.tensor([3, vocabulary - 1])
    empty = torch.zeros(2)
    own = language.Tokens(labels, empty, empty > 0, empty, empty, vocabulary)
    text = language._text(own, None)
    assert [int.from_bytes(text[i : i + width], "little") for i in (0, width)] == labels.tolist()
    assert len(text) == 2 * width


def test_an_attack_tells_known_texts_from_others_and_not_from_their_like():
    model = Bigram(seed=3)
    chosen = model.rows.argmax(1)
    ids = [torch.arange(11)]
    for _ in range(6):
        ids.append(chosen[ids[-1]])
    likely = torch.stack(ids, 1)
    known = [{"input_ids": likely, "labels": likely}]
    found = language.language_mia(model, forget=known, test=texts(40, seed=5), task=CausalLM())
    assert found["loss"] == found["min_k"] == 1
    assert found["min_k++"] > 0.9
    even = language.language_mia(model, forget=texts(40, seed=5), test=texts(40, seed=5), task=CausalLM())
    assert set(even.values()) == {0.5}


def test_auc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 6, 30).astype(float), generator.integers(0, 6, 41).astype(float)
    pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
    assert language.auc(a, b) == pytest.approx(np.mean(pairs), abs=1e-15)


def test_certain_tokens_have_finite_scores():
    logits = torch.tensor([[[0.0, -torch.inf], [0.0, -1e4]]])
    data = [(logits, torch.zeros(1, 2, dtype=torch.long))]
    found = language.membership_scores(nn.Identity(), data, task=TASK)
    assert all(bool(torch.isfinite(scores).all()) for scores in found.values())


def test_tokens_that_cannot_come_leave_the_others_scores_as_they_are():
    """A vocabulary is padded with logits of -inf; k=1 looks at every token."""
    model, data = Bigram(), texts()
    want = language.membership_scores(model, data, k=1.0, task=CausalLM(), attacks=["min_k", "min_k++"])
    with torch.no_grad():
        padded = nn.functional.pad(model.rows, (0, 3), value=-torch.inf)
    model.rows = nn.Parameter(padded)
    found = language.membership_scores(model, data, k=1.0, task=CausalLM(), attacks=["min_k", "min_k++"])
    for attack, scores in want.items():
        torch.testing.assert_close(found[attack], scores, rtol=1e-12, atol=0)


def test_outputs_without_probabilities_are_refused():
    """Infinity has come to 0.5, chance, in the attacks, and to an extraction of everything."""
    data = [(torch.tensor([[[torch.inf, torch.inf], [0.0, 1.0]]]), torch.zeros(1, 2, dtype=torch.long))]
    for measure in (language.probability, language.extraction_strength, language.membership_scores):
        with pytest.raises(FloatingPointError, match="outputs must be below infinity in data, got inf"):
            measure(nn.Identity(), data, task=TASK)
    ignored = [(data[0][0], torch.tensor([[-100, 0]]))]
    assert language.probability(nn.Identity(), ignored, task=TASK) == pytest.approx(1 / (1 + math.e))


def test_whoever_looks_at_tokens_does_it_in_modes_of_their_own(known):
    model, data = known
    before = torch.random.get_rng_state()
    for _ in language.tokens(model.train(), data, task=CausalLM()):
        assert torch.is_grad_enabled()
        assert model.training
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"k": 0.0}, r"k must lie in \(0, 1\], got 0.0"),
        ({"attacks": ["magic"]}, "attacks must be of loss, zlib, min_k, min_k"),
    ],
)
def test_settings_out_of_range_are_refused(known, settings, message):
    with pytest.raises(ValueError, match=message):
        language.membership_scores(*known, task=CausalLM(), **settings)


def test_decode_must_return_text(known):
    with pytest.raises(TypeError, match="decode must return text or bytes, got int"):
        language.membership_scores(*known, task=CausalLM(), decode=len)


def test_data_without_a_label_per_token_are_refused():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"labels must be \[N, T\]"):
        language.probability(nn.Identity(), [(torch.zeros(3, 4), labels)], task=Classification())
    ignored = [(torch.zeros(1, 2, 4), torch.full((1, 2), -100))]
    with pytest.raises(ValueError, match="data must hold at least one token with a label"):
        language.probability(nn.Identity(), ignored, task=TASK)


def test_the_task_of_a_language_model_is_inferred_and_the_model_left_as_it_was():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=9,
        n_embd=8,
        n_layer=1,
        n_head=1,
        resid_pdrop=0.5,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = texts()
    random_state = torch.get_rng_state()
    found = language.probabilities(model, data)
    assert torch.equal(found, language.probabilities(model, data, task=CausalLM()))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_measures_are_at_the_public_door():
    assert ux.metrics.language is language
