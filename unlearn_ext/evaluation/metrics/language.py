"""What language models still know of texts: probability, truth ratio, extraction, membership by tokens.

Every measure takes a model and data of the user's own, sequences with a label per token, through ``task``. A
sample is a sequence; what is ignored (padding, a prompt) does not count. Answers to a question are sequences
whose prompt has no labels.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.distributed.agree import check_whole
from unlearn_ext.evaluation.metrics.answers import answers, task_for
from unlearn_ext.evaluation.metrics.attacks import auc
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batch, Batches
from unlearn_ext.tasks.categorical import Categorical

Decode: TypeAlias = Callable[[Tensor], str | bytes]
"""Turns the labels that count of one sequence, int64 ``[T]``, into its text."""

LanguageAttack: TypeAlias = Literal["loss", "zlib", "min_k", "min_k++"]
LANGUAGE_ATTACKS: tuple[LanguageAttack, ...] = ("loss", "zlib", "min_k", "min_k++")


class Tokens(NamedTuple):
    """What a model makes of the tokens of one sequence that count, in order; float64.

    Attributes:
        labels: The tokens, int64 ``[T]``.
        logs: Logarithms of their probabilities, ``[T]``.
        right: Whether each is the likeliest, bool ``[T]``.
        mean: Mean of the logarithms of the probabilities of all tokens at that place, under these
            probabilities, ``[T]``.
        deviation: Their standard deviation, ``[T]``.
        vocabulary: Number of tokens that there are.
    """

    labels: Tensor
    logs: Tensor
    right: Tensor
    mean: Tensor
    deviation: Tensor
    vocabulary: int


def tokens(
    model: nn.Module, data: Batches, *, task: Task | None = None, name: str = "data"
) -> Iterator[Tokens]:
    """Look at the tokens of every sequence; what the other measures are made of.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        task: What the model is for; None infers it from the model and the batch.
        name: What the data is called in messages.

    Returns:
        One entry per sequence that has a token that counts.

    Raises:
        FloatingPointError: If an output of the model is NaN, or leaves no probabilities, such as infinity.
        ValueError: If the data have no label per token, or none that counts.
        NotImplementedError: If the model is sharded.
    """
    check_whole(model, "language")
    judge = task_for("language", task)
    # All before the first is handed out: the caller's code must not run in eval mode, or without gradients.
    found: list[Tokens] = []
    with seeded(0, data), borrowed(model), torch.no_grad():
        for batch, outputs in answers("language", model, judge, data, name=name):
            # An inferred task goes along with what it made of the batch.
            told, logits = outputs if task is None else (task, outputs)
            found.extend(_tokens_of(logits, batch, told, name))
    if not found:
        raise ValueError(f"language: {name} must hold at least one token with a label, got none")
    return iter(found)


def _tokens_of(outputs: Any, batch: Batch, task: Task, name: str) -> Iterator[Tokens]:  # noqa: ANN401 - a task's own
    if not isinstance(task, Categorical):
        raise ValueError(f"language: task must have a label per token, got {task!r}")
    logits, labels = task.aligned(outputs, batch)
    if labels.ndim != 2:
        raise ValueError(f"language: labels must be [N, T], got {list(labels.shape)} for {task!r}")
    for rows, own in zip(logits, labels, strict=True):
        counted = own != task.ignore_index
        if not bool(counted.any()):
            continue
        kept = own[counted]
        logs = rows[counted].double().log_softmax(-1)
        if bool(torch.isnan(logs).any()):
            raise FloatingPointError(
                f"language: the model's outputs must be below infinity in {name}, got inf"
            )
        chances = logs.exp()
        finite = logs.where(chances > 0, 0.0)  # 0 log 0 is 0, and so is 0 (log 0)^2
        mean = (chances * finite).sum(-1)
        variance = (chances * (finite - mean.unsqueeze(-1)).square()).sum(-1)
        yield Tokens(
            kept.cpu(),
            logs.gather(-1, kept.unsqueeze(-1)).squeeze(-1).cpu(),
            (logs.argmax(-1) == kept).cpu(),
            mean.cpu(),
            variance.sqrt().cpu(),
            logs.shape[-1],
        )


def probabilities(model: nn.Module, data: Batches, *, task: Task | None = None) -> Tensor:
    """Return the probability of every sequence, normalised by its length: ``p(y)^(1/|y|)``.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        float64 ``[N]``, in [0, 1]; sequences without a token that counts are left out.

    Source:
        Maini, Feng, Schwarzschild, Lipton & Kolter, "TOFU: A Task of Fictitious Unlearning for LLMs", COLM
        2024.
    """
    return torch.stack([own.logs.mean().exp() for own in tokens(model, data, task=task)])


def probability(model: nn.Module, data: Batches, *, task: Task | None = None) -> float:
    """Return the mean of ``probabilities``.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        A number in [0, 1].

    Example:
        >>> from unlearn_ext.tasks import TokenClassification
        >>> logits = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
        >>> data = [(logits, torch.tensor([[0, 1]]))]
        >>> round(probability(nn.Identity(), data, task=TokenClassification()), 4)  # (0.75 * 0.5)^(1/2)
        0.6124
    """
    return float(probabilities(model, data, task=task).mean())


def truth_ratios(
    model: nn.Module,
    paraphrased: Batches,
    perturbed: Batches,
    *,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    task: Task | None = None,
) -> Tensor:
    """Say for every question how likely wrong answers are beside a right one.

        R = mean over wrong answers of p(wrong)^(1/|wrong|)  /  p(paraphrase)^(1/|paraphrase|)

    Near 1 for a model that knows nothing of the question, near 0 for one that knows the answer. The right
    answer is given in other words than those that the model was trained on.

    Args:
        model: The model; run in eval mode, left as it was.
        paraphrased: One right answer to each of Q questions, in their order.
        perturbed: As many wrong answers to each, Q times P in all: first those to the first question.
        mean: Over the wrong answers; the paper has the arithmetic one, its released code the geometric.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        float64 ``[Q]``.

    Raises:
        ValueError: If the wrong answers are not a multiple of the right ones, an answer has no token that
            counts, a loader shuffles, the mean is unknown, or a right answer and its wrong ones are
            impossible.

    Source:
        Maini, Feng, Schwarzschild, Lipton & Kolter, "TOFU: A Task of Fictitious Unlearning for LLMs", COLM
        2024.
    """
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"truth_ratio: mean must be 'arithmetic' or 'geometric', got {mean!r}")
    right = _of_every_answer("paraphrased", model, paraphrased, task)
    wrong = _of_every_answer("perturbed", model, perturbed, task)
    if len(wrong) % len(right):
        raise ValueError(
            f"truth_ratio: perturbed must hold equally many answers to each of the {len(right)} questions, "
            f"got {len(wrong)}"
        )
    grouped = wrong.reshape(len(right), -1)
    logs = (
        grouped.mean(1)
        if mean == "geometric"
        else grouped.logsumexp(1) - torch.log(torch.tensor(float(grouped.shape[1]), dtype=grouped.dtype))
    )
    ratios = (logs - right).exp()
    if bool((undefined := torch.isnan(ratios)).any()):
        raise ValueError(
            "truth_ratio: answers must have a probability above 0, got 0 for the right one and for a wrong "
            f"one to question {int(undefined.nonzero()[0])}"
        )
    return ratios


def _of_every_answer(name: str, model: nn.Module, data: Batches, task: Task | None) -> Tensor:
    # Answers are told apart by their place: none may be left out, or come in another order.
    if isinstance(getattr(data, "sampler", None), RandomSampler):
        raise ValueError(f"truth_ratio: {name} must come in the order of the questions, got shuffled data")
    # Logarithms: a model that climbed on the answers gives them probabilities too small for any float.
    found = torch.stack([own.logs.mean() for own in tokens(model, data, task=task)])
    judge = task_for("language", task)
    n = sum(judge.count(batch) for batch in data)
    if len(found) < n:
        raise ValueError(
            f"truth_ratio: {name} must have a token that counts in each of its {n} answers, got {len(found)}"
        )
    return found


def truth_ratio(
    model: nn.Module,
    paraphrased: Batches,
    perturbed: Batches,
    *,
    known: bool = False,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
    task: Task | None = None,
) -> float:
    """Sum the truth ratios ``R`` of a set up in one number, the better the higher.

    Args:
        model: The model; run in eval mode, left as it was.
        paraphrased: One right answer to each of Q questions.
        perturbed: As many wrong answers to each.
        known: Whether the set should be known. False, for a forget set: the mean of ``min(R, 1/R)``, since
            neither answer should be likelier. True, for all others: the mean of ``max(0, 1 - R)``.
        mean: See ``truth_ratios``.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        A number in [0, 1].
    """
    ratios = truth_ratios(model, paraphrased, perturbed, mean=mean, task=task)
    figures = (1 - ratios).clamp(min=0) if known else torch.minimum(ratios, 1 / ratios)
    return float(figures.mean())


def exact_memorization(model: nn.Module, data: Batches, *, task: Task | None = None) -> float:
    """Return the share of a sequence's tokens that are the model's first choice, a mean over sequences.

    Unlike ``accuracy``, where every token counts alike, every sequence does.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        A number in [0, 1].

    Source:
        Tirumala, Markosyan, Zettlemoyer & Aghajanyan, "Memorization Without Overfitting", NeurIPS 2022.
    """
    return _mean(own.right.double().mean() for own in tokens(model, data, task=task))


def extraction_strength(model: nn.Module, data: Batches, *, task: Task | None = None) -> float:
    """Return how much of a sequence a model completes by itself, a mean over sequences.

        1 - k / T       k: the least number of tokens after which all that follow are its first choice

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        A number in [0, 1]: 1 where the first token is enough, 0 where not even the last is told.

    Source:
        Carlini et al., "Extracting Training Data from Large Language Models", USENIX Security 2021, as a
        measure of unlearning: Wang et al., "Unlearning with Control", 2024, and OpenUnlearning (where it is
        1 / T, not 0, if the last token is not told).
    """

    def strength(own: Tokens) -> Tensor:
        told = own.right.flip(0).long().cumprod(0).sum()  # tokens at the end that are all told
        return told.double() / len(own.right)

    return _mean(strength(own) for own in tokens(model, data, task=task))


def _mean(values: Iterator[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


def membership_scores(
    model: nn.Module,
    data: Batches,
    *,
    k: float = 0.2,
    decode: Decode | None = None,
    attacks: Sequence[LanguageAttack] = LANGUAGE_ATTACKS,
    task: Task | None = None,
) -> dict[LanguageAttack, Tensor]:
    """Score every sequence by how much it looks like one that the model was trained on.

        loss      mean of log p over its tokens
        zlib      the same over the bytes that zlib compresses its text to
        min_k     mean of the k lowest log p, k a share of the tokens, at least one
        min_k++   the same of (log p - mean) / deviation, those of log p of all tokens at that place

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with a label per token.
        k: Share of the tokens, in (0, 1].
        decode: Turns a sequence's tokens into text for ``"zlib"``, such as a tokenizer's ``decode``. None:
            the tokens themselves are compressed, as numbers of 1, 2 or 4 bytes.
        attacks: Which scores.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        Attack to float64 ``[N]``; higher means member.

    Raises:
        TypeError: If ``decode`` returns neither text nor bytes.
        ValueError: If ``k`` is out of range or an attack unknown.

    Source:
        loss: Yeom, Giacomelli, Fredrikson & Jha, CSF 2018; zlib: Carlini et al., "Extracting Training Data
        from Large Language Models", USENIX Security 2021; min_k: Shi et al., "Detecting Pretraining Data from
        Large Language Models", ICLR 2024; min_k++: Zhang et al., "Min-K%++", ICLR 2025. Where a model is
        certain of its token, min_k++ bounds the deviation from below by 1e-3, as OpenUnlearning does.
    """
    if not 0 < k <= 1:
        raise ValueError(f"membership_scores: k must lie in (0, 1], got {k}")
    for attack in attacks:
        if attack not in LANGUAGE_ATTACKS:
            raise ValueError(
                f"membership_scores: attacks must be of {', '.join(LANGUAGE_ATTACKS)}, got {attack!r}"
            )
    found: dict[LanguageAttack, list[Tensor]] = {attack: [] for attack in attacks}
    for own in tokens(model, data, task=task):
        for attack in attacks:
            found[attack].append(_score(attack, own, k, decode))
    return {attack: torch.stack(values) for attack, values in found.items()}


def _score(attack: LanguageAttack, own: Tokens, k: float, decode: Decode | None) -> Tensor:
    if attack == "loss":
        return own.logs.mean()
    if attack == "zlib":
        return own.logs.mean() / len(zlib.compress(_text(own, decode)))
    logs = own.logs if attack == "min_k" else (own.logs - own.mean) / own.deviation.clamp(min=1e-3)
    return logs.topk(max(1, int(len(logs) * k)), largest=False).values.mean()


def _text(own: Tokens, decode: Decode | None) -> bytes:
    if decode is None:
        size = next(kind for kind, most in _SIZES if own.vocabulary <= most)
        return own.labels.numpy().astype(size).tobytes()
    text = decode(own.labels)
    if not isinstance(text, (str, bytes)):
        raise TypeError(f"membership_scores: decode must return text or bytes, got {type(text).__name__}")
    return text if isinstance(text, bytes) else text.encode("utf-8", errors="surrogatepass")


_SIZES = (("<u1", 2**8), ("<u2", 2**16), ("<u4", 2**32))


def language_mia(
    model: nn.Module,
    *,
    forget: Batches,
    test: Batches,
    k: float = 0.2,
    decode: Decode | None = None,
    attacks: Sequence[LanguageAttack] = LANGUAGE_ATTACKS,
    task: Task | None = None,
) -> dict[LanguageAttack, float]:
    """Attack a model by membership inference: can forgotten texts be told from unseen ones of their kind?

    What a retrained model comes to is the aim: 0.5 only if the texts of both sets are of one kind. With few
    forgotten texts the figure is uncertain, by about ``sqrt(1 / 12 / N)``.

    Args:
        model: The unlearned model; run in eval mode, left as it was.
        forget: Texts that were to be forgotten.
        test: Texts of the same kind that no model was trained on.
        k: See ``membership_scores``.
        decode: See ``membership_scores``.
        attacks: Which attacks.
        task: What the model is for; None infers it from the model and the batch.

    Returns:
        Attack to the area under the ROC curve: 0.5 is chance, below it forgotten texts look less like known
        ones than unseen ones do.
    """
    members, others = (
        membership_scores(model, data, k=k, decode=decode, attacks=attacks, task=task)
        for data in (forget, test)
    )
    return {attack: auc(members[attack].numpy(), others[attack].numpy()) for attack in attacks}
