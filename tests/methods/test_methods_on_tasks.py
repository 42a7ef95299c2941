"""Every method on every kind of task: what it does is what the formula says, or it refuses."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unlearn_ext as ux
from unlearn_ext import tasks

# ---- one small model per task, with a loss written out by hand


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return {"out": self.last(self.first(x).relu())}


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(12, 8), nn.Linear(8, 12)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        return {"logits": self.last(x + x.cumsum(1))}


class Recommender(nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items, self.last = nn.Embedding(9, 6), nn.Embedding(7, 6), nn.Linear(6, 3)

    def forward(self, user, item):
        return self.last(self.users(user) * self.items(item))


def plain(outputs):
    return lambda: nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, outputs))


def _dense(labels):
    return lambda x, draw: (x(5), labels(draw))


def _segments(draw):
    labels = torch.randint(4, (6, 5, 5), generator=draw)
    labels[:, 0] = 255
    return torch.randn(6, 3, 5, 5, generator=draw), labels


def _sentence(draw, key="labels"):
    ids = torch.randint(12, (6, 7), generator=draw)
    labels = torch.randint(12, (6, 7), generator=draw)
    labels[:2, 4:] = -100
    return {"input_ids": ids, key: labels}


def _per_sample(values, counted):
    return (values * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)


def _positions(logits, labels, ignored):
    values = F.cross_entropy(logits, labels.clamp(max=logits.shape[1] - 1).clamp(min=0), reduction="none")
    return _per_sample(values, labels != ignored)


KINDS = {
    # name: task, model, batch of a generator, loss of model and batch, how to call it by hand
    "classification": (
        tasks.Classification(),
        plain(4),
        lambda g: (torch.randn(6, 5, generator=g), torch.randint(4, (6,), generator=g)),
        lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
    ),
    "two inputs": (
        tasks.Classification(inputs=(0, 1), labels=2),
        Recommender,
        lambda g: (
            torch.randint(9, (6,), generator=g),
            torch.randint(7, (6,), generator=g),
            torch.randint(3, (6,), generator=g),
        ),
        lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2], reduction="none"),
    ),
    "binary": (
        tasks.Binary(),
        plain(1),
        lambda g: (torch.randn(6, 5, generator=g), torch.randint(2, (6,), generator=g)),
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1].double(), reduction="none"),
    ),
    "multi-label": (
        tasks.MultiLabel(),
        plain(4),
        lambda g: (torch.randn(6, 5, generator=g), torch.randint(2, (6, 4), generator=g).float()),
        lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1], reduction="none").mean(1),
    ),
    "regression": (
        tasks.Regression(),
        plain(2),
        lambda g: (torch.randn(6, 5, generator=g), torch.randn(6, 2, generator=g)),
        lambda m, b: (m(b[0]) - b[1]).square().mean(1),
    ),
    "segmentation": (
        tasks.Segmentation(),
        Pixels,
        _segments,
        lambda m, b: _positions(m(b[0])["out"], b[1], 255),
    ),
    "token classification": (
        tasks.TokenClassification(),
        Tagger,
        _sentence,
        lambda m, b: _positions(m(b["input_ids"])["logits"].mT, b["labels"], -100),
    ),
    "causal LM": (
        tasks.CausalLM(),
        Tagger,
        _sentence,
        lambda m, b: _positions(m(b["input_ids"])["logits"].mT[:, :, :-1], b["labels"][:, 1:], -100),
    ),
}
NAMES = tuple(KINDS)
WITHOUT_CLASSES = ("regression",)
INFERRED = ("classification",)


def make(name):
    task, model, batch, loss = KINDS[name]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = model().double()
    draw = torch.Generator().manual_seed(1)

    def double(value):
        return value.double() if value.is_floating_point() else value

    sets = [[ux.data.map_tensors(double, batch(draw)) for _ in range(2)] for _ in range(2)]
    return task, made, *sets, loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_weights(model, expected):
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-9, atol=1e-12)


def stepped(model, loss, lr):
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [p.detach() - lr * grad for p, grad in zip(model.parameters(), grads, strict=True)]


def generator():
    return torch.Generator().manual_seed(0)


# ---- losses


@pytest.mark.parametrize("name", NAMES)
def test_finetuning_descends_on_the_tasks_loss(name):
    task, model, _, retain, loss = make(name)
    expected = stepped(model, loss(model, retain[0]).mean(), 0.1)
    ux.unlearn(
        "finetune", model, None, retain[:1], task=task, epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0
    )
    assert_weights(model, expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_ascent_climbs_on_the_tasks_loss(name):
    task, model, forget, _, loss = make(name)
    expected = stepped(model, -loss(model, forget[0]).clamp(max=3.0).mean(), 0.1)
    ux.unlearn("gradient_ascent", model, forget[:1], None, task=task, epochs=1, lr=0.1, cap=3.0)
    assert_weights(model, expected)


@pytest.mark.parametrize("name", NAMES)
def test_neg_grad_plus_does_both(name):
    task, model, forget, retain, loss = make(name)
    both = 0.7 * loss(model, retain[0]).mean() - 0.3 * loss(model, forget[0]).clamp(max=3.0).mean()
    expected = stepped(model, both, 0.1)
    settings = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "cap": 3.0, "retain_weight": 0.7}
    ux.unlearn("neg_grad_plus", model, forget[:1], retain[:1], task=task, **settings)
    assert_weights(model, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("objective", ["relabel", "finetune"])
def test_masked_training_descends_on_the_tasks_loss(name, objective):
    task, model, forget, retain, loss = make(name)
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    trained = forget[0] if objective == "relabel" else retain[0]
    expected = stepped(model, loss(model, trained).mean(), 0.1)
    settings = {"epochs": 1, "lr": 0.1, "momentum": 0.0, "masks": masks, "retain_weight": 0.0}
    ux.unlearn("gradient_masking", model, forget[:1], retain[:1], task=task, objective=objective, **settings)
    for ours, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["grad", "fisher", "ratio"])
def test_saliency_is_of_the_tasks_loss(name, score):
    task, model, forget, retain, loss = make(name)
    found = ux.saliency(model, forget, retain, score=score, task=task)

    def squares(batches):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for batch in batches:
            for value in loss(model, batch):
                grads = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
                total = [t + g**2 for t, g in zip(total, grads, strict=True)]
        return [t / 12 for t in total]

    if score == "grad":
        mean = torch.cat([loss(model, batch) for batch in forget]).mean()
        expected = [grad.abs() for grad in torch.autograd.grad(mean, list(model.parameters()))]
    else:
        expected = squares(forget)
    if score == "ratio":
        below = squares(retain)
        floor = 0.1 * sum(b.sum() for b in below) / sum(b.numel() for b in below)
        expected = [(a + floor) / (b + floor) for a, b in zip(expected, below, strict=True)]
    for ours, theirs in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


# ---- classes: other labels, distillation, noise

REFUSED = NotImplementedError
NO_LABELS = r"{method}: the task Regression has no relabel; .*finetune"


@pytest.mark.parametrize("method", ["random_label", "gradient_masking", "salun"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_CLASSES])
def test_random_labels_are_wrong_and_what_is_ignored_stays_so(name, method, monkeypatch):
    task, model, forget, retain, _ = make(name)
    seen = []
    honest = type(task).losses

    def watching(self, outputs, batch):
        if torch.is_grad_enabled():  # in training, not where accuracy and loss are measured
            seen.append(self.labels(batch).clone())
        return honest(self, outputs, batch)

    truth = [task.labels(batch) for batch in forget]
    monkeypatch.setattr(type(task), "losses", watching)
    settings = {"masks": {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}}
    settings = {} if method == "random_label" else settings
    result = ux.unlearn(method, model, forget, retain, task=task, epochs=3, generator=generator(), **settings)
    assert result.changed > 0.1
    kept = {tuple(task.labels(batch).flatten().tolist()) for batch in retain}
    drawn = [labels for labels in seen if tuple(labels.flatten().tolist()) not in kept]
    assert len(drawn) >= 6
    ignored = getattr(task, "ignore_index", None)
    for labels in drawn:
        # The batches come in order, perhaps with one more for a check at the start.
        (true,) = [
            t
            for t in truth
            if torch.equal(t == ignored, labels == ignored) and _all_wrong(t, labels, ignored, name)
        ][:1]
        assert true.shape == labels.shape


def _all_wrong(true, labels, ignored, name):
    differs = (labels != true) | (true == ignored)
    return bool(differs.any(1).all() if name == "multi-label" else differs.all())


@pytest.mark.parametrize("method", ["random_label", "gradient_masking", "salun"])
def test_other_labels_are_refused_where_there_are_no_classes(method):
    task, model, forget, retain, _ = make("regression")
    before = weights(model)
    with pytest.raises(REFUSED, match=NO_LABELS.format(method=method)):
        ux.unlearn(method, model, forget, retain, task=task)
    assert_weights(model, before)


def test_ascent_needs_the_probability_of_the_truth():
    task, model, forget, retain, _ = make("regression")
    with pytest.raises(REFUSED, match=r"gradient_masking: the task Regression has no log_odds; .*objective"):
        ux.gradient_masking(model, forget, retain, task=task, objective="ascend")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_CLASSES])
def test_masked_ascent_lowers_the_log_odds_of_the_truth(name):
    task, model, forget, _retain, _ = make(name)

    def odds():
        with torch.no_grad():
            return torch.stack([task.log_odds(task.forward(model, b), b).mean() for b in forget]).mean()

    before = odds()
    settings = {"density": 1.0, "granularity": "element", "min_depth": 0.0, "epochs": 20, "lr": 1.0}
    ux.gradient_masking(model, forget, task=task, objective="ascend", score="grad", **settings)
    assert odds() < before - 1e-3


def _probabilities(name, outputs):
    outputs = outputs.get("logits", outputs.get("out")) if isinstance(outputs, dict) else outputs
    if name in ("binary", "multi-label"):
        p = outputs.sigmoid()
        p = torch.stack([1 - p, p], -1)
        return p[:, 0] if name == "binary" else p
    if name == "segmentation":
        return outputs.softmax(1).movedim(1, -1)
    p = outputs.softmax(-1)
    return p[:, :-1] if name == "causal LM" else p


def _called(name, model, batch):
    if isinstance(batch, dict):
        return model(batch["input_ids"])
    return model(*batch[:2]) if name == "two inputs" else model(batch[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_CLASSES])
def test_distillation_compares_what_the_task_calls_probabilities(name):
    task, teacher, forget, _, _ = make(name)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator()).double()
    batch = forget[0]
    found = ux.methods.teachers.divergence(teacher, student, batch, task=task)
    p, q = (_probabilities(name, _called(name, model, batch)) for model in (teacher, student))
    values = (p * (p / q).log()).sum(-1)
    labels = task.labels(batch)
    if name == "segmentation":
        expected = _per_sample(values, labels != 255)
    elif name in ("token classification", "causal LM"):
        expected = _per_sample(values, (labels[:, 1:] if name == "causal LM" else labels) != -100)
    else:
        expected = values.mean(1) if name == "multi-label" else values
    torch.testing.assert_close(found, expected)
    assert found.shape == (6,)


@pytest.mark.parametrize("method", ["bad_teacher", "scrub"])
@pytest.mark.parametrize("name", NAMES)
def test_teachers_work_for_tasks_with_classes(name, method):
    task, model, forget, retain, _ = make(name)
    before = weights(model)
    if name in WITHOUT_CLASSES:
        with pytest.raises(
            REFUSED, match=rf"{method}: the task Regression has no log_scores; .*finetune works"
        ):
            ux.unlearn(method, model, forget, retain, task=task, generator=generator())
        assert_weights(model, before)
        return
    result = ux.unlearn(method, model, forget, retain, task=task, epochs=1, generator=generator())
    assert result.changed > 0.1
    assert "Regression" not in result.hyperparameters["task"]


UNSIR = {"noise_batch": 4, "noise_steps": 2, "repair_steps_min": 2}
NO_NOISE = {
    "two inputs": "noise cannot take the place of token ids or of several inputs",
    "token classification": "noise cannot take the place of token ids",
    "causal LM": "noise cannot take the place of token ids",
    "multi-label": "must be classes, integers, got torch.float64",
    "regression": "must be classes, integers, got torch.float64; .*finetune works for tasks without",
}


@pytest.mark.parametrize("name", NAMES)
def test_noise_works_for_classes_and_floating_inputs(name, monkeypatch):
    task, model, _, retain, _ = make(name)
    if name in NO_NOISE:
        with pytest.raises(TypeError, match=f"unsir: .*{NO_NOISE[name]}"):
            ux.unlearn("unsir", model, None, retain, task=task, forget_classes=1, **UNSIR)
        return
    if name == "binary":
        retain = [(x[y == 0], y[y == 0]) for x, y in retain]
    elif name == "classification":
        retain = [(x, y.where(y != 1, 2)) for x, y in retain]
    result = ux.unlearn("unsir", model, None, retain, task=task, forget_classes=1, **UNSIR)
    assert result.changed > 0.5
    noise = next(entry for entry in result.history if entry["phase"] == "noise")
    assert noise["label"] == 1
    assert noise["loss"][1] < noise["loss"][0]


def test_integer_labels_of_a_task_without_single_classes_are_refused():
    task, model, _, retain, _ = make("multi-label")
    whole = [(x, y.long()) for x, y in retain]
    with pytest.raises(
        TypeError, match=r"unsir: the samples of retain must be of one class each, got .*MultiLabel"
    ):
        ux.unsir(model, None, whole, forget_classes=1, task=task, **UNSIR)


def test_unsir_takes_the_classes_of_the_forget_set_or_those_given():
    task, model, _, _, _ = make("binary")
    x = torch.randn(8, 5).double()
    forget, retain = [(x[:4], torch.ones(4))], [(x[4:], torch.zeros(4))]
    twins = [copy.deepcopy(model) for _ in range(3)]
    results = [
        ux.unsir(twins[0], forget, retain, task=task, generator=generator(), **UNSIR),
        ux.unsir(twins[1], None, retain, forget_classes=[1], task=task, generator=generator(), **UNSIR),
        ux.unsir(twins[2], 1, retain, task=task, generator=generator(), **UNSIR),
    ]
    assert [r.hyperparameters["forget_classes"] for r in results] == [[1]] * 3
    assert_weights(twins[0], weights(twins[1]))
    assert_weights(twins[0], weights(twins[2]))


@pytest.mark.parametrize("classes", [2, [2], (2,), {2}, range(2, 3), torch.tensor(2), torch.tensor([2])])
def test_the_older_form_of_unsir_goes_on_working(classes):
    model = nn.Linear(4, 3)
    retain = [(torch.randn(8, 4), torch.arange(8) % 2)]
    assert ux.unsir(model, classes, retain, **UNSIR).hyperparameters["forget_classes"] == [2]
    assert ux.unsir(model, forget_classes=classes, retain=retain, **UNSIR).changed > 0


@pytest.mark.parametrize("name", NAMES)
def test_fisher_forgetting_with_true_labels_works_for_any_task(name):
    task, model, forget, retain, _ = make(name)
    result = ux.unlearn(
        "fisher_forgetting", model, forget, retain, task=task, estimator="per_sample", generator=generator()
    )
    assert result.changed > 0.9
    assert set(result.coverage) == {name for name, _ in model.named_parameters()}


def test_fisher_forgetting_needs_classes_to_draw_labels():
    task, model, forget, retain, _ = make("regression")
    with pytest.raises(
        REFUSED, match=r"fisher_forgetting: the task Regression has no .*estimator='per_sample'"
    ):
        ux.unlearn("fisher_forgetting", model, forget, retain, task=task)


@pytest.mark.parametrize("method", ["gradient_ascent", "neg_grad_plus"])
def test_without_classes_the_cap_must_be_given(method):
    task, model, forget, retain, _ = make("regression")
    with pytest.raises(REFUSED, match=f"{method}: the task Regression has no log_scores; cap must be given"):
        ux.unlearn(method, model, forget, retain, task=task)


@pytest.mark.parametrize(
    "name, cap", [("classification", math.log(4)), ("binary", math.log(2)), ("causal LM", math.log(12))]
)
def test_the_cap_follows_the_number_of_classes(name, cap):
    task, model, forget, retain, _ = make(name)
    result = ux.unlearn("neg_grad_plus", model, forget, retain, task=task, epochs=1)
    assert result.hyperparameters["cap"] == pytest.approx(cap)


# ---- what no task is given for is inferred, or refused

AMBIGUOUS = {
    "two inputs": r"task=ux\.tasks\.Classification\(inputs=\(0, 1\), labels=2\)",
    "binary": r"task=ux\.tasks\.Binary\(\)",
    "multi-label": r"task=ux\.tasks\.MultiLabel\(\)",
    "regression": r"task=ux\.tasks\.Regression\(\)",
    "token classification": r"ux\.tasks\.TokenClassification\(\)",
    "causal LM": r"ux\.tasks\.CausalLM\(\)",
}
TRAINING = {
    "finetune": {},
    "gradient_ascent": {"cap": 1.0},
    "neg_grad_plus": {"cap": 1.0},
    "random_label": {},
    "bad_teacher": {},
    "scrub": {},
    "gradient_masking": {},
    "salun": {},
    "unsir": {"forget_classes": 1, **UNSIR},
    "fisher_forgetting": {},
}


@pytest.mark.parametrize("method", TRAINING)
@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_the_data_do_not_tell_is_refused_with_the_task_to_pass(name, method):
    _, model, forget, retain, _ = make(name)
    if method == "unsir" and name in NO_NOISE:
        pytest.skip("refused for its inputs or labels first")
    before = weights(model)
    with pytest.raises(ValueError, match=AMBIGUOUS[name]):
        ux.unlearn(method, model, forget, retain, **TRAINING[method])
    assert_weights(model, before)


@pytest.mark.parametrize("method", TRAINING)
def test_a_task_that_is_none_is_refused_as_such(method):
    _, model, forget, retain, _ = make("classification")
    with pytest.raises(TypeError, match=f"{method}: task must be a ux.tasks.Task, got .*; call it"):
        ux.unlearn(method, model, forget, retain, task=tasks.Classification, **TRAINING[method])


@pytest.mark.parametrize("method", TRAINING)
def test_what_is_missing_is_named(method):
    task, model, forget, _retain, _ = make("classification")
    missing = {"gradient_ascent": "forget"}.get(method, "retain")
    given = {"forget": None} if missing == "forget" else {"forget": forget, "retain": None}
    with pytest.raises(ValueError, match=f"{method}: {missing} must be given"):
        ux.unlearn(method, model, given["forget"], given.get("retain"), task=task, **TRAINING[method])


def test_retrain_names_what_it_lacks():
    _, model, forget, retain, _ = make("classification")
    with pytest.raises(ValueError, match="retrain: make_model must be given"):
        ux.unlearn("retrain", model, forget, retain)
    with pytest.raises(ValueError, match="retrain: train must be given"):
        ux.unlearn("retrain", model, forget, retain, make_model=plain(4))


@pytest.mark.parametrize("method", [m for m in TRAINING if m not in ("bad_teacher", "fisher_forgetting")])
def test_a_loss_of_the_users_own_is_used(method):
    task, model, forget, retain, loss = make("classification")
    retain = [(x, y.where(y != 1, 2)) for x, y in retain]
    calls = []

    def loss_fn(model, batch):
        calls.append(batch)
        return loss(model, batch)

    result = ux.unlearn(method, model, forget, retain, task=task, loss_fn=loss_fn, **TRAINING[method])
    assert len(calls) > 1
    assert "loss_fn" in result.hyperparameters["loss_fn"]


# ---- which parameters may change


@pytest.mark.parametrize("method", TRAINING)
@pytest.mark.parametrize(
    "patterns, changed",
    [
        ({"include": "2"}, ["2.weight", "2.bias"]),
        ({"include": ["weight"], "exclude": r"0\..*"}, ["2.weight"]),
        ({"exclude": ["bias", "0"]}, ["2.weight"]),
    ],
)
def test_patterns_choose_what_may_change(method, patterns, changed):
    task, model, forget, retain, _ = make("classification")
    retain = [(x, y.where(y != 1, 2)) for x, y in retain]
    settings = dict(TRAINING[method])
    if method in ("gradient_masking", "salun"):
        settings |= {"density": 1.0, "epochs": 2}
    if method == "gradient_masking":
        settings |= {"min_depth": 0.0}
    before = dict(zip((n for n, _ in model.named_parameters()), weights(model), strict=True))
    ux.unlearn(method, model, forget, retain, task=task, generator=generator(), **patterns, **settings)
    differ = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert differ == changed


@pytest.mark.parametrize("method", TRAINING)
def test_all_methods_have_one_calling_form(method):
    parameters = inspect.signature(ux.METHODS[method]).parameters
    assert list(parameters)[:3] == ["model", "forget", "retain"]
    assert parameters["retain"].default is None
    common = {"task": None, "generator": None, "progress": False, "include": None, "exclude": None}
    if method not in ("bad_teacher", "fisher_forgetting"):  # which compare or draw what the model predicts
        common["loss_fn"] = None
    for name, default in common.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == default


def test_patterns_that_leave_nothing_are_refused():
    task, model, forget, retain, _ = make("classification")
    with pytest.raises(
        ValueError, match="finetune: include and exclude must leave a parameter, got include='x'"
    ):
        ux.unlearn("finetune", model, forget, retain, task=task, include="x")
    with pytest.raises(ValueError, match="finetune: patterns of parameter names must be at least one"):
        ux.unlearn("finetune", model, forget, retain, task=task, include=[])


def test_scores_and_gram_matrices_take_the_same_patterns():
    task, model, forget, _, _ = make("classification")
    assert list(ux.saliency(model, forget, score="grad", task=task, exclude="bias")) == [
        "0.weight",
        "2.weight",
    ]
    assert list(ux.activation_gram(model, forget, include="2")) == ["2"]
    assert list(ux.activation_gram(model, forget, exclude=r"2\..*", task=task)) == ["0"]
    scores = ux.saliency(model, forget, score="grad", task=task)
    masks = ux.select_mask(scores, 1.0, include=["2"], exclude="*.bias")
    assert [name for name, mask in masks.items() if mask.any()] == ["2.weight"]


@pytest.mark.parametrize("name", NAMES)
def test_gram_matrices_call_the_model_as_the_task_does(name):
    task, model, forget, _, _ = make(name)
    gram = ux.activation_gram(model, forget, task=task)
    assert gram.n_samples == 12
    inputs = []
    last = list(model.children())[-1]
    handle = last.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    for batch in forget:
        _called(name, model, batch)
    handle.remove()
    rows = torch.cat([x.movedim(1, -1) if name == "segmentation" else x for x in inputs]).flatten(0, -2)
    torch.testing.assert_close(list(gram.values())[-1], rows.mT @ rows)


@pytest.mark.parametrize("method", ["gradient_ascent", "neg_grad_plus", "scrub"])
def test_a_loss_of_ones_own_does_not_make_numbers_classes(method):
    _, model, forget, retain, loss = make("regression")
    with pytest.raises(ValueError, match=r"task=ux\.tasks\.Regression\(\)"):
        ux.unlearn(method, model, forget, retain, loss_fn=loss)


def test_a_loss_of_ones_own_needs_no_task_where_nothing_else_is_asked():
    _, model, forget, retain, loss = make("regression")
    assert ux.unlearn("finetune", model, None, retain, loss_fn=loss).changed == 1.0
    assert ux.gradient_masking(model, forget, retain, objective="finetune", loss_fn=loss).changed > 0
