"""Tasks: what they compute, against formulas written out; what is inferred; what is refused."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unlearn_ext as ux
from unlearn_ext import losses, tasks
from unlearn_ext.tasks.infer import unwrapped
from unlearn_ext.tasks.losses import resolve


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def softmax_facts(logits, label):
    p = torch.softmax(logits.double(), -1)[label].item()
    return -math.log(p), math.log(p / (1 - p)), float(logits.argmax() == label)


def test_classification_against_the_formulas(generator):
    outputs, labels = torch.randn(6, 4, generator=generator).double(), torch.tensor([0, 1, 2, 3, -100, 1])
    task, batch = tasks.Classification(), (None, labels)
    loss, odds, right = zip(
        *(
            softmax_facts(z, y) if y >= 0 else (0, 0, 0)
            for z, y in zip(outputs, labels.tolist(), strict=True)
        ),
        strict=True,
    )
    torch.testing.assert_close(task.losses(outputs, batch), torch.tensor(loss).double())
    torch.testing.assert_close(task.log_odds(outputs, batch), torch.tensor(odds).double())
    hits, counted = task.correct(outputs, batch)
    assert hits.tolist() == list(right)
    assert counted.tolist() == [1, 1, 1, 1, 0, 1]
    torch.testing.assert_close(task.scores(outputs, batch), outputs.softmax(-1))
    assert task.counted(outputs, batch).tolist() == [True] * 4 + [False, True]


@pytest.mark.parametrize(
    "task, shape",
    [
        (tasks.Classification(class_dim=1), (3, 5, 4)),
        (tasks.Classification(class_dim=-1), (3, 4, 5)),
        (tasks.Segmentation(ignore_index=-100), (3, 5, 2, 2)),
    ],
)
def test_positions_are_averaged_per_sample(task, shape, generator):
    outputs = torch.randn(shape, generator=generator)
    labels = torch.randint(5, (3, 4), generator=generator)
    labels[0, 1:] = -100
    labels[2] = -100
    last = outputs.movedim(1, -1) if shape[1] == 5 else outputs
    last = last.reshape(3, 4, 5)
    if len(shape) == 4:
        labels = labels.view(3, 2, 2)
    expected = [
        torch.stack(
            [F.cross_entropy(z, y) for z, y in zip(last[n], labels[n].flatten(), strict=True) if y >= 0]
            or [torch.zeros(())]
        ).mean()
        for n in range(3)
    ]
    torch.testing.assert_close(task.losses(outputs, (None, labels)), torch.stack(expected))
    hits, counted = task.correct(outputs, (None, labels))
    assert counted.tolist() == [1, 4, 0]
    assert hits.sum() == ((last.argmax(-1) == labels.view(3, 4)) & (labels.view(3, 4) >= 0)).sum()


def test_a_causal_model_predicts_the_next_label_and_others_their_own(generator):
    outputs, labels = torch.randn(2, 5, 7, generator=generator), torch.randint(7, (2, 5), generator=generator)
    labels[1, 3:] = -100
    batch = {"labels": labels}
    shifted = [F.cross_entropy(outputs[n, :-1], labels[n, 1:]) for n in range(2)]
    torch.testing.assert_close(tasks.CausalLM().losses(outputs, batch), torch.stack(shifted))
    own = [F.cross_entropy(outputs[n], labels[n]) for n in range(2)]
    for task in (tasks.TokenClassification(), tasks.MaskedLM(), tasks.Sequence2Sequence()):
        torch.testing.assert_close(task.losses(outputs, batch), torch.stack(own))
    assert tasks.CausalLM().scores(outputs, batch).shape == (2, 4, 7)
    assert tasks.CausalLM().counted(outputs, batch).sum() == 4 + 2


def test_labels_that_are_the_inputs_leave_padding_out():
    task = tasks.CausalLM(labels="input_ids")
    ids, mask = torch.tensor([[1, 2, 3], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    assert task.labels(batch).tolist() == [[1, 2, 3], [1, 2, -100]]
    seen = {}

    class Model(nn.Module):
        def forward(self, **given):
            seen.update(given)
            return torch.zeros(2, 3, 4)

    changed = task.with_labels(batch, torch.zeros_like(ids))
    task.forward(Model(), changed)
    assert torch.equal(seen["input_ids"], ids)
    assert "labels" not in seen
    assert task.labels(changed).sum() == 0


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("kind", [torch.long, torch.float32, torch.bool])
def test_binary_against_the_formulas(shape, kind, generator):
    outputs = torch.randn(shape, generator=generator)
    labels = torch.tensor([1, 0, 1, 1, 0]).to(kind)
    task, batch = tasks.Binary(), (None, labels)
    z = outputs.flatten()
    signs = 2 * labels.float() - 1
    torch.testing.assert_close(task.losses(outputs, batch), -F.logsigmoid(signs * z))
    torch.testing.assert_close(task.log_odds(outputs, batch), signs * z)
    assert task.correct(outputs, batch)[0].tolist() == ((z > 0) == labels.bool()).long().tolist()
    torch.testing.assert_close(task.scores(outputs, batch), torch.stack([1 - z.sigmoid(), z.sigmoid()], -1))
    other = task.labels(task.relabel(batch))
    assert other.dtype == kind
    assert (other.bool() != labels.bool()).all()


def test_multi_label_against_the_formulas(generator):
    outputs = torch.randn(4, 3, generator=generator)
    labels = torch.randint(2, (4, 3), generator=generator).float()
    labels[1, 2] = -100
    task, batch = tasks.MultiLabel(), (None, labels)
    cells = F.binary_cross_entropy_with_logits(outputs, labels.clamp(min=0), reduction="none")
    expected = cells.mean(1)
    expected[1] = cells[1, :2].mean()
    torch.testing.assert_close(task.losses(outputs, batch), expected)
    hits, counted = task.correct(outputs, batch)
    assert counted.tolist() == [3, 2, 3, 3]
    assert hits[0] == ((outputs[0] > 0) == labels[0].bool()).sum()
    other = task.labels(task.relabel(batch, generator))
    assert other[1, 2] == -100
    assert ((other != labels).any(1)).all()
    assert set(other[labels >= 0].tolist()) <= {0.0, 1.0}
    assert task.scores(outputs, batch).shape == (4, 3, 2)


def test_regression_does_not_broadcast(generator):
    outputs, labels = torch.randn(4, 1, generator=generator), torch.randn(4, generator=generator)
    expected = (outputs[:, 0] - labels).square()
    torch.testing.assert_close(tasks.Regression().losses(outputs, (None, labels)), expected)
    torch.testing.assert_close(tasks.Regression().losses(outputs, (None, labels[:, None])), expected)
    torch.testing.assert_close(
        tasks.Regression("absolute").losses(outputs, (None, labels)), (outputs[:, 0] - labels).abs()
    )
    wide = torch.randn(4, 2, generator=generator)
    assert tasks.Regression().losses(wide, (None, torch.zeros(4, 2))).shape == (4,)
    with pytest.raises(ValueError, match=r"labels must have the shape \[4, 2\]"):
        tasks.Regression().losses(wide, (None, labels))
    for needs in (lambda t: t.log_odds(outputs, (None, labels)), lambda t: t.relabel((None, labels))):
        with pytest.raises(NotImplementedError, match="Regression"):
            needs(tasks.Regression())
    with pytest.raises(NotImplementedError, match="tolerance"):
        tasks.Regression().correct(outputs, (None, labels))


def test_other_labels_are_uniform_over_the_others_and_leave_void_alone():
    labels = torch.tensor([0, 1, 2, 255]).repeat(3000).view(3000, 2, 2)
    task = tasks.Segmentation(classes=3)
    drawn = task.labels(task.relabel((None, labels), torch.Generator().manual_seed(1)))
    assert (drawn[labels == 255] == 255).all()
    assert (drawn != labels)[labels != 255].all()
    counts = torch.bincount(drawn[labels == 0], minlength=3)
    assert counts[0] == 0
    assert abs(int(counts[1]) - 1500) < 5 * math.sqrt(750)
    again = task.labels(task.relabel((None, labels), torch.Generator().manual_seed(1)))
    assert torch.equal(drawn, again)
    with pytest.raises(ValueError, match="classes must be given"):
        tasks.Classification().relabel((None, torch.tensor([0])))


@pytest.mark.parametrize("shape", [(2000, 3), (400, 5, 3)])
def test_one_of_several_labels_at_least_is_another_and_void_ones_stay(shape):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, shape, generator=generator)
    void = torch.rand(shape, generator=generator) < 0.5
    labels[void] = -100
    task = tasks.MultiLabel()
    drawn = task.labels(task.relabel((None, labels), generator))
    assert torch.equal(drawn[void], labels[void])
    differ = (drawn != labels).sum(-1)
    counted = (~void).sum(-1)
    assert (differ[counted > 0] > 0).all()
    # Of one label that counts, always that one; of more, each as often.
    assert set(drawn[~void].tolist()) == {0, 1}
    first, last = ((drawn != labels)[counted == 3][:, i].float().mean() for i in (0, 2))
    assert abs(first - last) < 0.2


def test_a_map_of_labels_may_have_an_axis_of_one_channel():
    torch.manual_seed(0)
    outputs, labels = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
    task = tasks.Segmentation()
    want = torch.stack(
        [F.cross_entropy(o.flatten(1).T, y.flatten()) for o, y in zip(outputs, labels, strict=True)]
    )
    for given in (labels, labels[:, None]):
        torch.testing.assert_close(task.losses(outputs, (None, given)), want)
    with pytest.raises(ValueError, match=r"labels must be integers \[2, 4, 5\]"):
        task.losses(outputs, (None, labels[:, :, None]))


def test_settled_tasks_know_their_classes():
    model = nn.Linear(3, 5)
    batch = (torch.zeros(2, 3), torch.tensor([0, 4]))
    assert tasks.Classification().settled(model, batch).classes == 5
    assert resolve(None).settled(model, batch).classes == 5


def test_labels_are_drawn_from_the_model(generator):
    outputs = torch.tensor([[9.0, 0.0, 0.0]]).repeat(500, 1)
    labels = torch.zeros(500, dtype=torch.long)
    labels[0] = -100
    drawn = tasks.Classification().sampled(outputs, (None, labels), generator)[1]
    assert drawn[0] == -100
    assert (drawn[1:] == 0).float().mean() > 0.95
    tempered = tasks.Classification().sampled(outputs, (None, labels), generator, temperature=100.0)[1]
    assert abs((tempered[1:] == 0).float().mean() - 0.35) < 0.1
    sure = tasks.Binary().sampled(torch.tensor([40.0, -40.0]), (None, torch.tensor([0, 1])), generator)[1]
    assert sure.tolist() == [1, 0]


@pytest.mark.parametrize("task", [tasks.Binary(), tasks.MultiLabel(), tasks.Classification()], ids=repr)
def test_a_temperature_divides_the_logits(task, generator):
    outputs = torch.randn(6, 1 if isinstance(task, tasks.Binary) else 3, generator=generator)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    batch = (None, labels[:, None].expand(-1, 3) if isinstance(task, tasks.MultiLabel) else labels)
    cooled = task.log_scores(outputs, batch, temperature=4.0)
    torch.testing.assert_close(cooled, task.log_scores(outputs / 4, batch))
    assert not torch.allclose(cooled, task.log_scores(outputs, batch))


def test_a_temperature_draws_labels_of_one_logit_more_evenly(generator):
    outputs, batch = torch.full((2000,), 4.0), (None, torch.zeros(2000, dtype=torch.long))
    drawn = tasks.Binary().sampled(outputs, batch, generator, temperature=4.0)[1]
    assert abs(drawn.double().mean() - 1 / (1 + math.exp(-1))) < 0.05


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


U, V, Y = torch.randn(4, 2), torch.randn(4, 4), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "task, batch",
    [
        (tasks.Classification(inputs=(0, 1)), (U, V, Y)),
        (tasks.Classification(inputs=(0, 1), labels=2), [U, V, Y]),
        (tasks.Classification(inputs=[(0, 0), (0, 1)]), ((U, V), Y)),
        (tasks.Classification(inputs=lambda batch: batch[0]), ((U, V), Y)),
        (tasks.Classification(inputs="left right", labels="y"), {"left": U, "right": V, "y": Y, "id": 3}),
        (tasks.Classification(labels="y"), {"left": U, "right": V, "y": Y}),
        (None, {"left": U, "right": V, "label": Y}),
        (None, ((U, V), Y)),
        (None, [[U, V], Y]),
    ],
)
def test_inputs_and_labels_are_found_where_the_task_says(task, batch):
    model = Two()
    judge = resolve(task)
    expected = F.cross_entropy(model(U, V), Y, reduction="none")
    torch.testing.assert_close(judge.loss(model, batch), expected)
    part = judge.select(batch, [2, 2, 0])
    torch.testing.assert_close(judge.loss(model, part), expected[[2, 2, 0]])
    fisher = ux.fisher_diagonal(model, [batch], task=task)
    loop = torch.zeros(3, 4).double()
    twin = copy.deepcopy(model).double()
    for n in range(4):
        twin.zero_grad()
        F.cross_entropy(twin(U[n : n + 1].double(), V[n : n + 1].double()), Y[n : n + 1]).backward()
        loop += twin.right.weight.grad.square() / 4
    torch.testing.assert_close(fisher["right.weight"].double(), loop, rtol=1e-5, atol=1e-9)
    if not callable(getattr(task, "fields", SimpleNamespace(inputs=None)).inputs):
        changed = resolve(task).with_labels(batch, torch.zeros_like(Y)) if task else None
        assert changed is None or judge.labels(changed).sum() == 0


def hugging_face(name, **config):
    config.setdefault("is_encoder_decoder", False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(**config)

    Model.__name__ = name
    return Model()


@pytest.mark.parametrize(
    "model, expected",
    [
        (hugging_face("LlamaForCausalLM"), tasks.CausalLM),
        (hugging_face("GPT2LMHeadModel"), tasks.CausalLM),
        (hugging_face("LlavaForConditionalGeneration"), tasks.CausalLM),
        (hugging_face("T5ForConditionalGeneration", is_encoder_decoder=True), tasks.Sequence2Sequence),
        (hugging_face("BertForTokenClassification"), tasks.TokenClassification),
        (hugging_face("BertForMaskedLM"), tasks.MaskedLM),
        (hugging_face("SegformerForSemanticSegmentation"), tasks.Segmentation),
        (
            hugging_face("BertForSequenceClassification", problem_type=None, num_labels=1),
            tasks.Regression,
        ),
        (
            hugging_face("BertForSequenceClassification", problem_type="multi_label_classification"),
            tasks.MultiLabel,
        ),
        (nn.Linear(2, 3), tasks.Classification),
    ],
)
def test_models_tell_their_task(model, expected):
    labels = torch.zeros(2, 3, dtype=torch.long)
    batch = {"input_ids": labels, "labels": labels} if hasattr(model, "config") else (labels, labels[:, 0])
    assert type(tasks.infer(model, batch)) is expected
    assert tasks.infer(model, batch) is tasks.infer(model, batch)


@pytest.mark.parametrize(
    "ending", ["QuestionAnswering", "PreTraining", "NextSentencePrediction", "ObjectDetection"]
)
def test_models_of_other_kinds_are_not_taken_for_classifiers(ending):
    model = hugging_face(f"BertFor{ending}")
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"task must say what BertFor{ending} predicts; pass a subclass"):
        tasks.infer(model, batch)


def test_wrappers_are_seen_through():
    inner = hugging_face("GPT2LMHeadModel")
    assert unwrapped(torch.compile(inner)) is inner
    assert type(tasks.infer(torch.compile(inner), {"labels": Y.view(2, 2)})) is tasks.CausalLM


X3 = torch.randn(4, 3)
IMAGES = [torch.randn(3, 8, 8), torch.randn(3, 6, 6)]

# What is given, and what the refusal has to name. All of these were taken for something else once.
REFUSED = {
    "regression_of_two_numbers": (nn.Linear(3, 2), (X3, torch.randn(4, 2)), r"Regression\(\)"),
    "regression_of_one_number": (nn.Linear(3, 1), (X3, torch.randn(4, 1)), r"Regression\(\)"),
    "numbers_for_classes": (nn.Linear(3, 5), (X3, torch.randn(4)), r"Regression\(\)"),
    "several_labels": (
        nn.Linear(3, 2),
        (X3, torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 1]])),
        r"MultiLabel\(\)",
    ),
    "several_labels_as_integers": (nn.Linear(3, 2), (X3, torch.ones(4, 2).long()), r"MultiLabel\(\)"),
    "one_logit_floats": (nn.Linear(3, 1), (X3, torch.ones(4, 1)), r"Binary\(\)"),
    "one_logit_integers": (nn.Linear(3, 1), (X3, torch.tensor([0, 1, 1, 0])), r"Binary\(\)"),
    "one_logit_zeros": (nn.Linear(3, 1), (X3, torch.zeros(4, dtype=torch.long)), r"Binary\(\)"),
    "booleans": (nn.Linear(3, 2), (X3, torch.ones(4, dtype=torch.bool)), r"Binary\(\)"),
    "labels_per_token": (
        nn.Embedding(5, 5),
        {"input": torch.zeros(2, 3, dtype=torch.long), "labels": torch.zeros(2, 3, dtype=torch.long)},
        r"CausalLM\(\).*TokenClassification\(\)",
    ),
    "void_pixels": (
        nn.Conv2d(3, 2, 1),
        (torch.randn(1, 3, 3, 2), torch.tensor([[[0, 255], [1, 1], [0, 0]]])),
        r"Segmentation\(ignore_index=255\)",
    ),
    "another_ignored_label": (nn.Linear(3, 2), (X3, torch.tensor([0, 1, -1, 0])), r"ignore_index=-1"),
    "a_class_too_many": (nn.Linear(3, 2), (X3, torch.tensor([0, 1, 2, 0])), r"lie in \[0, 2\)"),
    "three_tensors": (Two(), (U, V, Y), r"inputs=\(0, 1\), labels=2"),
    "ids_mask_labels": (Two(), (Y[:, None], Y[:, None], Y), r"inputs=\(0, 1\), labels=2"),
    "a_list_of_images": (
        nn.Identity(),
        (IMAGES, [{"boxes": torch.zeros(1, 4)}] * 2),
        "subclass of ux.tasks.Task",
    ),
    "images_of_many_sizes": (
        nn.Flatten(),
        (IMAGES, torch.tensor([0, 1])),
        "select and count|takes the inputs",
    ),
    "offsets": (
        nn.EmbeddingBag(9, 3),
        ((torch.arange(7), torch.tensor([0, 3])), torch.tensor([0, 1])),
        "select and count|takes the inputs",
    ),
    "as_many_classes_as_positions": (
        nn.Identity(),
        (torch.randn(2, 3, 3), torch.zeros(2, 3, dtype=torch.long)),
        "class_dim",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_with_the_task_to_pass(case):
    model, batch, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        losses.cross_entropy(model, batch)
    if any(p.requires_grad for p in model.parameters()):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            ux.fisher_diagonal(model, [batch])
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_probabilities_that_stop_adding_up_are_refused_later_too():
    model = nn.Linear(3, 2)
    one_hot, not_one = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 1.0]] * 4)
    with pytest.raises(ValueError, match="MultiLabel"):
        ux.fisher_diagonal(model, [(X3, one_hot), (X3, not_one)])


@pytest.mark.parametrize("wrong", [nn.CrossEntropyLoss(), F.cross_entropy])
def test_a_loss_of_outputs_and_targets_is_refused(wrong):
    with pytest.raises(TypeError, match=r"loss_fn\(model, batch\).*task="):
        ux.fisher_diagonal(nn.Linear(3, 2), [(X3, Y % 2)], loss_fn=wrong)
    data = [(X3, Y % 2)]
    for method in ("ssd", "finetune", "gradient_masking", "random_label"):
        with pytest.raises(TypeError, match=r"loss_fn\(model, batch\).*task="):
            ux.unlearn(method, nn.Linear(3, 2), data, data, loss_fn=wrong)


def test_a_class_in_place_of_a_task_is_refused():
    with pytest.raises(TypeError, match="call it"):
        resolve(tasks.Binary)
    with pytest.raises(ValueError, match="class_dim"):
        tasks.Classification(class_dim=2)


def test_outputs_without_labels_need_the_dimension_of_the_classes():
    outputs = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="class_dim=1"):
        tasks.Classification().scores(outputs, (outputs,))
    assert tasks.Segmentation().scores(outputs, (outputs,)).shape == (2, 4, 4, 3)
    assert tasks.Classification().scores(outputs[:, :, 0, 0], (outputs,)).shape == (2, 3)


def test_a_loss_of_ones_own_overrides_the_losses_alone():
    def own(model, batch):
        return model(batch[0])[:, 0]

    judge = resolve(tasks.Classification(), own)
    model = nn.Linear(3, 2)
    assert judge.loss is own
    torch.testing.assert_close(judge.loss(model, (X3, Y % 2)), model(X3)[:, 0])
    assert judge.correct(model(X3), (X3, Y % 2))[1].sum() == 4
    assert judge.settled(model, (X3, Y % 2)).loss is own
    assert resolve(None, own).settled(model, (X3, Y % 2)).loss is own
    # The named losses are the task's own.
    odds = resolve(tasks.Binary(), losses.log_odds)
    torch.testing.assert_close(
        odds.loss(nn.Identity(), (torch.tensor([2.0]), torch.tensor([1]))), torch.tensor([-2.0])
    )
    norm = resolve(tasks.Classification(inputs=1, labels=0), losses.logit_norm)
    torch.testing.assert_close(norm.loss(nn.Identity(), (Y, X3)), X3.square().sum(1))


def test_settings_tell_tasks_apart_and_one_object_stands_for_equal_ones():
    assert resolve(tasks.Binary()) is resolve(tasks.Binary())
    assert resolve(tasks.Binary()) is not resolve(tasks.Binary(ignore_index=-1))
    assert repr(tasks.Classification(class_dim=1, labels="y")) == (
        "Classification(class_dim=1, ignore_index=-100, labels='y')"
    )
    for task in (tasks.Segmentation(), tasks.CausalLM(), tasks.Regression("huber", tolerance=0.1)):
        assert type(task)(**task.settings()).settings() == task.settings()


class Ragged(tasks.Task):
    """Images of many sizes in a list, with a list of targets."""

    def forward(self, model, batch):
        return torch.stack([model(image[None]).mean((0, 2, 3)) for image in batch[0]])

    def losses(self, outputs, batch):
        return F.cross_entropy(outputs, torch.stack([t["label"] for t in batch[1]]), reduction="none")

    def select(self, batch, samples):
        return [batch[0][n] for n in samples], [batch[1][n] for n in samples]

    def count(self, batch):
        return len(batch[0])


def test_a_task_of_ones_own_takes_samples_its_own_way():
    task = Ragged()
    assert task.has_own_select
    batch = (IMAGES, [{"label": torch.tensor(0)}, {"label": torch.tensor(1)}])
    model = nn.Conv2d(3, 2, 1)
    assert task.loss(model, task.select(batch, [1])).shape == (1,)
    with pytest.raises(NotImplementedError, match="Ragged has no correct"):
        task.correct(None, batch)
