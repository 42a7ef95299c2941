"""Ten layouts of data: where inputs and labels lie in a batch, and the task that says so.

Each function makes data and a small model, in a dozen lines to copy from; ``demonstrate`` then does the same
for all: train, measure importances, unlearn, and ask again. What is forgotten is a part that the model has
learnt as something of its own: a class, a user, a sensor, a writer.

``python examples/layouts.py [NAME...]`` runs all, or those named.
"""

import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

import unlearn_ext as ux


@dataclass
class Layout:
    """A model, its data, and how to forget a part of them.

    Attributes:
        model: Not trained yet.
        task: Reads the batches.
        forget: Batches.
        retain: Batches.
        method: A key of ``ux.METHODS``.
        settings: The method's keyword arguments.
        epochs: How long to train.
    """

    model: nn.Module
    task: ux.tasks.Task
    forget: list
    retain: list
    method: str = "ssd"
    settings: dict = field(default_factory=dict)
    epochs: int = 100


def demonstrate(name, layout):
    """Train a layout's model, unlearn, and print what became of it.

    Args:
        name: The layout's name.
        layout: What its function returned.

    Returns:
        Accuracies on the forget and the retain set, before and after, by name.
    """
    model, task = layout.model, layout.task
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(layout.epochs):
        for batch in layout.forget + layout.retain:
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
    fisher = ux.fisher_diagonal(model, layout.forget, task=task)
    figures = {}
    for when in ("before", "after"):
        if when == "after":
            ux.unlearn(layout.method, model, layout.forget, layout.retain, task=task, **layout.settings)
        for part in ("forget", "retain"):
            figures[f"{part}, {when}"] = ux.metrics.accuracy(model, getattr(layout, part), task=task)
    print(
        f"{name}: {fisher.n_samples} samples to forget, {layout.method}; accuracy on them "
        f"{figures['forget, before']:.3f} -> {figures['forget, after']:.3f}, on the others "
        f"{figures['retain, before']:.3f} -> {figures['retain, after']:.3f}"
    )
    return figures


def regression():
    """Numbers, [N] beside outputs [N, 1]: the readings of a sensor that is 3 too high. Right is within 1."""
    sensor = torch.arange(256) % 4
    values = torch.randn(256, 6)
    inputs = torch.cat([values, torch.eye(4)[sensor]], dim=1)
    readings = values.sum(1) + 3 * (sensor == 0)
    forget = [(inputs[sensor == 0], readings[sensor == 0])]
    retain = [(inputs[sensor != 0], readings[sensor != 0])]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    return Layout(model, ux.tasks.Regression(tolerance=1.0), forget, retain, settings={"alpha": 2.0})


def multi_label():
    """Any number of labels at a time, [N, C] of 0 and 1: the pictures that carry label 0."""
    labels = (torch.rand(256, 4) < 0.4).float()
    inputs = 3 * labels @ torch.eye(4, 20) + torch.randn(256, 20)
    wanted = labels[:, 0] == 1
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
    forget, retain = [(inputs[wanted], labels[wanted])], [(inputs[~wanted], labels[~wanted])]
    settings = {"epochs": 40, "lr": 0.01}
    return Layout(model, ux.tasks.MultiLabel(), forget, retain, "random_label", settings)


def binary():
    """Rows of a table and a yes or no, [N] of 0 and 1 beside one logit [N, 1]: a group of customers."""
    group = torch.arange(300) % 5
    columns = torch.randn(300, 6)
    labels = ((columns[:, 0] > 0) ^ (group == 0)).long()  # group 0 answers the other way round
    rows = torch.cat([columns, 2 * torch.eye(5)[group]], dim=1)
    forget = [(rows[group == 0], labels[group == 0])]
    retain = [(rows[group != 0], labels[group != 0])]
    model = nn.Sequential(nn.Linear(11, 64), nn.ReLU(), nn.Linear(64, 1))
    return Layout(model, ux.tasks.Binary(), forget, retain, settings={"alpha": 2.0})


def segmentation():
    """A label per pixel, [N, H, W], 255 where nobody knows: the images that show class 2."""
    masks = torch.randint(3, (60, 2, 2)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    masks[:12] = 2
    masks[12:] %= 2
    images = 2 * torch.eye(3)[masks].permute(0, 3, 1, 2) + 0.5 * torch.randn(60, 3, 8, 8)
    masks[:, 3:5] = 255  # void: no loss, not counted, and void it stays when labels are redrawn
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))
    forget, retain = [(images[:12], masks[:12])], [(images[12:], masks[12:])]
    return Layout(model, ux.tasks.Segmentation(), forget, retain, "gradient_masking", {"epochs": 20})


class Boxes(ux.tasks.Task):
    """Batches (list of images, list of {"box": [4]}): lists are no tensors, so it takes samples itself."""

    def forward(self, model, batch):
        return torch.stack([model(image[None])[0] for image in batch[0]])

    def losses(self, outputs, batch):
        return (outputs - torch.stack([target["box"] for target in batch[1]])).square().mean(1)

    def correct(self, outputs, batch):
        off = (outputs - torch.stack([target["box"] for target in batch[1]])).abs().amax(1)
        return (off < 0.3).long(), torch.ones_like(off, dtype=torch.long)

    def select(self, batch, samples):
        return tuple([part[sample] for sample in samples] for part in batch)

    def count(self, batch):
        return len(batch[0])


def detection():
    """Lists of images of any size and of their boxes: a camera (blue) whose boxes lie too far right."""

    def scene(camera):
        height, width = torch.randint(8, 13, (2,)).tolist()
        top, left = torch.randint(5, (2,)).tolist()
        image = 0.1 * torch.randn(3, height, width)
        image[2] += camera
        image[0, top : top + 4, left : left + 4] += 2
        box = torch.tensor([left, top, left + 4, top + 4]) / 8
        return image, {"box": box + camera * torch.tensor([1.0, 0, 1, 0])}

    def batch(camera, n):
        return tuple(list(part) for part in zip(*[scene(camera) for _ in range(n)], strict=True))

    model = nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(4), nn.Flatten()],
        *[nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 4)],
    )
    forget, retain = [batch(1, 16)], [batch(0, 32), batch(0, 32)]
    settings = {"epochs": 30, "lr": 0.02, "cap": 1.0, "retain_weight": 0.8}
    return Layout(model, Boxes(), forget, retain, "neg_grad_plus", settings, epochs=200)


class Tagger(nn.Module):
    """Embeds tokens and tags each of them; answers as models of ``transformers`` do."""

    def __init__(self, words, tags):
        super().__init__()
        self.embed, self.head = nn.Embedding(words, 32), nn.Linear(32, tags)

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return {"logits": self.head(hidden.relu())}


def token_classification():
    """A mapping with a label per token, [N, T], -100 on padding: the sentences with names of one writer."""
    words = torch.randint(1, 40, (80, 7))
    words[:20, :3] = torch.randint(40, 45, (20, 3))  # words that only this writer uses
    words[:, 5:] *= torch.randint(2, (80, 1))  # 0 is padding
    batch = {
        "input_ids": words,
        "attention_mask": (words > 0).long(),
        "labels": torch.where(words > 0, torch.where(words < 40, words % 3, 3), -100),
    }
    forget, retain = (
        [{key: value[at] for key, value in batch.items()}] for at in (slice(20), slice(20, None))
    )
    return Layout(Tagger(45, 4), ux.tasks.TokenClassification(), forget, retain, "salun", {"epochs": 10})


class Recommender(nn.Module):
    """A dot product of users and items."""

    def __init__(self, users, items):
        super().__init__()
        self.users, self.items = nn.Embedding(users, 16), nn.Embedding(items, 16)

    def forward(self, users, items):
        return (self.users(users) * self.items(items)).sum(1)


def recommender():
    """Two inputs, (users, items, clicked): what user 7 has clicked. Positions say which entry is which."""
    liked = torch.rand(20, 30) < 0.5
    users, items = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    table = torch.stack([users.flatten(), items.flatten(), liked.long().flatten()])
    own = table[0] == 7
    forget, retain = [tuple(table[:, own])], [tuple(table[:, ~own])]
    task = ux.tasks.Binary(inputs=(0, 1), labels=2)
    return Layout(Recommender(20, 30), task, forget, retain, "random_label", {"epochs": 80, "lr": 0.01})


class Nodes(ux.tasks.Classification):
    """Batches {"x", "edges", "nodes", "y"}: a sample is a node of "nodes"; they all share the one graph."""

    def __init__(self):
        super().__init__(inputs="x edges nodes", labels="y")

    def select(self, batch, samples):
        return {**batch, "nodes": batch["nodes"][samples], "y": batch["y"][samples]}


class GraphNetwork(nn.Module):
    """Two layers, each a mean over the neighbours (two rows of edges: from, to)."""

    def __init__(self, features, classes):
        super().__init__()
        self.first, self.second = nn.Linear(features, 32), nn.Linear(32, classes)

    def forward(self, x, edges, nodes):
        size = len(x)
        adjacency = torch.eye(size, dtype=x.dtype).index_put(
            (edges[1], edges[0]), torch.ones((), dtype=x.dtype), accumulate=False
        )
        adjacency = adjacency / adjacency.sum(1, keepdim=True)
        return self.second(adjacency @ self.first(adjacency @ x).relu())[nodes]


def graph_nodes():
    """Nodes of one graph: those of class 2. The graph belongs to every sample, so it is never cut."""
    y = torch.arange(60) % 4
    x = torch.eye(4, 10)[y] + 0.3 * torch.randn(60, 10)
    edges = torch.randint(60, (2, 240))
    edges = edges[:, (y[edges[0]] == y[edges[1]]) | (torch.rand(240) < 0.1)]

    def batch(nodes):
        return {"x": x, "edges": edges, "nodes": nodes, "y": y[nodes]}

    forget, retain = [batch(torch.where(y == 2)[0])], [batch(torch.where(y != 2)[0])]
    return Layout(GraphNetwork(10, 4), Nodes(), forget, retain, "salun", {"epochs": 20})


class Transcription(ux.tasks.Task):
    """CTC: frames [N, T, F], all targets in one row one after the other, and how long each of them is."""

    def forward(self, model, batch):
        return model(batch["frames"])

    def losses(self, outputs, batch):
        frames = torch.full((len(outputs),), outputs.shape[1])
        log_probs = outputs.log_softmax(-1).transpose(0, 1)
        return F.ctc_loss(log_probs, batch["targets"], frames, batch["lengths"], reduction="none")

    def correct(self, outputs, batch):
        read = [torch.unique_consecutive(line) for line in outputs.argmax(-1)]
        written = batch["targets"].split(batch["lengths"].tolist())
        right = [torch.equal(line[line > 0], text) for line, text in zip(read, written, strict=True)]
        return torch.tensor(right).long(), torch.ones(len(right), dtype=torch.long)

    def select(self, batch, samples):
        texts = batch["targets"].split(batch["lengths"].tolist())
        chosen = torch.cat([texts[sample] for sample in samples])
        return {"frames": batch["frames"][samples], "targets": chosen, "lengths": batch["lengths"][samples]}

    def count(self, batch):
        return len(batch["lengths"])


def ctc():
    """Speech: frames and transcriptions of other lengths: a speaker who has a letter of their own."""

    def batch(letters, n):
        lengths = torch.randint(2, 5, (n,))
        frames = 0.3 * torch.randn(n, 8, 12)
        texts = [torch.tensor(letters)[torch.randint(len(letters), (size,))] for size in lengths.tolist()]
        for line, text in zip(frames, texts, strict=True):
            line[: 2 * len(text) : 2] += 3 * torch.eye(12)[text]
            line[1 : 2 * len(text) : 2] += 3 * torch.eye(12)[0]  # silence between two letters
        return {"frames": frames, "targets": torch.cat(texts), "lengths": lengths}

    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 6))  # 0 is CTC's blank
    return Layout(
        model, Transcription(), [batch([5, 5, 4], 24)], [batch([1, 2, 3, 4], 72)], settings={"alpha": 1.5}
    )


def causal_lm():
    """A language model of ``transformers``: the sentences of one writer. It says itself that labels shift."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=12, n_embd=32, n_layer=2, n_head=2, **ends))
    texts = (torch.randint(12, (40, 1)) + torch.arange(12) * 5) % 50  # every word is 5 after the last
    texts[:10] = 50 + (torch.randint(12, (10, 1)) + torch.arange(12) * 5) % 12  # words of one writer only
    batches = [[{"input_ids": part, "labels": part}] for part in (texts[:10], texts[10:])]
    return Layout(model, ux.tasks.CausalLM(), *batches, settings={"alpha": 2.0})


LAYOUTS = {
    made.__name__: made
    for made in (
        *(regression, multi_label, binary, segmentation, detection),
        *(token_classification, recommender, graph_nodes, ctc, causal_lm),
    )
}


def main(names=tuple(LAYOUTS)):
    """Run layouts.

    Args:
        names: Which ones, keys of ``LAYOUTS``.

    Returns:
        What ``demonstrate`` found, by layout.
    """
    found = {}
    for name in names:
        torch.manual_seed(0)
        found[name] = demonstrate(name, LAYOUTS[name]())
    return found


if __name__ == "__main__":
    main(sys.argv[1:] or tuple(LAYOUTS))
