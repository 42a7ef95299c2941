"""Metrics and comparisons of every task, against plain loops over samples and positions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import unlearn_ext as ux
from unlearn_ext import metrics, tasks

N, T, C = 5, 4, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def head(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, outputs).double()


class Pixels(nn.Module):
    """Classes in dimension 1, as convolutional networks have them."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(2, C, 1).double()

    def forward(self, x):
        return self.conv(x)


class Sequence(nn.Module):
    """Classes in dimension 1 of a sequence that may be as long as there are classes."""

    def __init__(self, seed):
        super().__init__()
        self.head = head(C, seed)

    def forward(self, x):
        return self.head(x).movedim(-1, 1)


class Language(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(C, 6).double(), nn.Linear(6, C).double()

    def forward(self, input_ids):
        return {"logits": self.head(self.embed(input_ids))}


class Recommender(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.users, self.items = nn.Embedding(6, 4).double(), nn.Embedding(6, 4).double()

    def forward(self, user, item):
        return (self.users(user) * self.items(item)).sum(-1)


class Images(nn.Module):
    """A list of images of different sizes, one answer each."""

    def __init__(self, seed):
        super().__init__()
        self.head = head(C, seed)

    def forward(self, images):
        return torch.stack([self.head(image.mean(1)) for image in images])


class Listed(tasks.Classification):
    """Images in a list: samples do not lie along a leading dimension."""

    def select(self, batch, samples):
        images, labels = batch
        return [images[i] for i in samples], labels[list(samples)]

    def count(self, batch):
        return len(batch[0])


# Each position as (probabilities, place of the truth), sample by sample; no position for what is ignored.


def softmax(logits):
    exps = [math.exp(float(v)) for v in logits]
    return [e / sum(exps) for e in exps]


def one_per_sample(logits, labels):
    return [[(softmax(row), int(label))] for row, label in zip(logits, labels, strict=True)]


def coin(logit, label):
    p = 1 / (1 + math.exp(-float(logit)))
    return [1 - p, p], int(label)


def own_positions(logits, labels, ignored):
    return [
        [
            (softmax(at), int(label))
            for at, label in zip(row, row_labels, strict=True)
            if int(label) != ignored
        ]
        for row, row_labels in zip(logits, labels, strict=True)
    ]


def next_positions(logits, labels):
    return own_positions(logits[:, :-1], labels[:, 1:], -100)


def pixels(logits, labels):
    return [
        [
            (softmax(logits[n, :, i, j]), int(labels[n, i, j]))
            for i in range(2)
            for j in range(2)
            if int(labels[n, i, j]) != 255
        ]
        for n in range(len(labels))
    ]


def void(labels, value, seed):
    return labels.masked_fill(whole(3, *labels.shape, seed=seed + 7) == 0, value)


def classification(n, seed):
    return draw(n, 3, seed=seed), whole(C, n, seed=seed)


def binary(n, seed):
    return draw(n, 3, seed=seed), whole(2, n, seed=seed).double().unsqueeze(1)


def multi_label(n, seed):
    return draw(n, 3, seed=seed), whole(2, n, C, seed=seed).double()


def segmentation(n, seed):
    return draw(n, 2, 2, 2, seed=seed), void(whole(C, n, 2, 2, seed=seed), 255, seed)


def positions_as_classes(n, seed):
    return draw(n, C, 3, seed=seed), whole(C, n, C, seed=seed)


def tokens(n, seed):
    ids = whole(C, n, T, seed=seed)
    return {"input_ids": ids, "labels": void(whole(C, n, T, seed=seed + 1), -100, seed)}


def causal(n, seed):
    ids = whole(C, n, T, seed=seed)
    return {"input_ids": ids, "labels": void(ids, -100, seed)}


def pairs(n, seed):
    return whole(6, n, seed=seed), whole(6, n, seed=seed + 1), whole(2, n, seed=seed + 2)


def listed(n, seed):
    images = [draw(3, 2 + index % 3, seed=seed + index) for index in range(n)]
    return images, whole(C, n, seed=seed)


class Case:
    def __init__(self, task, model, data, labels, positions, logits=None):
        self.task, self.model, self.data = task, model, data
        self.labels, self.positions = labels, positions
        self.logits = logits or (lambda model, batch: model(batch[0]))

    def sets(self):
        sizes = {"forget": (N, 2), "retain": (N, 4), "test": (6, 3)}
        return {
            name: [self.data(n, 10 * at + seed) for at, n in enumerate(parts)]
            for seed, (name, parts) in enumerate(sizes.items(), 1)
        }

    def truth(self, model, data):
        """Positions of all samples of a set."""
        model.eval()
        with torch.no_grad():
            return [
                sample
                for batch in data
                for sample in self.positions(self.logits(model, batch), self.labels(batch))
            ]


def second(batch):
    return batch[1]


def by_key(batch):
    return batch["labels"]


def named(model, batch):
    return model(batch["input_ids"])["logits"]


CASES = {
    "classification": Case(None, lambda s: head(C, s), classification, second, one_per_sample),
    "classes in dimension 1, C = T": Case(
        tasks.Classification(class_dim=1),
        Sequence,
        positions_as_classes,
        second,
        lambda logits, labels: own_positions(logits.movedim(1, -1), labels, -100),
    ),
    "binary": Case(
        tasks.Binary(),
        lambda s: head(1, s),
        binary,
        second,
        lambda logits, labels: [[coin(z, y)] for z, y in zip(logits, labels, strict=True)],
    ),
    "multi-label": Case(
        tasks.MultiLabel(),
        lambda s: head(C, s),
        multi_label,
        second,
        lambda logits, labels: [
            [coin(z, y) for z, y in zip(row, own, strict=True)]
            for row, own in zip(logits, labels, strict=True)
        ],
    ),
    "segmentation": Case(tasks.Segmentation(), Pixels, segmentation, second, pixels),
    "token classification": Case(
        tasks.TokenClassification(),
        Language,
        tokens,
        by_key,
        lambda logits, labels: own_positions(logits, labels, -100),
        named,
    ),
    "masked language model": Case(
        tasks.MaskedLM(),
        Language,
        tokens,
        by_key,
        lambda logits, labels: own_positions(logits, labels, -100),
        named,
    ),
    "causal language model": Case(tasks.CausalLM(), Language, causal, by_key, next_positions, named),
    "recommender": Case(
        tasks.Binary(inputs=(0, 1), labels=2),
        Recommender,
        pairs,
        lambda batch: batch[2],
        lambda logits, labels: [[coin(z, y)] for z, y in zip(logits, labels, strict=True)],
        lambda model, batch: model(batch[0], batch[1]),
    ),
    "lists of images": Case(Listed(), Images, listed, second, one_per_sample),
}


@pytest.fixture(params=list(CASES))
def case(request):
    return CASES[request.param]


def mean(values):
    return sum(values) / len(values)


def losses_of(samples):
    return [mean([-math.log(p[y]) for p, y in sample]) for sample in samples if sample]


def auc_of(members, others):
    return mean([(a < b) + (a == b) / 2 for a in members for b in others])


def js_of(p, q):
    def kl(a, b):
        return sum(x * math.log2(x / y) for x, y in zip(a, b, strict=True) if x)

    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (kl(p, m) + kl(q, m)) / 2


def right(p, y):
    return max(range(len(p)), key=p.__getitem__) == y


def test_accuracy(case):
    model, data = case.model(0), case.sets()["forget"]
    answered = [right(p, y) for sample in case.truth(model, data) for p, y in sample]
    assert 0 < mean(answered) < 1
    assert metrics.accuracy(model, data, task=case.task) == pytest.approx(mean(answered), abs=1e-12)


def test_attack_by_loss(case):
    model, sets = case.model(0), case.sets()
    found = metrics.mia(
        model, forget=sets["forget"], test=sets["test"], convention="loss", task=case.task, bootstrap=0
    )
    ours, others = (losses_of(case.truth(model, sets[name])) for name in ("forget", "test"))
    assert found.auc == found.score == pytest.approx(auc_of(ours, others), abs=1e-12)
    limit = min(others)  # of so few, no false positive is allowed
    assert found.tpr == pytest.approx(mean([loss < limit for loss in ours]), abs=1e-12)


@pytest.mark.parametrize("convention", ["ssd", "salun"])
def test_attacks_by_entropy_and_confidence(case, convention):
    linear, svm = (pytest.importorskip(f"sklearn.{name}") for name in ("linear_model", "svm"))
    model, sets = case.model(0), case.sets()
    samples = {name: [s for s in case.truth(model, data) if s] for name, data in sets.items()}

    def entropy(sample):
        return mean([-sum(v * math.log(v) for v in p) for p, _ in sample])

    def confidence(sample):
        return 1 / (1 + math.exp(-mean([math.log(p[y] / (1 - p[y])) for p, y in sample])))

    x = {
        name: np.array([(entropy if convention == "ssd" else confidence)(s) for s in of])[:, None]
        for name, of in samples.items()
    }
    if convention == "ssd":
        judge = linear.LogisticRegression(class_weight="balanced", solver="lbfgs", random_state=0)
        members = x["retain"]
    else:
        judge = svm.SVC(C=3, gamma="auto", kernel="rbf")
        members = x["retain"][np.random.default_rng(0).permutation(len(x["retain"]))[: len(x["test"])]]
    judge.fit(np.concatenate([members, x["test"]]), np.repeat([1.0, 0.0], [len(members), len(x["test"])]))
    share = judge.predict(x["forget"]).mean()
    expected = share if convention == "ssd" else 1 - share
    found = metrics.mia(model, **sets, convention=convention, task=case.task, bootstrap=0)
    assert found.score == pytest.approx(expected, abs=1e-12)


def test_divergences(case):
    model, other, data = case.model(0), case.model(1), case.sets()["forget"]
    both = [
        (p, q)
        for ours, theirs in zip(case.truth(model, data), case.truth(other, data), strict=True)
        for (p, _), (q, _) in zip(ours, theirs, strict=True)
    ]
    js = mean([js_of(p, q) for p, q in both])
    assert js > 1e-4
    assert metrics.js_divergence(model, other, data, task=case.task) == pytest.approx(js, rel=1e-9)
    assert metrics.zrf(model, other, data, task=case.task) == pytest.approx(1 - js, rel=1e-9)
    apart = mean([math.dist(p, q) for p, q in both])
    found = metrics.activation_distance(model, other, data, task=case.task)
    assert found == pytest.approx(apart, rel=1e-9)


def test_relearning(case):
    model, data = case.model(0), case.sets()["forget"]
    copy = case.model(0)
    optimizer = torch.optim.SGD(copy.parameters(), lr=1.0)
    truth = mean([right(p, y) for sample in case.truth(copy, data) for p, y in sample])
    steps, goal = 0, min(1.0, truth + 0.05)
    task = case.task or tasks.Classification()
    while truth < goal and steps < 60:
        for batch in data:
            optimizer.zero_grad()
            # The mean over the samples of the mean over their positions, by torch's own loss.
            task.losses(task.forward(copy, batch), batch).mean().backward()
            optimizer.step()
            steps += 1
            truth = mean([right(p, y) for sample in case.truth(copy, data) for p, y in sample])
            if truth >= goal or steps == 60:
                break
    found = metrics.relearn_steps(
        model,
        data,
        goal,
        task=case.task,
        optimizer=lambda copy: torch.optim.SGD(copy.parameters(), lr=1.0),
        most=60,
    )
    assert found == (steps if truth >= goal else math.inf)


def moved(model, forget, retain, *, task=None, seen=None):
    """A method: the task it is given is told, and the weights are moved."""
    if seen is not None:
        seen.append(task)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-0.5)


def test_a_comparison(case, tmp_path):
    model, reference, sets = case.model(0), case.model(1), case.sets()
    seen = []
    table = ux.compare(
        model,
        **sets,
        methods={"moved": (moved, {"seen": seen})},
        reference=reference,
        task=case.task,
        controls=False,
    )
    assert seen == [case.task]
    unlearned = case.model(0)
    moved(unlearned, None, None)
    found = table.measures("moved")
    assert {entry.why for entry in found.values()} == {None}
    kinds = {**sets}
    if table.facts["forget_classes"] is None:
        assert found["test"].value == metrics.accuracy(unlearned, sets["test"], task=case.task)
    for name in ("forget", "retain"):
        assert found[name].value == metrics.accuracy(unlearned, kinds[name], task=case.task)
    expected = metrics.js_divergence(unlearned, reference, sets["forget"], task=case.task)
    assert found["js"].value == pytest.approx(expected, rel=1e-12)
    assert table.facts["samples"] == {"forget": N + 2, "retain": N + 4, "test": 9}
    (row,) = [row for row in table.rows if row.label == "moved"]
    assert sum(row.loss_counts["forget"]) == N + 2
    told = table.facts["task"]
    assert told == (repr(case.task) if case.task is not None else f"{tasks.Classification()!r}, inferred")
    assert "Task" in table.to_html()


@pytest.mark.filterwarnings("ignore::UserWarning")  # so little data can rarely be forgotten
def test_methods_of_the_package_are_compared_on_every_task(case, tmp_path):
    given = {"methods": ["ssd", "finetune"], "metrics": ["retain", "forget", "mia"], "cache": tmp_path}
    tables = [ux.compare(case.model(0), **case.sets(), task=case.task, **given) for _ in range(2)]
    for label in ("original", "ssd", "finetune", "random mask"):
        assert {entry.why for entry in tables[0].measures(label).values()} == {None}
    assert tables[0].measures("finetune")["changed"].value > 0
    # The second one comes from the cache, to the last digit of the seconds.
    for label in ("ssd", "finetune", "random mask"):
        assert tables[0].measures(label) == tables[1].measures(label)


def test_classes_are_forgotten_also_in_lists_and_with_one_logit():
    for name, chosen in (("lists of images", 2), ("binary", 1)):
        case = CASES[name]
        batches = [case.data(12, seed) for seed in range(3)]
        sets = {}
        for key, inside in (("forget", True), ("retain", False)):
            picked = []
            for batch in batches[:2]:
                index = [
                    i for i, y in enumerate(case.labels(batch).flatten()) if (int(y) == chosen) == inside
                ]
                picked.append(case.task.select(batch, index))
            sets[key] = picked
        model = case.model(0)
        table = ux.compare(
            model,
            **sets,
            test=[batches[2]],
            methods=[moved],
            task=case.task,
            metrics=["test"],
            controls=False,
        )
        assert table.facts["forget_classes"] == [chosen]
        moved(model, None, None)
        for column, inside in (("test_forgotten", True), ("test_retained", False)):
            answered = [
                right(p, y) for s in case.truth(model, batches[2:]) for p, y in s if (y == chosen) == inside
            ]
            assert table.measures("moved")[column].value == pytest.approx(mean(answered))


def test_ragged_sets_have_keys_that_know_their_content(tmp_path):
    case = CASES["lists of images"]
    runs = []

    def counting(model, forget, retain):
        runs.append(1)

    def run(sets):
        before = len(runs)
        given = {"methods": [counting], "metrics": ["forget"], "controls": False, "cache": tmp_path}
        ux.compare(case.model(0), **sets, task=case.task, cache_key="1", **given)
        return len(runs) - before

    sets = case.sets()
    assert run(sets) == 1
    assert run(sets) == 0
    assert run({**sets, "forget": [case.task.select(b, range(len(b[0]))[::-1]) for b in sets["forget"]]}) == 0
    changed = case.sets()
    changed["forget"][1][0][0][0, 0] += 1
    assert run(changed) == 1


def test_numbers_have_no_classes_and_say_so():
    x = draw(8, 3)
    data, model, other = [(x, draw(8, 2, seed=1))], head(2), head(2, 1)
    task, rough = tasks.Regression(), tasks.Regression(tolerance=0.5)
    with pytest.raises(NotImplementedError, match="without a tolerance"):
        metrics.accuracy(model, data, task=task)
    with torch.no_grad():
        error = [float((model(a) - b).abs().max()) for a, b in zip(x, data[0][1], strict=True)]
    assert metrics.accuracy(model, data, task=rough) == mean([e <= 0.5 for e in error])
    for function in (metrics.js_divergence, metrics.zrf, metrics.activation_distance):
        with pytest.raises(NotImplementedError, match=r"task must have classes.*got Regression\(\)"):
            function(model, other, data, task=task)
    for convention in ("ssd", "salun"):
        with pytest.raises(NotImplementedError, match="Regression"):
            metrics.mia(model, forget=data, retain=data, test=data, convention=convention, task=task)
    test = [(draw(5, 3, seed=2), draw(5, 2, seed=3))]
    found = metrics.mia(model, forget=data, test=test, convention="loss", task=task, bootstrap=0)
    with torch.no_grad():
        squares = [(model(x) - y).square().mean(1).tolist() for x, y in (data[0], test[0])]
    assert found.auc == pytest.approx(auc_of(*squares))
    assert metrics.relearn_steps(model, data, 2.0, task=rough, most=2) == math.inf


def test_a_comparison_of_numbers_says_what_it_cannot_measure():
    sets = [[(draw(n, 3, seed=n), draw(n, 2, seed=n + 1))] for n in (4, 9, 6)]
    given = {"methods": [moved], "reference": head(2, 1), "controls": False}
    table = ux.compare(head(2), *sets, task=tasks.Regression(), **given)
    assert table.facts["reference"] == "a model given by the caller"
    found = table.measures("moved")
    assert "without a tolerance" in found["retain"].why
    assert "task must have classes" in found["js"].why
    assert found["mia_auc"].value is not None
    assert found["gap"].value is not None  # of the attack alone
    (row,) = [row for row in table.rows if row.label == "moved"]
    assert sum(row.loss_counts["forget"]) == 4
    rough = ux.compare(head(2), *sets, task=tasks.Regression(tolerance=1.0), **given)
    assert rough.measures("moved")["retain"].value is not None


class Graph:
    """Nodes and edges of a batch, as graph libraries hold them: no tuple, no mapping."""

    def to(self, device):
        return self


REFUSED = {
    "floats that are no classes": (head(2), [(draw(4, 3), draw(4, 2))], r"ux.tasks.Regression\(\)"),
    "several labels at a time": (
        head(2),
        [(draw(4, 3), torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 1]]).double())],
        r"ux.tasks.MultiLabel\(\)",
    ),
    "one logit and integers": (head(1), [(draw(4, 3), whole(2, 4))], r"ux.tasks.Binary\(\)"),
    "one logit and floats": (head(1), [(draw(4, 3), whole(2, 4, 1).double())], r"ux.tasks.Binary\(\)"),
    "void pixels": (
        Pixels(0),
        [(draw(2, 2, 2, 2), torch.full((2, 2, 2), 255))],
        r"ux.tasks.Segmentation\(ignore_index=255\)",
    ),
    "labels per token": (
        Language(0),
        [{"input_ids": whole(C, 2, T), "labels": whole(C, 2, T)}],
        r"ux.tasks.TokenClassification\(\)",
    ),
    "three entries": (head(3), [(draw(4, 3), whole(2, 4), whole(3, 4))], r"inputs=\(0, 1\), labels=2"),
    "C as long as T": (Sequence(0), [(draw(2, C, 3), whole(C, 2, C))], r"class_dim=1"),
    "a graph": (head(3), [Graph()], "subclass of ux.tasks.Task"),
    "labels that do not exist": (head(3), [(draw(4, 3), torch.tensor([0, 1, 2, 7]))], "got 7"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_is_not_told_is_refused_with_the_task_to_pass(name):
    model, data, message = REFUSED[name]
    needs_labels = {
        "accuracy": lambda: metrics.accuracy(model, data),
        "mia": lambda: metrics.mia(model, forget=data, test=data, convention="loss"),
        "relearn_steps": lambda: metrics.relearn_steps(model, data, 0.5, most=1),
    }
    for call in needs_labels.values():
        with pytest.raises(ValueError, match=message):
            call()

    def never(*_, **__):
        raise AssertionError("ran")

    with pytest.raises(ValueError, match=f"compare: forget: .*{message}"):
        ux.compare(model, data, data, data, methods=[never], make_model=never, train=never)


@pytest.mark.parametrize("function", [metrics.js_divergence, metrics.zrf, metrics.activation_distance])
def test_the_axis_of_the_classes_is_told_or_refused(function):
    ambiguous = [(draw(2, C, 3),)]  # [N, C, T] with C = T, no labels
    with pytest.raises(ValueError, match="class_dim must be given"):
        function(Sequence(0), Sequence(1), ambiguous)
    found = function(Sequence(0), Sequence(1), ambiguous, task=tasks.Classification(class_dim=1))
    flat = [(ambiguous[0][0].reshape(-1, 3),)]
    assert found == pytest.approx(function(head(C, 0), head(C, 1), flat), rel=1e-12)
    images = [(draw(2, 2, 2, 2),)]  # [N, C, H, W], no labels
    with pytest.raises(ValueError, match="class_dim must be given"):
        function(Pixels(0), Pixels(1), images)
    rows = [(images[0][0].movedim(1, -1).reshape(-1, 2),)]

    def as_rows(pixels):
        linear = nn.Linear(2, C).double()
        linear.load_state_dict(
            {k: v.reshape(linear.state_dict()[k].shape) for k, v in pixels.conv.state_dict().items()}
        )
        return linear

    found = function(Pixels(0), Pixels(1), images, task=tasks.Segmentation())
    assert found == pytest.approx(function(as_rows(Pixels(0)), as_rows(Pixels(1)), rows), rel=1e-12)


def test_outputs_that_are_no_numbers_are_refused():
    def broken():
        model = head(C)
        with torch.no_grad():
            model.weight[0, 0] = math.nan
        return model

    data = [classification(4, 0)]
    for call in (
        lambda: metrics.accuracy(broken(), data),
        lambda: metrics.mia(broken(), forget=data, test=data, convention="loss"),
        lambda: metrics.js_divergence(broken(), head(C), data),
        lambda: metrics.js_divergence(head(C), broken(), data),
        lambda: metrics.zrf(broken(), head(C), data, "release"),
        lambda: metrics.activation_distance(broken(), head(C), data),
    ):
        with pytest.raises(FloatingPointError, match="outputs must be numbers, got NaN"):
            call()


def test_shift_is_the_older_way_to_say_the_task():
    case = CASES["causal language model"]
    model, data = case.model(0), case.sets()["forget"]
    assert metrics.accuracy(model, data, shift=True) == metrics.accuracy(model, data, task=case.task)
    tagger = CASES["token classification"]
    model, data = tagger.model(0), tagger.sets()["forget"]
    assert metrics.accuracy(model, data, shift=False) == metrics.accuracy(model, data, task=tagger.task)
    with pytest.raises(ValueError, match="shift must not be given together with task"):
        metrics.accuracy(model, data, shift=True, task=tagger.task)
    with pytest.raises(TypeError, match=r"task must be a ux\.tasks\.Task"):
        metrics.accuracy(model, data, task=tasks.TokenClassification)


def test_a_loss_of_the_users_own_is_relearned_and_attacked_by():
    data, test = [classification(6, 0)], [classification(5, 1)]
    model = head(C)

    def brier(model, batch):
        chances = model(batch[0]).softmax(-1)
        return (chances - nn.functional.one_hot(batch[1], C)).square().sum(-1)

    task = tasks.Classification().with_loss(brier)
    found = metrics.mia(model, forget=data, test=test, convention="loss", task=task, bootstrap=0)
    ours, others = (brier(model, batch[0]).tolist() for batch in (data, test))
    assert found.auc == pytest.approx(auc_of(ours, others))
    seen = []

    def watched(model, batch):
        seen.append(len(batch[1]))
        return brier(model, batch)

    metrics.relearn_steps(model, data, 2.0, loss_fn=watched, most=3)
    assert seen == [6, 6, 6]


def test_samples_of_which_nothing_counts_are_no_members():
    model, task = Pixels(0), tasks.Segmentation()
    images, labels = segmentation(4, 0)
    labels[1] = 255
    kept = [0, 2, 3]
    test = [segmentation(5, 1)]
    for convention in ("loss", "ssd", "salun"):
        found, expected = (
            metrics.mia(
                model, forget=[batch], retain=test, test=test, convention=convention, task=task, bootstrap=0
            )
            for batch in ((images, labels), (images[kept], labels[kept]))
        )
        assert (found.auc, found.tpr, found.score) == (expected.auc, expected.tpr, expected.score)


def test_the_attack_tells_confident_samples_apart():
    # In single precision both have the loss 0, and the attack would be at chance.
    ours, others = (
        [(torch.tensor([[float(z), 0.0], [z + 1.0, 0.0]]), torch.tensor([0, 0]))] for z in (22, 18)
    )
    assert nn.functional.cross_entropy(*others[0], reduction="none").tolist() == [0, 0]
    found = metrics.mia(nn.Identity(), forget=ours, test=others, convention="loss", bootstrap=0)
    assert found.auc == 1


def test_the_task_decides_which_rows_are_the_same(tmp_path):
    sets = [[(draw(n, 3, seed=n), draw(n, 2, seed=n + 1))] for n in (4, 9, 6)]
    found = []
    for tolerance in (0.5, 2.0, 0.5):
        given = {"methods": [moved], "metrics": ["retain"], "controls": False, "cache": tmp_path}
        table = ux.compare(head(2), *sets, task=tasks.Regression(tolerance=tolerance), **given)
        found.append(table.measures("moved"))
    assert found[0]["retain"].value != found[1]["retain"].value
    assert found[0] == found[2]  # to the last digit of the seconds: from the cache
