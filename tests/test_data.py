from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from unlearn_ext import data

Pair = namedtuple("Pair", ["inputs", "targets"])


class Images(Dataset):
    """Labels as torchvision keeps them; counts how often a sample is read."""

    def __init__(self, labels, target_transform=None):
        self.targets = labels
        self.target_transform = target_transform
        self.reads = 0

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        self.reads += 1
        label = int(self.targets[index])
        return torch.zeros(2), self.target_transform(label) if self.target_transform else label


class Shifted(Images):
    """Stores other labels than it gives."""

    def __getitem__(self, index):
        return index, self.targets[index] + 5


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(2, 3), torch.zeros(2))])


BATCH = (torch.zeros(2, 3), torch.zeros(2))


@pytest.mark.parametrize(
    "batches",
    [[BATCH], (BATCH, BATCH), DataLoader(TensorDataset(*BATCH)), Stream(), {BATCH: None}.keys()],
    ids=["list", "tuple", "DataLoader", "IterableDataset", "view"],
)
def test_re_iterables_pass(batches):
    assert data.check_batches(batches) is batches


@pytest.mark.parametrize(
    "once",
    [(b for b in [BATCH]), iter([BATCH]), zip([1], [2], strict=True), map(id, [1]), iter(DataLoader([1]))],
    ids=["generator", "list", "zip", "map", "DataLoader"],
)
def test_one_shot_iterators_are_refused(once):
    with pytest.raises(ValueError, match=r"forget must be re-iterable .*got a one-shot"):
        data.check_batches(once, "forget")


@pytest.mark.parametrize("dataset", [TensorDataset(*BATCH), Images([0, 1])], ids=["TensorDataset", "Images"])
def test_a_data_set_in_place_of_batches_is_refused(dataset):
    with pytest.raises(ValueError, match="wrap it in a DataLoader"):
        data.check_batches(dataset)


@pytest.mark.parametrize("wrong", [None, 3, "batches", torch.zeros(2, 3), {"x": 1}])
def test_what_is_no_iterable_of_batches_is_refused(wrong):
    with pytest.raises(TypeError, match="retain must be an iterable of batches"):
        data.check_batches(wrong, "retain")


def test_a_single_batch_in_place_of_batches_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"batch 0 must be .* got Tensor; give a single batch as \[\(inputs"):
        list(data.read_batches(BATCH, torch.device("cpu")))


def test_batches_are_moved_whatever_their_form():
    meta = torch.device("meta")
    form = (torch.zeros(2), [torch.zeros(3), {"x": torch.zeros(1), "name": "a"}], Pair(torch.zeros(2), None))
    (moved,) = data.read_batches([form], meta)
    assert [tensor.device for tensor in data.tensors_in(moved)] == [meta] * 4
    assert moved[1][1]["name"] == "a"
    assert isinstance(moved[2], Pair)
    (mapping,) = data.read_batches([{"x": torch.zeros(2)}], meta)
    assert mapping["x"].device == meta


def test_progress_shows_a_bar_wherever_it_is_asked_for(capsys):
    list(data.read_batches([BATCH], torch.device("cpu"), description="reading"))
    assert "reading" not in capsys.readouterr().err
    list(data.read_batches([BATCH], torch.device("cpu"), description="reading", progress=True))
    assert "reading" in capsys.readouterr().err


def test_samples_are_counted_and_taken_along_the_first_dimension():
    batch = {"x": torch.arange(6).view(3, 2), "labels": torch.arange(3), "scale": torch.tensor(2.0)}
    assert data.count_samples(batch) == 3
    taken = data.take_samples(batch, 1, 3)
    assert taken["x"].tolist() == [[2, 3], [4, 5]]
    assert taken["labels"].tolist() == [1, 2]
    assert taken["scale"] is batch["scale"]
    with pytest.raises(ValueError, match="leading sample dimension"):
        data.count_samples((torch.tensor(1.0), "text"))


@pytest.mark.parametrize(
    "form", [tuple, list, lambda entries: Pair(*entries)], ids=["tuple", "list", "named"]
)
def test_targets_are_replaced_in_every_tuple_form(form):
    batch = form([torch.zeros(2), torch.ones(2)])
    replaced = data.with_targets(batch, torch.full((2,), 7.0))
    assert type(replaced) is type(batch)
    assert data.targets(replaced).tolist() == [7.0, 7.0]
    assert data.targets(batch).tolist() == [1.0, 1.0]


def test_targets_are_replaced_in_a_mapping():
    batch = {"x": torch.zeros(2), "labels": torch.ones(2)}
    assert data.targets(data.with_targets(batch, torch.zeros(2))).tolist() == [0.0, 0.0]
    assert data.targets(batch).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("batch", [(torch.zeros(2),), (torch.zeros(2), "labels"), {"x": torch.zeros(2)}])
def test_a_batch_without_labels_is_refused(batch):
    with pytest.raises(ValueError, match="must hold"):
        data.targets(batch)


class Keyword(nn.Module):
    def __init__(self, encoder_decoder=False):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)

    def forward(self, x, **rest):
        self.given = set(rest)
        return SimpleNamespace(logits=x)


def test_a_mapping_is_passed_as_keywords_without_its_labels():
    model = Keyword()
    batch = {"x": torch.ones(2, 3), "mask": torch.ones(2), "labels": torch.zeros(2)}
    assert data.logits(model, batch) is batch["x"]
    assert model.given == {"mask"}


def test_an_encoder_decoder_without_decoder_inputs_gets_the_labels():
    model = Keyword(encoder_decoder=True)
    batch = {"x": torch.ones(2, 3), "labels": torch.zeros(2)}
    data.logits(model, batch)
    assert model.given == {"labels"}
    data.logits(model, {**batch, "decoder_input_ids": torch.zeros(2)})
    assert model.given == {"decoder_input_ids"}
    data.logits(model, {**batch, "decoder_inputs_embeds": torch.zeros(2)})
    assert model.given == {"decoder_inputs_embeds"}


def test_an_encoder_decoder_is_asked_for_the_inputs_of_its_decoder():
    model, asked = Keyword(encoder_decoder=True), []
    model.prepare_decoder_input_ids_from_labels = lambda labels: asked.append(labels) or labels + 1
    batch = {"x": torch.ones(2, 3), "labels": torch.zeros(2)}
    data.logits(model, batch)
    assert model.given == {"decoder_input_ids"}
    assert asked[0] is batch["labels"]
    data.logits(model, {"x": batch["x"]})  # without labels it is called as it is
    assert model.given == set()


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, "cache"), lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)],
)
def test_logits_are_found_in_the_output(wrap):
    x = torch.ones(2, 3)
    assert data.logits(lambda inputs: wrap(inputs), (x, None)) is x


def test_an_output_without_logits_is_refused():
    with pytest.raises(TypeError, match="the model must return logits, got dict"):
        data.logits(lambda inputs: {"hidden": inputs}, (torch.ones(2),))


def test_device_of_a_model_with_parameters_buffers_or_neither():
    assert data.device_of(nn.Linear(1, 1, device="meta")).type == "meta"
    assert data.device_of(nn.BatchNorm1d(1, affine=False, device="meta")).type == "meta"
    assert data.device_of(nn.ReLU()).type == "cpu"


def dataset_of(kind, labels):
    labels = torch.tensor(labels)
    rows = torch.arange(len(labels), dtype=torch.float32).view(-1, 1)
    if kind == "TensorDataset":
        return TensorDataset(rows, labels)
    if kind == "list of pairs":
        return list(zip(rows, labels, strict=True))
    if kind == "list of mappings":
        return [{"x": x, "labels": int(y)} for x, y in zip(rows, labels, strict=True)]
    if kind == "torchvision":
        return Images(labels.tolist())
    order = torch.randperm(len(labels) + 3, generator=torch.Generator().manual_seed(0))
    kept = order[: len(labels)]
    everything = torch.full((len(labels) + 3,), -1)
    everything[kept] = labels
    return Subset(TensorDataset(everything.float(), everything), kept.tolist())


KINDS = ["TensorDataset", "list of pairs", "list of mappings", "torchvision", "Subset"]


def label_of(sample):
    return int(sample["labels"] if isinstance(sample, dict) else sample[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "classes, wanted",
    [
        (2, {2}),
        ([2], {2}),
        (np.int64(2), {2}),
        (torch.tensor(2), {2}),
        ((0, 2), {0, 2}),
        ({0, 2}, {0, 2}),
        (torch.tensor([0, 2]), {0, 2}),
        (np.array([0, 2]), {0, 2}),
    ],
)
def test_split_by_class(kind, classes, wanted):
    labels = [0, 1, 2, 1, 2, 0, 3]
    dataset = dataset_of(kind, labels)
    forget, retain = data.split(dataset, classes=classes)
    assert [label_of(forget[i]) for i in range(len(forget))] == [y for y in labels if y in wanted]
    assert [label_of(retain[i]) for i in range(len(retain))] == [y for y in labels if y not in wanted]
    assert forget.dataset is dataset


@pytest.mark.parametrize(
    "ids", [[3, 0], (0, 3), {0, 3}, torch.tensor([3, 0]), np.array([0, 3]), range(0, 4, 3)]
)
def test_split_by_ids_keeps_the_order_of_the_data_set(ids):
    forget, retain = data.split(dataset_of("TensorDataset", [0, 1, 0, 1, 1]), ids=ids)
    assert list(forget.indices) == [0, 3]
    assert list(retain.indices) == [1, 2, 4]


def test_the_parts_feed_a_loader():
    forget, retain = data.split(dataset_of("list of pairs", [0, 1, 0]), classes=0)
    assert [y.tolist() for _, y in DataLoader(forget, batch_size=2)] == [[0, 0]]
    assert len(DataLoader(retain)) == 1


def test_stored_labels_spare_reading_the_samples():
    dataset = Images([0, 1, 1, 0])
    data.split(dataset, classes=1)
    assert dataset.reads == 1


def test_labels_are_those_that_indexing_gives():
    transformed = Images([0, 1, 1, 0], target_transform=lambda label: 1 - label)
    forget, _ = data.split(transformed, classes=1)
    assert list(forget.indices) == [0, 3]
    misleading = dataset_of("torchvision", [0, 1])
    misleading.__class__ = type(
        "Shifted", (Images,), {"__getitem__": lambda self, i: (i, int(self.targets[i]) + 5)}
    )
    forget, _ = data.split(misleading, classes=6)
    assert list(forget.indices) == [1]


def test_classes_may_be_names():
    forget, _ = data.split([(0, "cat"), (1, "dog")], classes="dog")
    assert list(forget) == [(1, "dog")]


PAIRS = [(0, 0), (1, 1), (2, 1)]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "exactly one of ids and classes"),
        ({"ids": [0], "classes": 1}, ValueError, "exactly one of ids and classes"),
        ({"ids": [3]}, ValueError, r"ids must lie in \[0, 3\), got 3"),
        ({"ids": [-1]}, ValueError, r"ids must lie in \[0, 3\), got -1"),
        ({"ids": [1, 1]}, ValueError, "ids must be distinct, got 1 twice"),
        ({"ids": [1.0]}, TypeError, "ids must be integers, got 1.0"),
        ({"ids": torch.tensor([True, False, True])}, TypeError, "mask.nonzero"),
        ({"ids": []}, ValueError, "the forget set must not be empty"),
        ({"ids": [0, 1, 2]}, ValueError, "the retain set must not be empty, got 3 of 3"),
        ({"classes": [0, 1]}, ValueError, "the retain set must not be empty"),
        ({"classes": []}, ValueError, "the forget set must not be empty"),
        ({"classes": 7}, ValueError, "got 7; there are 0, 1"),
        ({"classes": "cat"}, ValueError, "got 'cat'"),
    ],
)
def test_split_says_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        data.split(PAIRS, **arguments)


@pytest.mark.parametrize("dataset", [[(0, [1, 0])], [(0,)], [7], [{"x": 1}]])
def test_samples_without_one_label_cannot_be_split_by_class(dataset):
    with pytest.raises(ValueError, match="to be told apart by class"):
        data.split(dataset, classes=1)


ROWS = [{"user": "anna", "text": "a"}, {"user": "bo", "text": "b"}, {"user": "anna", "text": "c"}]


class Columns(Dataset):
    """Samples without the column, which the data set keeps beside them."""

    user = torch.tensor([4, 5, 4])

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return torch.zeros(2), index


@pytest.mark.parametrize(
    "dataset, column, classes",
    [
        (ROWS, "user", "anna"),
        (ROWS, "user", ["anna"]),
        ([tuple(row.values()) for row in ROWS], 0, "anna"),
        (Columns(), "user", 4),
        (Subset(Columns(), [2, 1, 0]), "user", [4]),
    ],
)
def test_split_by_a_column(dataset, column, classes):
    forget, retain = data.split(dataset, column=column, classes=classes)
    assert list(forget.indices) == [0, 2]
    assert list(retain.indices) == [1]


def test_split_by_a_function_of_the_sample():
    forget, _ = data.split(ROWS, where=lambda row: row["text"] > "b")
    assert list(forget) == [ROWS[2]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"column": "user"}, "exactly one of"),
        ({"column": "user", "ids": [0]}, "classes must name the values"),
        ({"column": "name", "classes": "anna"}, "must name an entry of every sample, got 'name'"),
        ({"column": "user", "classes": "eve"}, "got 'eve'; there are 'anna', 'bo'"),
        ({"where": lambda row: False}, "the forget set must not be empty"),
        ({"where": bool, "ids": [1]}, "exactly one of"),
    ],
)
def test_split_by_a_column_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.split(ROWS, **arguments)


def test_split_needs_a_map_style_data_set():
    with pytest.raises(TypeError, match="must have a length"):
        data.split(Stream(), ids=[0])
