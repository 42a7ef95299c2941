"""Kronecker factors: against sums over samples, one at a time, and what is left out."""

import pytest
import torch
import torch.nn.functional as F
from methods.models import FAMILIES, GptForCausalLM, make
from test_subspace import LAYERS
from torch import nn

import unlearn_ext as ux
from unlearn_ext import KroneckerFactors, kfac_factors, losses
from unlearn_ext.fisher.kfac_layers import Factored


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Summed(nn.Module):
    """A layer and a nonlinear read-out, so that every sample and position has a gradient of its own."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = layer
        with torch.no_grad():
            self.read = nn.Parameter(torch.randn(layer(torch.zeros(shape)).flatten(1).shape[1], 3) / 4)

    def forward(self, x):
        return self.layer(x).sin().flatten(1) @ self.read


def samples_alone(model, data, call):
    """Yield what ``call(model, x, y)`` returns for every sample."""
    for x, y in data:
        for i in range(len(x)):
            yield call(model, x[i : i + 1], y[i : i + 1])


def grad_output(model, x, y):
    """The gradient of one sample's loss by the layer's output."""
    with torch.no_grad():
        output = model.layer(x)
    output.requires_grad_(True)
    loss = F.cross_entropy(output.sin().flatten(1) @ model.read, y, reduction="sum")
    return torch.autograd.grad(loss, output)[0]


BATCHED = [kind for kind in LAYERS if kind != "conv2d, one image"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", BATCHED)
def test_factors_are_sums_over_samples(kind):
    make_layer, shape = LAYERS[kind]
    layer = make_layer()
    model = Summed(layer, shape).double()
    x, y = torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64), torch.arange(2 * shape[0]) % 3
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    factors = kfac_factors(model, data, loss_fn=losses.cross_entropy)
    inputs, outputs = factors["layer"]
    form = Factored(layer)
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    groups = getattr(layer, "groups", 1)

    # The input factor: how much a change of weight and bias changes the outputs.
    if transposed:
        pixels = x.movedim(1, -1).reshape(-1, groups, x.shape[1] // groups).transpose(0, 1)
        torch.testing.assert_close(inputs.reshape(groups, *inputs.shape[-2:]), pixels.mT @ pixels)
        assert factors.n_rows["layer"] == pixels.shape[1]
    else:
        change = {name: torch.randn_like(getattr(layer, name)) for name in form.parameters}
        before = layer(x)
        matrix = form.matrix(change)
        with torch.no_grad():
            for name, value in change.items():
                getattr(layer, name).add_(value)
            expected = (layer(x) - before).square().sum()
            for name, value in change.items():
                getattr(layer, name).sub_(value)
        grams = inputs.reshape(groups, *inputs.shape[-2:])
        torch.testing.assert_close(torch.einsum("gij,gjk,gik->", matrix, grams, matrix), expected)
        out_channels = -1 if kind in ("linear", "linear, positions", "Conv1D") else 1
        assert factors.n_rows["layer"] == before.numel() // before.shape[out_channels]

    # The output factor: the bias's gradient, or the weight's where every input is 1.
    total = 0
    for i in range(len(x)):
        g = grad_output(model, x[i : i + 1], y[i : i + 1])
        if transposed:
            weight = layer.weight
            ones = torch.ones_like(x[i : i + 1])
            (found,) = torch.autograd.grad(layer(ones), weight, g)
            sums = found.reshape(groups, weight.shape[0] // groups, -1)[:, 0]
        else:
            sums = (g.flatten(0, -2).sum(0) if out_channels == -1 else g.flatten(2).sum((0, 2))).reshape(
                groups, -1
            )
        total = total + sums.unsqueeze(2) * sums.unsqueeze(1)
    torch.testing.assert_close(outputs.reshape(groups, *outputs.shape[-2:]), total)
    assert factors.n_samples == len(x)
    assert factors.coverage["read"] == "no rule for Summed"
    left = {"layer.bias": "the bias of a transposed convolution"} if transposed else {}
    for name, _ in layer.named_parameters():
        assert factors.coverage[f"layer.{name}"] == left.get(f"layer.{name}", "factored")


def test_an_embedding_has_counts_and_summed_rows():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2)).double()
    x, y = torch.tensor([[0, 2, 2], [4, 0, 2]]), torch.tensor([0, 1])
    factors = kfac_factors(model, [(x, y)], loss_fn=losses.cross_entropy)
    assert factors["0"].inputs.tolist() == [2, 0, 3, 0, 1]
    total = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(2):
        rows = model[0](x[i : i + 1]).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model[2](rows.flatten(1)), y[i : i + 1]), rows)
        total += torch.outer(g.sum((0, 1)), g.sum((0, 1)))
    torch.testing.assert_close(factors["0"].outputs, total)


def test_labels_are_drawn_from_the_tempered_distribution():
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(64, 4, dtype=torch.float64)
    data = [(x, torch.zeros(64, dtype=torch.long))]
    found = kfac_factors(model, data, generator=torch.Generator().manual_seed(3))
    p = model(x).detach().div(2).softmax(-1)
    drawn = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3)).squeeze(1)
    wanted = kfac_factors(model, [(x, drawn)], loss_fn=losses.cross_entropy)
    torch.testing.assert_close(found["0"].outputs, wanted["0"].outputs)
    assert found.gradients != wanted.gradients
    again = kfac_factors(model, data, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(found["0"].outputs, again["0"].outputs)


def test_batches_make_no_difference_and_parts_add_up():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.arange(6) % 3

    def measured(*parts):
        return kfac_factors(model, [(x[part], y[part]) for part in parts], loss_fn=losses.cross_entropy)

    whole, both = measured(slice(6)), measured(slice(1), slice(1, 6))
    left, right = measured(slice(4)), measured(slice(4, 6))
    for name, pair in whole.items():
        for other in (both, left + right, whole + right - right):
            for a, b in zip(pair, other[name], strict=True):
                torch.testing.assert_close(a, b)
        assert (left + right).n_rows == whole.n_rows
    assert (whole - left).n_samples == 2
    with pytest.raises(ValueError, match="must be smaller than the whole"):
        left - whole
    with pytest.raises(ValueError, match="of one loss"):
        left + kfac_factors(model, [(x, y)])


def test_a_file_holds_everything(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2), nn.LayerNorm(2))
    factors = kfac_factors(model, [(torch.randint(5, (4, 3)), torch.tensor([0, 1, 1, 0]))])
    factors.save(tmp_path / "factors")
    loaded = KroneckerFactors.load(tmp_path / "factors")
    assert list(loaded) == list(factors)
    assert all(
        torch.equal(a, b) for name in factors for a, b in zip(factors[name], loaded[name], strict=True)
    )
    for what in ("n_samples", "n_rows", "gradients", "coverage"):
        assert getattr(loaded, what) == getattr(factors, what)
    ux.ActivationGram({"a": torch.eye(2).double()}, 1).save(tmp_path / "gram")
    with pytest.raises(ValueError, match="KroneckerFactors"):
        KroneckerFactors.load(tmp_path / "gram")


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)], ids=["plain", "groups"])
def test_a_solve_is_that_of_the_damped_kronecker_product(shape):
    *groups, out, width = shape
    rows_in, rows_out = (torch.randn(*groups, 9, n, dtype=torch.float64) for n in (width, out))
    inputs, outputs = rows_in.mT @ rows_in, rows_out.mT @ rows_out
    factors = KroneckerFactors({"a": (inputs, outputs)}, 5, {"a": 7})
    v = torch.randn(shape, dtype=torch.float64)

    def plain(a, g, v, damping):
        a, g = a / 7, g / 5
        a = a + damping * a.trace() / len(a) * torch.eye(len(a), dtype=a.dtype)
        g = g + damping * g.trace() / len(g) * torch.eye(len(g), dtype=g.dtype)
        return torch.linalg.solve(torch.kron(g, a), v.flatten()).view(v.shape)

    for damping, keep in ((0.01, False), (0.01, True), (0.01, True), (0.1, True), (0.01, True)):
        found = factors.solve("a", v, damping=damping, keep=keep)
        parts = zip(*(t.reshape(-1, *t.shape[-2:]) for t in (inputs, outputs, v)), strict=True)
        wanted = torch.stack([plain(*part, damping) for part in parts]).view(v.shape)
        torch.testing.assert_close(found, wanted)
    # Two dampings: eigenvectors are there by now, and the first decompositions are gone.
    assert {at for _, at in factors._decompositions} == {None}


def test_a_layer_that_shows_nothing_has_no_step():
    zero = torch.zeros(2, 2, dtype=torch.float64)
    factors = KroneckerFactors({"a": (torch.eye(2).double(), zero)}, 1, {"a": 1})
    assert factors.solve("a", torch.ones(2, 2)).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="positive definite, got 0"):
        KroneckerFactors({"a": (torch.ones(2, 2).double(), torch.eye(2).double())}, 1, {"a": 1}).solve(
            "a", torch.ones(2, 2), damping=0.0
        )
    # An embedding of which one row was never looked up, its factor a diagonal.
    diagonal = KroneckerFactors(
        {"a": (torch.tensor([1.0, 0.0]).double(), torch.eye(2).double())}, 1, {"a": 1}
    )
    with pytest.raises(ValueError, match="factors of a/inputs positive definite, got 0"):
        diagonal.solve("a", torch.ones(2, 2), damping=0.0)
    assert torch.isfinite(diagonal.solve("a", torch.ones(2, 2), damping=0.1)).all()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.shared(self.shared(x).tanh()).tanh())


def test_a_layer_that_runs_twice_is_one_with_more_positions():
    model, x, y = Twice().double(), torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    factors = kfac_factors(model, [(x, y)], loss_fn=losses.cross_entropy)
    assert factors.n_rows["shared"] == 10
    total = 0
    for i in range(5):
        loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        g = torch.autograd.grad(loss, model.shared.bias)[0]
        total = total + torch.outer(g, g)
    torch.testing.assert_close(factors["shared"].outputs, total)


class Elsewhere(nn.Module):
    """Uses a layer's weight beside the layer's own call."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.first(x) + x @ self.first.weight)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


class Mixed(nn.Module):
    """Centres its samples: what one of them gets depends on the others."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.first(x - x.mean(0)))


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):  # as many steps as the probe has samples
        return self.head(self.first(x.expand(3, *x.shape)).transpose(0, 1).mean(1))


@pytest.mark.parametrize(
    "model, why",
    [
        (Elsewhere(), "used outside of its own call"),
        (nn.Sequential(Scaled(4, 3), nn.Linear(3, 3)), "not as its kind does"),
        (TimeFirst(), "leading dimension"),
    ],
    ids=["elsewhere", "subclass", "time first"],
)
def test_what_cannot_be_factored_is_named(model, why):
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    factors = kfac_factors(model, [(x, y)])
    name = "0" if isinstance(model, nn.Sequential) else "first"
    assert name not in factors
    assert why in factors.coverage[f"{name}.weight"]
    assert factors.coverage[f"{'1' if name == '0' else 'head'}.weight"] == "factored"


@pytest.mark.parametrize("dtype, is_coarse", [(torch.float32, False), (torch.bfloat16, True)])
def test_samples_are_compared_as_finely_as_their_numbers_allow(dtype, is_coarse):
    """Rounding of a half is no influence; in float32 a hundredth of a neighbour is."""

    class Leaking(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.first, self.head, self.share = nn.Linear(64, 32), nn.Linear(32, 3), share

        def forward(self, x):
            h = self.first(x).tanh()
            return self.head(h + self.share * h.roll(1, 0))

    torch.manual_seed(0)
    x, y = torch.randn(4, 64).to(dtype), torch.tensor([0, 1, 2, 0])
    factors = kfac_factors(Leaking(0.0).to(dtype), [(x, y)])
    assert set(factors.coverage.values()) == {"factored"}
    if not is_coarse:
        model = nn.Sequential(Leaking(3e-3))
        with pytest.raises(ValueError, match="its samples depend on each other"):
            kfac_factors(model, [(x, y)])


def test_samples_that_depend_on_each_other_have_no_factors():
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="got none: its samples depend on each other"):
        kfac_factors(Mixed(), [(x, y)])


def test_shared_frozen_and_attention_weights_are_named():
    tied = GptForCausalLM()
    ids = torch.randint(0, 15, (4, 6))
    batch = {"input_ids": ids, "labels": ids}
    factors = kfac_factors(tied, [batch], task=ux.tasks.CausalLM())
    assert factors.coverage["wte.weight"] == "shared: wte.weight, lm_head.weight"
    # One table of positions for all samples: its lookups are not along them.
    assert "leading dimension" in factors.coverage["wpe.weight"]
    assert {"blocks.0.qkv", "blocks.1.down"} <= set(factors)

    model, data, _ = make("vit")
    model.head.weight.requires_grad_(False)
    coverage = kfac_factors(model, data).coverage
    assert coverage["head.weight"] == "frozen"
    assert "MultiheadAttention" in coverage["blocks.0.self_attn.in_proj_weight"]
    assert "MultiheadAttention" in coverage["blocks.0.self_attn.out_proj.weight"]
    assert coverage["blocks.0.linear1.weight"] == coverage["patches.weight"] == "factored"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_as_before(family):
    model, forget, _ = make(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    task = ux.tasks.CausalLM() if family == "gpt" else None
    factors = kfac_factors(model, forget, task=task)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert set(factors.coverage) == dict(model.named_parameters()).keys()
    for inputs, outputs in factors.values():
        assert torch.linalg.eigvalsh(outputs).min() >= -1e-6 * outputs.norm()  # float32 products
        assert inputs.norm() > 0


def test_bad_calls_are_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="at least one sample"):
        kfac_factors(model, [])
    with pytest.raises(ValueError, match=r"got none: no rule for LayerNorm"):
        kfac_factors(nn.Sequential(nn.LayerNorm(2)), [(torch.randn(3, 2), torch.tensor([0, 1, 1]))])
    with pytest.raises(FloatingPointError, match="kfac_factors"):
        kfac_factors(model, [(torch.full((3, 2), torch.nan), torch.tensor([0, 1, 1]))])
    with pytest.raises(TypeError, match="float64"):
        KroneckerFactors({"a": (torch.eye(2), torch.eye(2))}, 1, {"a": 1})
    with pytest.raises(ValueError, match="n_rows of a"):
        KroneckerFactors({"a": (torch.eye(2).double(), torch.eye(2).double())}, 1, {})
    with pytest.raises(ValueError, match=r"must be \[in, in\]"):
        KroneckerFactors({"a": (torch.eye(2).double(), torch.ones(2, 3).double())}, 1, {"a": 1})


class Leading(nn.Module):
    """The first sample of a batch is seen by all of them, and itself sees none."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)) + self.body(x[:1]).expand(len(x), -1))


def test_samples_that_depend_on_the_first_are_found_out():
    torch.manual_seed(0)
    data = [(torch.randn(6, 4), torch.arange(6) % 3)]
    with pytest.raises(ValueError, match="its samples depend on each other"):
        kfac_factors(Leading(), data)
