"""Loaders that yield other samples in a later pass: told, and never where they do not."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler

import unlearn_ext as ux
from unlearn_ext.methods.readings import Reading, Tally, chosen_anew, difference
from unlearn_ext.methods.until import measure

X = torch.randn(24, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(24) % 3
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


class Passes:
    """Yields something else in every pass."""

    def __init__(self, *passes):
        self.passes = itertools.cycle(passes)

    def __iter__(self):
        return iter(next(self.passes))


def read(batches, task=None, model=MODEL):
    tally, n = Tally(model, task, batches), 0
    for batch in batches:
        size = (task or ux.tasks.Classification()).count(batch)
        tally.add(batch, size)
        n += size
    return Reading.of(n, tally.sums())


def batches(x, y, size, seed=None):
    order = (
        torch.arange(len(y))
        if seed is None
        else torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    )
    return list(zip(x[order].split(size), y[order].split(size), strict=True))


@pytest.mark.parametrize(
    "x",
    [
        X,
        X.double(),
        X.half(),
        (X * 50).to(torch.uint8),
        X > 0,
        torch.complex(X, -X).conj(),
        X.expand(24, 9, 6, 6),
        X.transpose(2, 3),
        X.flatten(1).long(),
        X[:, :0],
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)}",
)
def test_order_and_batches_do_not_matter_and_one_other_sample_does(x):
    usual = read(batches(x, Y, 5))
    for seed, size in enumerate((1, 4, 7, 24)):
        assert read(batches(x, Y, size, seed)) == usual
    if x.numel() and x.dtype != torch.bool:
        other = x.clone()
        other[3] = other[4] + 1
        changed = read(batches(other, Y, 5))
        assert (changed.labels, changed.rest != usual.rest) == (usual.labels, True)
    labels = Y.clone()
    labels[3] = 1
    assert read(batches(x, labels, 5)).labels != usual.labels
    assert read(batches(x[1:], Y[1:], 5)) != usual


def test_labels_that_change_places_are_the_same_and_inputs_that_share_a_sum_are_not():
    assert read(batches(X, Y.flip(0), 5)).labels == read(batches(X, Y, 5)).labels
    swapped = X.clone()
    swapped[0], swapped[1] = X[0].flip(2), X[1].flip(1)
    assert read(batches(swapped, Y, 5)).rest != read(batches(X, Y, 5)).rest
    # More words than are looked at one by one: what lies between shows in their sum.
    wide = X.flatten(1).repeat(1, 100)
    other = wide.clone()
    other[7, 1001] += 1
    assert read(batches(other, Y, 5)).rest != read(batches(wide, Y, 5)).rest
    for row in (324, 323):
        moved = torch.randn(1 + 24 * row).half()[1:].view(24, row)  # starts between two words of memory
        assert read(batches(moved, Y, 5)) == read(batches(moved.clone(), Y, 5))


def test_texts_padded_to_the_longest_of_their_batch_are_the_same_texts():
    draws = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 50, (n,), generator=draws) for n in (3, 9, 5, 2, 7, 4)]

    def padded(order, size, left, pad):
        for chosen in torch.tensor(order).split(size):
            longest = max(len(texts[i]) for i in chosen)
            ids, labels = (torch.full((len(chosen), longest), value) for value in (pad, -100))
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                place = slice(longest - len(texts[i]), None) if left else slice(len(texts[i]))
                ids[row, place] = labels[row, place] = texts[i]
                mask[row, place] = 1
            yield {"input_ids": ids, "attention_mask": mask, "labels": labels}

    task = ux.tasks.CausalLM()
    usual = read(padded([0, 1, 2, 3, 4, 5], 2, False, 49), task)
    assert read(padded([5, 3, 1, 0, 2, 4], 4, True, 49), task) == usual
    assert read(padded([0, 1, 2, 3, 4, 4], 2, False, 49), task).labels != usual.labels
    masked = ux.tasks.MaskedLM()  # other words are masked in every pass: nothing is said of them
    assert read(padded([0, 1, 2, 3, 4, 4], 2, False, 49), masked).labels == 0


def told(name="finetune", *, forget, retain, **settings):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = ux.unlearn(name, model, forget, retain, epochs=2, lr=1e-3, **settings)
    texts = [str(warning.message) for warning in found if "pass" in str(warning.message)]
    return texts, [entry["note"] for entry in result.history if "note" in entry]


RETAIN, OTHER = batches(X[8:], Y[8:], 4), batches(X[:16], Y[8:], 4)
FORGET = batches(X[:8], Y[:8], 4)


def test_other_labels_are_warned_of_once_and_other_inputs_noted():
    relabelled = [(x, (y + (y == 0)) % 3) for x, y in RETAIN]
    texts, notes = told(forget=FORGET, retain=Passes(RETAIN, RETAIN, RETAIN, relabelled))
    assert len(texts) == 1
    assert "the retain set had other samples, as many, in a later pass" in texts[0]
    assert "its labels differ" in texts[0]
    assert not notes
    texts, notes = told(forget=FORGET, retain=Passes(RETAIN, RETAIN, RETAIN, OTHER))
    assert not texts
    assert len(notes) == 1
    assert "the retain set had other inputs, with the same labels" in notes[0]
    texts, notes = told(forget=FORGET, retain=Passes(RETAIN, RETAIN, RETAIN, RETAIN[1:]))
    assert len(texts) == 1
    assert "16 samples in the first pass and 12 in a later one" in texts[0]


def test_while_a_goal_is_watched_it_is_told_once():
    settings = {"retain": RETAIN, "until": lambda model: False, "budget": 1.0}
    relabelled = [(x, (y + 1) % 3) for x, y in FORGET[:1]] + FORGET[1:]
    assert not told(forget=FORGET, **settings)[0]
    texts, _ = told(forget=Passes(FORGET, *[relabelled] * 9), **settings)
    assert len(texts) == 1
    assert texts[0].startswith("finetune: the forget set had other samples")


def test_shuffled_loaders_of_all_kinds_are_not_told_of():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(TensorDataset(X, Y))

    whole = TensorDataset(X, Y)
    for loader in (
        DataLoader(whole, 5, shuffle=True),
        DataLoader(whole, 5, shuffle=True, generator=torch.Generator()),
        DataLoader(whole, 5, drop_last=True),
        DataLoader(whole, 6, shuffle=True, drop_last=True),
        DataLoader(Stream(), 5),
        DataLoader(Stream(), 5, drop_last=True),
    ):
        first, later = (measure(MODEL, loader).reading for _ in range(2))
        assert first == later
        assert difference("retain", first, later) == ("", False)
        assert not chosen_anew(loader)
        assert told(forget=FORGET, retain=loader) == ([], [])


def test_what_draws_anew_is_noted_though_both_measurements_draw_alike():
    data = TensorDataset(X[8:], Y[8:])
    loader = DataLoader(data, 4, sampler=WeightedRandomSampler([1.0] * 16, 16))
    texts, notes = told(forget=FORGET, retain=loader)
    assert not texts
    assert len(notes) == 1
    assert "the retain set had other samples in the passes of the method, perhaps: the Weighted" in notes[0]


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"shuffle": True, "drop_last": True}, "drop_last=False"),
        ({"sampler": WeightedRandomSampler([1.0] * 24, 20)}, "the WeightedRandomSampler draws them anew"),
        (
            {"sampler": RandomSampler(range(24), replacement=True)},
            "a sampler with replacement draws them anew",
        ),
        ({"sampler": RandomSampler(range(24), num_samples=20)}, "num_samples of the RandomSampler"),
    ],
)
def test_loaders_that_choose_anew_are_told_with_what_to_do(settings, says):
    loader = DataLoader(TensorDataset(X, torch.zeros_like(Y)), 5, **settings)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        first, later = read(loader), read(loader)
    text, are_others = difference("forget", first, later)
    assert first.labels == later.labels  # a class has but one
    assert are_others
    assert says in text
    assert "its inputs differ" in text


def test_a_batch_in_a_form_of_the_users_own_tells_by_its_labels():
    class Ragged(ux.tasks.Classification):
        def select(self, batch, samples):
            raise AssertionError

    data = [((torch.zeros(4, 3), torch.arange(2)), Y[:4]), ((torch.ones(7, 3), torch.arange(3)), Y[4:7])]
    first = read(data, Ragged())
    assert first.rest == 0
    assert first.labels
    assert read([(x, y.flip(0)) for x, y in data], Ragged()) == first


def test_labels_that_a_task_cannot_give_are_left_out():
    """Its loss does without them."""

    class Autoencoder(ux.tasks.Regression):
        def losses(self, outputs, batch):
            return (outputs - batch[0]).square().mean(1)

        def correct(self, outputs, batch):
            raise NotImplementedError

        def count(self, batch):
            return len(batch[0])

    data = [(torch.randn(4, 3), "no labels")]
    task = Autoencoder(labels=lambda batch: batch[2])
    assert measure(nn.Linear(3, 3), data, task).samples == 4
