"""The table of docs/support.md: what works on models of many makes, against the same network as it is."""

import copy
import dataclasses
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import unlearn_ext as ux
from unlearn_ext._internal.names import parameters_by_name

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def trained():
    """A small network, and batches of 4 classes."""
    torch.manual_seed(0)
    y = torch.randint(4, (160,))
    x = torch.randn(160, 8) + 3 * torch.eye(4, 8)[y]
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    half = copy.deepcopy(model)
    with torch.no_grad():
        for p in half.parameters():
            p *= 0.5
    fresh = torch.randn(80, 8) + 3 * torch.eye(4, 8)[y[:80]]
    return model, {
        "forget": [(x[y == 1], y[y == 1])],
        "retain": [(x[y != 1], y[y != 1])],
        "some": [(x[:10], y[:10])],
        "others": [(x[10:], y[10:])],
        "validation": [(fresh, y[:80])],
        "half": half,
    }


def generator():
    return torch.Generator().manual_seed(0)


def weights(model):
    return {name: p.detach().float().clone() for name, p in parameters_by_name(model).items()}


def fisher_diagonal(model, data):
    return dict(ux.fisher_diagonal(model, data["forget"]).items())


def ssd(model, data):
    assert ux.ssd(model, data["forget"], data["retain"]).reached
    return weights(model)


def newton(model, data):
    settings = {"until": 0.9, "budget": 0.2, "validation_budget": 0.2, "generator": generator()}
    result = ux.newton(model, data["some"], data["others"], validation=data["validation"], **settings)
    assert result.reached
    return weights(model)


def masking(model, data):
    ux.gradient_masking(model, data["forget"], data["retain"], epochs=2, generator=generator())
    return weights(model)


def logits_of(outputs):
    return outputs["out"] if isinstance(outputs, dict) else outputs


def optimizer(model, data):
    before, draw = weights(model), generator()
    masks = {n: torch.rand(p.shape, generator=draw) < 0.5 for n, p in parameters_by_name(model).items()}
    for mask in masks.values():
        mask.view(-1)[0] = True
    own = ux.optim.MaskedAdamW(model.named_parameters(), lr=0.01, masks=masks)
    for _ in range(2):
        own.zero_grad()
        for x, y in data["retain"]:
            F.cross_entropy(logits_of(model(x)).float(), y).backward()
        ux.optim.clip_grad_norm_(model.named_parameters(), 0.1, masks)
        own.step()
    after = weights(model)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert bool((after[name][mask] != before[name][mask]).any())
    return after


def metrics(model, data):
    figures = [ux.metrics.accuracy(model, data["others"])]
    sets = {"forget": data["forget"], "retain": data["retain"], "test": data["validation"]}
    figures.append(ux.metrics.mia(model, **sets).auc)
    figures.append(ux.metrics.js_divergence(model, data["half"], data["validation"]))
    figures += ux.metrics.layer_distance(model, data["half"]).values()
    return {"figures": torch.tensor(figures)}


JOBS = (fisher_diagonal, ssd, newton, masking, optimizer, metrics)


class Checkpointed(nn.Sequential):
    """Recomputes its first layers in every backward pass, also in eval mode."""

    is_reentrant = False

    def forward(self, x):
        if self.is_reentrant and torch.is_grad_enabled():
            x = x.detach().requires_grad_()
        hidden = checkpoint(lambda h: self[2](self[1](self[0](h))), x, use_reentrant=self.is_reentrant)
        return self[4](self[3](hidden))


class Reentrant(Checkpointed):
    is_reentrant = True


class Autocast(nn.Sequential):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Bfloat16(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.to(torch.bfloat16)

    def forward(self, x):
        return super().forward(x.bfloat16())


class Segmenter(nn.Sequential):
    """Answers as torchvision's segmentation models do."""

    def forward(self, x):
        logits = super().forward(x)
        return OrderedDict(out=logits, aux=0.5 * logits)


def compiled(model):
    return torch.compile(model, backend="aot_eager")


def lightning(model):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def forward(self, x):
            return nn.Sequential.forward(self, x)

        __iter__ = nn.Sequential.__iter__

    module = Module()
    module._modules.update(model._modules)
    return module


def accelerated(precision):
    def wrap(model):
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(True)
        return accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(model)

    return wrap


MAKES = {
    "compiled": compiled,
    "checkpointed": lambda model: Checkpointed(*model),
    "reentrant": lambda model: Reentrant(*model),
    "autocast": lambda model: Autocast(*model),
    "bfloat16": lambda model: Bfloat16(*model),
    "accelerate": accelerated("no"),
    "accelerate, bf16": accelerated("bf16"),
    "lightning": lightning,
    "torchvision": lambda model: Segmenter(*model),
}
# The largest error of any tensor, as a share of its norm; what is decided on a figure may fall otherwise in
# half precision, where only what the job itself asserts is asked.
EXACT = 1e-5
HALF = {"autocast": 0.1, "bfloat16": 0.1, "accelerate, bf16": 0.1}
DECIDES = (ssd, newton, masking)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.__name__)
@pytest.mark.parametrize("make", MAKES)
def test_a_model_is_what_is_in_it(trained, make, job):
    plain, data = trained
    expected = job(copy.deepcopy(plain), data)
    found = job(MAKES[make](copy.deepcopy(plain)), data)
    assert found.keys() == expected.keys()
    if make in HALF and job in DECIDES:
        return
    for name, value in expected.items():
        error = float((found[name].float() - value).norm()) / max(float(value.norm()), 1e-9)
        assert error <= HALF.get(make, EXACT), name


@pytest.fixture
def one_rank(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_model_in_ddp(trained, one_rank):
    """Of one rank; tests/distributed has many, beside one process with all data."""
    plain, data = trained

    def wrapped():
        return nn.parallel.DistributedDataParallel(copy.deepcopy(plain))

    for job in (fisher_diagonal, optimizer, metrics):
        expected, found = job(copy.deepcopy(plain), data), job(wrapped(), data)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=name)
    sets = data["forget"], data["retain"]
    alone, together = copy.deepcopy(plain), wrapped()
    ux.ssd(alone, *sets, alpha=1.0)
    ux.ssd(together, *sets, alpha=1.0, process_group=one_rank)
    assert all(torch.equal(value, weights(together)[name]) for name, value in weights(alone).items())
    before = weights(together)
    for call in (
        lambda: ux.ssd(together, *sets),
        lambda: ux.newton(together, *sets, validation=data["validation"]),
        lambda: ux.gradient_masking(together, *sets),
    ):
        with pytest.raises(
            NotImplementedError, match=r"must not be wrapped in .*; pass what it wraps, model\.module"
        ):
            call()
    assert all(torch.equal(value, before[name]) for name, value in weights(together).items())


@pytest.mark.parametrize("name, size", [("test_resnet", 32), ("test_efficientnet", 32), ("test_vit", 160)])
def test_models_of_timm(name, size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, in_chans=1).eval()
    x, y = torch.randn(12, 1, size, size), torch.arange(12) % 4
    found = ux.fisher_diagonal(model, [(x[:3], y[:3])])
    assert set(found.coverage.values()) == {"fused"}
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image, label in zip(x[:3], y[:3], strict=True):
        loss = F.cross_entropy(model(image[None]), label[None])
        for key, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[key] += grad.square() / 3
    for key, value in total.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4 * float(value.max()), msg=key)
    if name != "test_resnet":
        return
    data = {"some": [(x[:6], y[:6])], "others": [(x[6:], y[6:])], "validation": [(x, y)]}
    data |= {"forget": data["some"], "retain": data["others"]}
    for job in (masking, optimizer):
        job(copy.deepcopy(model), data)
    other, sets = copy.deepcopy(model), {"validation": data["validation"]}
    budgets = dict.fromkeys(("budget", "validation_budget", "class_budget"), 1.0)
    head = "fc.weight"
    result = ux.newton(
        other, *(data[name] for name in ("some", "others")), **sets, **budgets, generator=generator(),
        until=lambda found: not torch.equal(weights(found)[head], weights(model)[head]),
    )  # fmt: skip
    assert result.reached


# Frozen weights in a form of their own, and trainable adapters beside them.


class Base(nn.Module):
    """Frozen weights, int8 or the same numbers in float32, and a low-rank part beside them."""

    def __init__(self, layer, dtype):
        super().__init__()
        self.register_buffer("scale", layer.weight.detach().abs().max() / 127)
        codes = (layer.weight.detach() / self.scale).round()
        self.weight = nn.Parameter(codes.to(dtype), requires_grad=False)
        self.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        sizes = (layer.in_features, 3), (3, layer.out_features)
        self.down, self.up = (nn.Linear(*size, bias=False) for size in sizes)

    def forward(self, x):
        return F.linear(x, self.weight.float() * self.scale, self.bias) + self.up(self.down(x))


def adapted(model, dtype):
    torch.manual_seed(1)
    return nn.Sequential(*(Base(part, dtype) if isinstance(part, nn.Linear) else part for part in model))


def one_shot(model, data):
    ux.ssd(model, data["forget"], data["retain"], alpha=1.0)
    return weights(model)


def some_newton(model, data):
    budgets = {"budget": 1.0, "validation_budget": 1.0, "class_budget": 1.0}
    before = weights(model)["0.up.weight"]

    def moved(model):
        return bool((weights(model)["0.up.weight"] - before).norm() > 0.05 * before.norm())

    settings = {"until": moved, "generator": generator(), **budgets}
    ux.newton(model, data["some"], data["others"], validation=data["validation"], **settings)
    return weights(model)


def adapters_optimizer(model, data):
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masks = {n: torch.arange(p.numel()).view(p.shape) % 2 == 0 for n, p in trainable.items()}
    own = ux.optim.MaskedAdamW(model.named_parameters(), lr=0.01, masks=masks)
    for x, y in data["retain"]:
        F.cross_entropy(model(x), y).backward()
    own.step()
    return weights(model)


@pytest.mark.parametrize("job", [fisher_diagonal, one_shot, some_newton, masking, adapters_optimizer])
def test_adapters_on_quantised_weights(trained, job):
    plain, data = trained
    expected, found = (
        job(adapted(copy.deepcopy(plain), dtype), data) for dtype in (torch.float32, torch.int8)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)
    if job is not fisher_diagonal:
        before = weights(adapted(copy.deepcopy(plain), torch.float32))
        assert {name for name in found if not torch.equal(found[name], before[name])}


def test_the_closed_loop_on_quantised_weights(trained):
    plain, data = trained
    model = adapted(copy.deepcopy(plain), torch.int8)
    codes = model[0].weight.clone()
    result = ux.ssd(model, data["forget"], data["retain"])
    assert result.reached is not None  # either way: bytes are watched as other weights are
    assert torch.equal(model[0].weight, codes)


def test_quantised_weights_themselves_are_refused(trained):
    plain, data = trained
    frozen = adapted(copy.deepcopy(plain), torch.int8).requires_grad_(False)
    before = weights(frozen)
    for call in (
        lambda: ux.fisher_diagonal(frozen, data["forget"]),
        lambda: ux.ssd(frozen, data["forget"], data["retain"]),
        lambda: ux.newton(frozen, data["some"], data["others"], validation=data["validation"]),
        lambda: ux.gradient_masking(frozen, data["forget"], data["retain"]),
    ):
        with pytest.raises(
            ValueError, match=r"trainable parameter, got none|can be covered, got none: frozen"
        ):
            call()
    assert all(torch.equal(value, before[name]) for name, value in weights(frozen).items())


# Batches that are objects, as those of PyG.


@dataclasses.dataclass
class Graphs:
    x: torch.Tensor  # [nodes, features]
    edge_index: torch.Tensor  # [2, edges]
    batch: torch.Tensor  # [nodes], the graph of each
    y: torch.Tensor  # [graphs]

    @property
    def num_graphs(self):
        return len(self.y)

    def to(self, device):
        return Graphs(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))


class GraphTask(ux.tasks.Classification):
    """One label per graph; the five methods are what a batch of a kind of its own takes."""

    def forward(self, model, batch):
        return model(batch.x, batch.edge_index, batch.batch)

    def labels(self, batch):
        return batch.y

    def with_labels(self, batch, labels):
        return dataclasses.replace(batch, y=labels)

    def count(self, batch):
        return batch.num_graphs

    def select(self, batch, samples):
        parts = []
        for sample in samples:
            nodes = (batch.batch == sample).nonzero().flatten()
            edges = batch.edge_index[:, batch.batch[batch.edge_index[0]] == sample]
            parts.append((batch.x[nodes], edges - nodes[0], batch.y[sample]))
        return graphs(parts)


def graphs(parts):
    sizes = torch.tensor([len(x) for x, _, _ in parts])
    starts = sizes.cumsum(0) - sizes
    edges = torch.cat([edges + start for (_, edges, _), start in zip(parts, starts, strict=True)], 1)
    owners = torch.arange(len(parts)).repeat_interleave(sizes)
    return Graphs(torch.cat([x for x, _, _ in parts]), edges, owners, torch.stack([y for _, _, y in parts]))


class GraphNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x, edge_index, batch):
        for layer in (self.first, self.second):
            x = layer(x + torch.zeros_like(x).index_add(0, edge_index[1], x[edge_index[0]])).relu()
        n = int(batch.max()) + 1
        total = torch.zeros(n, x.shape[1], dtype=x.dtype).index_add(0, batch, x)
        return self.head(total / torch.bincount(batch, minlength=n).unsqueeze(1))


@pytest.fixture(scope="module")
def of_graphs():
    torch.manual_seed(0)

    def made(label):
        n = int(torch.randint(3, 7, ()))
        return (
            torch.randn(n, 6) + 2 * torch.eye(3, 6)[label],
            torch.randint(n, (2, 2 * n)),
            torch.tensor(label),
        )

    sets = {name: [made(label) for label in labels for _ in range(20)] for name, labels in SETS.items()}
    data = {name: [graphs(parts[::2]), graphs(parts[1::2])] for name, parts in sets.items()}
    model, task = GraphNetwork(), GraphTask()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        for batch in data["forget"] + data["retain"]:
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
    return model, data


SETS = {"forget": [1], "retain": [0, 2], "validation": [0, 1, 2]}


def test_graphs_importances(of_graphs):
    model, data = of_graphs
    task = GraphTask()
    found = ux.fisher_diagonal(model, data["forget"], task=task)
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    for batch in data["forget"]:
        for sample in range(batch.num_graphs):
            loss = task.loss(model, task.select(batch, [sample])).sum()
            for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
                total[name] += grad.double().square() / 20
    for name, value in total.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-6 * float(value.max()))


@pytest.mark.parametrize("method", ["ssd", "newton", "gradient_masking"])
def test_graphs_are_forgotten(of_graphs, method):
    model, data = copy.deepcopy(of_graphs[0]), of_graphs[1]
    task = GraphTask()
    settings = {
        "ssd": {},
        "newton": {
            "validation": data["validation"],
            "until": 0.5,
            "budget": 0.3,
            "validation_budget": 1.0,
            "class_budget": 1.0,
        },
        "gradient_masking": {"epochs": 80, "density": 0.5, "lr": 0.03},
    }[method]
    before = ux.metrics.accuracy(model, data["forget"], task=task)
    ux.unlearn(method, model, data["forget"], data["retain"], task=task, generator=generator(), **settings)
    after, kept = (ux.metrics.accuracy(model, data[name], task=task) for name in ("forget", "retain"))
    assert before >= 0.9
    assert after <= 0.5
    assert kept >= 0.7


def test_the_page_names_tests_that_there_are():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "support.md").read_text(encoding="utf-8")
    file, found = "", []
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(\w+)`", page):
        file = path or file
        found.append((file, name))
    assert len(found) > 30
    missing = [
        pair for pair in found if f"def {pair[1]}(" not in (root / pair[0]).read_text(encoding="utf-8")
    ]
    assert not missing
