import copy
import math

import pytest
import torch
from torch import nn

from unlearn_ext import ActivationGram, activation_gram, ops
from unlearn_ext.subspace.basis import protected
from unlearn_ext.subspace.layers import layer_of


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Conv1D(nn.Module):
    """As in Hugging Face transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 3), (4, 5)),
    "linear, positions": (lambda: nn.Linear(5, 3, bias=False), (4, 2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (4, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), (4, 2, 5, 6)),
    "conv2d, stride 2": (lambda: nn.Conv2d(2, 4, (3, 2), stride=2, padding=(1, 0)), (4, 2, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, stride=(1, 2), groups=2), (4, 4, 5, 6)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 4, 5, 6)),
    "conv2d, same": (lambda: nn.Conv2d(2, 4, (4, 3), padding="same", dilation=(1, 2)), (4, 2, 6, 5)),
    "conv2d, valid": (lambda: nn.Conv2d(2, 4, 3, padding="valid"), (4, 2, 5, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect"), (4, 2, 5, 5)),
    "conv2d, circular same": (
        lambda: nn.Conv2d(2, 4, (4, 3), padding="same", padding_mode="circular"),
        (4, 2, 6, 5),
    ),
    "conv2d, one image": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=1), (2, 2, 3, 4, 5)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), (4, 3, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 4, 3, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 2, 3, 4, 5)),
    "Conv1D": (lambda: Conv1D(3, 5), (4, 2, 5)),
}


def weight_and_gram(kind, dtype=torch.float64):
    make, shape = LAYERS[kind]
    layer = make().to(dtype)
    inputs = torch.randn(shape, dtype=dtype)
    model = nn.Sequential(layer)
    # One batch entry per sample of the batch; a single image counts its channels.
    return layer, inputs, activation_gram(model, [(inputs,)])["0"]


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_gram_tells_how_much_any_change_of_the_weight_changes_the_output(kind):
    """||output(W + D) - output(W)||^2 is the trace of D G D^T; transposed convolutions overlay outputs."""
    layer, inputs, gram = weight_and_gram(kind)
    side = layer_of(layer).side
    change = torch.randn_like(layer.weight)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight += change
        actual = (changed(inputs) - layer(inputs)).square().sum()
    grams = gram.reshape(-1, gram.shape[-1], gram.shape[-1])
    if side == "right":
        rows = change.reshape(len(grams), -1, grams.shape[-1])
        torch.testing.assert_close(torch.einsum("gij,gjk,gik->", rows, grams, rows), actual)
    elif kind == "Conv1D":
        torch.testing.assert_close(torch.einsum("ji,jk,ki->", change, gram, change), actual)
    else:
        pixels = inputs.movedim(1, -1).reshape(-1, len(grams), grams.shape[-1]).transpose(0, 1)
        torch.testing.assert_close(grams, pixels.mT @ pixels)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_change_outside_the_span_changes_no_output(kind):
    """Inputs confined to few directions leave others free: there any change goes unseen."""
    make, shape = LAYERS[kind]
    layer = make().double()
    inputs = torch.randn(shape, dtype=torch.float64)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        inputs = torch.ones_like(inputs)  # constant images: patches differ at the borders only
    elif isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        inputs[:, 1:2], inputs[:, -1:] = 2 * inputs[:, :1], 3 * inputs[:, -2:-1]
    else:
        inputs[..., 1:] = inputs[..., :1] * torch.arange(1.0, inputs.shape[-1])
    gram = activation_gram(nn.Sequential(layer), [(inputs,)])["0"]
    space = protected(gram, 1.0)
    assert space.k < space.d
    basis = space.basis.reshape(-1, *space.basis.shape[-2:])
    change = torch.randn_like(layer.weight)
    groups = len(basis)
    if layer_of(layer).side == "right":
        rows = change.reshape(groups, -1, space.d)
        change = (rows - rows @ basis @ basis.mT).reshape(change.shape)
    else:
        rows = change.reshape(groups, space.d, -1)
        change = (rows - basis @ (basis.mT @ rows)).reshape(change.shape)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        changed.weight += change
        assert change.norm() > 0.1
        torch.testing.assert_close(changed(inputs), layer(inputs), rtol=0, atol=1e-7)


def test_an_embedding_keeps_counts():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 2))
    gram = activation_gram(model, [(torch.tensor([[0, 2, 2], [4, 0, 2]]),)])
    assert gram["0"].tolist() == [2, 0, 3, 0, 1]
    assert protected(gram["0"], 0.5).basis.tolist() == [True, False, True, False, True]
    assert gram["2"].shape == (6, 6)


@pytest.mark.parametrize("call", ["positional", "keywords", "encoder", "grad"])
def test_attention_is_seen_though_it_calls_none_of_its_layers(call):
    x, memory = torch.randn(3, 4, 6), torch.randn(3, 5, 6)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x):
            if call == "keywords":
                return self.attention(query=x, key=memory, value=2 * memory)[0]
            return self.attention(x, memory, 2 * memory, need_weights=call == "grad")[0]

    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True) if call == "encoder" else Attention()
    name = "self_attn" if call == "encoder" else "attention"
    gram = activation_gram(model, [(x,)])
    third = x if call == "encoder" else memory
    value = x if call == "encoder" else 2 * memory
    for total, rows in zip(gram[name], (x, third, value), strict=True):
        rows = rows.reshape(-1, 6).double()
        torch.testing.assert_close(total, rows.T @ rows, rtol=1e-5, atol=1e-5)
    # The output projection's input, worked out from its output.
    attention = getattr(model, name).eval()
    with torch.no_grad():
        out = attention(x, third, value)[0].reshape(-1, 6).double()
        rows = torch.linalg.solve(
            attention.out_proj.weight.double(), (out - attention.out_proj.bias.double()).T
        ).T
    torch.testing.assert_close(gram[f"{name}.out_proj"], rows.T @ rows, rtol=1e-3, atol=1e-3)
    if call == "encoder":
        assert {"linear1", "linear2"} < set(gram)
    assert torch.backends.mha.get_fastpath_enabled()


def test_calls_add_up_and_what_does_not_run_has_no_entry():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(3, 3)
            self.alias = self.shared
            self.idle = nn.Linear(3, 3)

        def forward(self, x):
            return self.alias(self.shared(x))

    model, x = Twice(), torch.randn(4, 3)
    gram = activation_gram(model, [(x,)])
    with torch.no_grad():
        rows = torch.cat([x, model.shared(x)]).double()
    assert list(gram) == ["shared"]
    torch.testing.assert_close(gram["shared"], rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_batches_mappings_and_half_precision():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, input_values):
            return {"logits": self.fc(input_values)}

    x = torch.randn(7, 3)
    whole = activation_gram(Model(), [{"input_values": x, "labels": torch.zeros(7).long()}])
    pieces = activation_gram(Model(), [{"input_values": part} for part in (x[:3], x[3:3], x[3:])])
    assert whole.n_samples == pieces.n_samples == 7
    torch.testing.assert_close(whole["fc"], pieces["fc"], rtol=1e-6, atol=1e-6)
    half = activation_gram(Model().bfloat16(), [{"input_values": x.bfloat16()}])
    assert half["fc"].dtype == torch.float64
    torch.testing.assert_close(whole["fc"], half["fc"], rtol=0.05, atol=0.05)


def test_the_model_is_left_alone_also_after_a_failure():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(8, 2))
    model.train()
    model[4].eval()
    model[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    batches = [(torch.randn(3, 1, 4, 4),), (torch.randn(3, 1, 5, 5),)]
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        activation_gram(model, batches)
    activation_gram(model, batches[:1])
    assert [module.training for module in model.modules()] == flags
    assert not model[0].weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_dropout_is_off_and_batchnorm_uses_its_statistics():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2)).train()
    model[1].running_mean.fill_(1.0)
    x = torch.randn(5, 3)
    rows = ((x - 1) / math.sqrt(1 + 1e-5)).double()
    torch.testing.assert_close(activation_gram(model, [(x,)])["2"], rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_sums_and_differences_are_those_of_the_data():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.randn(20, 1, 6, 6)
    whole, part, rest = (activation_gram(model, [(rows,)]) for rows in (x, x[:8], x[8:]))
    for name, total in (part + rest).items():
        torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=1e-4)
    difference = whole - part
    assert difference.n_samples == 12
    for name, total in difference.items():
        torch.testing.assert_close(total, rest[name], rtol=1e-5, atol=1e-4)
        lowest = torch.linalg.eigvalsh(total)
        assert lowest[0] >= -1e-6 * lowest[-1]
    exact = activation_gram(model.double(), [(x.double(),)]) - activation_gram(model, [(x[:8].double(),)])
    for total in exact.values():
        values = torch.linalg.eigvalsh(total)
        assert values[0] >= -1e-9 * values[-1]
    one_more = ActivationGram({"other": torch.eye(2).double()}, 1)
    assert (part + one_more).keys() == {*part, "other"}


@pytest.mark.parametrize(
    "other, message",
    [
        (ActivationGram({"0": torch.eye(2).double()}, 1), "shapes must agree"),
        (ActivationGram({"new": torch.eye(2).double()}, 1), "must not hold more modules"),
        (ActivationGram({"0": torch.eye(3).double()}, 4), "4 of 4 samples"),
    ],
)
def test_impossible_differences(other, message):
    with pytest.raises(ValueError, match=message):
        ActivationGram({"0": torch.eye(3).double()}, 4) - other


def test_saving_and_loading(tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Flatten(), nn.Linear(2, 2))
    gram = activation_gram(model, [(torch.randn(3, 2, 3, 3),)])
    gram = gram + ActivationGram({"": torch.ones(4).double()}, 1)
    path = tmp_path / "gram.safetensors"
    gram.save(path)
    loaded = ActivationGram.load(path)
    assert list(loaded) == list(gram)
    assert loaded.n_samples == 4
    assert all(torch.equal(loaded[name], gram[name]) for name in gram)
    before = path.read_bytes()
    broken = ActivationGram({"0": torch.eye(2).double()}, 1)
    broken._tensors["0"] = None
    with pytest.raises(AttributeError):
        broken.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        ActivationGram.load(path)


def test_loading_refuses_other_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"0": torch.eye(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="must hold a saved ActivationGram"):
        ActivationGram.load(tmp_path / "other")


@pytest.mark.parametrize(
    "tensor, n, error",
    [
        (torch.eye(2), 1, TypeError),
        (torch.zeros(2, 3).double(), 1, ValueError),
        (torch.zeros(()).double(), 1, ValueError),
        (torch.eye(2).double(), 0, ValueError),
    ],
)
def test_impossible_grams(tensor, n, error):
    with pytest.raises(error, match="must be"):
        ActivationGram({"0": tensor}, n)


def test_modules_can_be_chosen():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    data = [(torch.randn(2, 3),)]
    assert list(activation_gram(model, data, modules=["2"])) == ["2"]
    assert list(activation_gram(model, data, modules="0")) == ["0"]
    with pytest.raises(ValueError, match="got '7'"):
        activation_gram(model, data, modules=["7"])
    with pytest.raises(ValueError, match="got '1', a ReLU"):
        activation_gram(model, data, modules=["1"])


def test_a_convolution_may_run_on_a_sample_at_a_time():
    class OneByOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x):
            return torch.stack([self.conv(image).mean((1, 2)) for image in x])

    torch.manual_seed(0)
    model, x, y = OneByOne(), torch.randn(4, 2, 5, 6), torch.tensor([0, 1, 2, 0])
    patches = nn.functional.unfold(x.double(), 3, padding=1).transpose(1, 2).reshape(-1, 18)
    found = activation_gram(model, [(x, y)])["conv"]
    torch.testing.assert_close(found.double(), patches.T @ patches, rtol=1e-5, atol=1e-5)


def test_what_data_must_be():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="at least one sample"):
        activation_gram(model, [])
    with pytest.raises(ValueError, match="one-shot"):
        activation_gram(model, iter([]))
    with pytest.raises(FloatingPointError, match="the inputs of 0 must be finite"):
        activation_gram(nn.Sequential(model), [(torch.tensor([[1.0, math.nan]]),)])


# Eigenvalues 64, 25, 9, 1, 1 sum up to 100; their roots 8, 5, 3, 1, 1 to 18.
@pytest.mark.parametrize(
    "energy, criterion, k",
    [
        (0.5, "energy", 1),
        (0.639, "energy", 1),
        (0.641, "energy", 2),
        (0.95, "energy", 3),
        (0.985, "energy", 4),
        (1.0, "energy", 5),
        (0.5, "singular", 2),
        (0.88, "singular", 3),
        (0.95, "singular", 5),
    ],
)
def test_the_number_of_directions_follows_the_criterion(energy, criterion, k):
    rotation = torch.linalg.qr(torch.randn(6, 6).double()).Q
    gram = rotation @ torch.diag(torch.tensor([1.0, 64, 9, 25, 1, 0]).double()) @ rotation.T
    space = protected(gram, energy, criterion)
    assert (space.k, space.d) == (k, 6)
    assert space.kept >= energy - 1e-12
    torch.testing.assert_close(space.basis.T @ space.basis, torch.eye(k).double(), rtol=0, atol=1e-12)
    order = rotation[:, [1, 3, 2, 0, 4]]
    if k <= 3:  # the last two have the same eigenvalue
        torch.testing.assert_close((order[:, :k].T @ space.basis).abs(), torch.eye(k).double())


def test_negative_eigenvalues_are_clamped_and_told():
    """A singular value decomposition would turn -60 into the second-largest direction."""
    space = protected(torch.diag(torch.tensor([90.0, -60.0, 10.0]).double()), 1.0)
    assert space.k == 2
    assert space.clamped == pytest.approx(0.6)
    assert space.basis[1].abs().max() == 0
    assert protected(torch.eye(3).double(), 1.0).clamped == 0


def test_groups_share_the_largest_number_of_directions():
    gram = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 0, 0, 0])), torch.zeros(4, 4)]).double()
    space = protected(gram, 0.5)
    assert space.basis.shape == (3, 4, 2)
    assert space.kept == pytest.approx(0.5)


def test_an_unused_layer_is_free_and_a_used_one_never_altogether_frozen_by_rounding():
    assert protected(torch.zeros(3, 3).double(), 0.95).k == 0
    rows = torch.randn(1000, 2).double() @ torch.randn(2, 5).double()
    assert protected(rows.T @ rows, 1.0).k == 2


@pytest.mark.parametrize(
    "energy, criterion", [(0.0, "energy"), (1.1, "energy"), (math.nan, "energy"), (0.5, "x")]
)
def test_settings_out_of_range(energy, criterion):
    with pytest.raises(ValueError, match="must"):
        protected(torch.eye(2).double(), energy, criterion)


def compiled():
    return pytest.importorskip("unlearn_ext._C", reason="nothing was compiled")


def stacked(dtype, basis_dtype, *shapes):
    """Gradients and orthonormal bases: shapes of gradients, with groups and rank."""
    grads, bases = [], []
    for shape, groups, rank in shapes:
        d = math.prod(shape[1:])
        basis = torch.linalg.qr(torch.randn(groups, d, max(rank, 1), dtype=torch.float64))[0][..., :rank]
        grads.append(torch.randn(shape, dtype=torch.float64).to(dtype))
        bases.append((basis if groups > 1 else basis[0]).to(basis_dtype))
    return grads, bases


@pytest.mark.parametrize("onto", [False, True], ids=["out", "onto"])
@pytest.mark.parametrize(
    "dtype, basis_dtype, tolerance",
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 2e-2),
        (torch.float16, torch.float16, 4e-3),
    ],
    ids=str,
)
def test_what_a_gpu_does_to_project(dtype, basis_dtype, tolerance, onto):
    # Small layers of one shape go together; the last two are multiplied where they are.
    shapes = [((6, 4, 3), 1, 5), ((6, 4, 3), 1, 5), ((6, 12), 2, 3), ((6, 4, 3), 1, 5), ((3, 7), 1, 0)]
    shapes += [((300, 900), 1, 40), ((300, 900), 1, 40)]
    grads, bases = stacked(dtype, basis_dtype, *shapes)
    bases[1] = torch.stack([bases[1]] * 2, -1)[..., 0]  # every other scalar
    bases[5] = bases[5].T.contiguous().T
    expected = [
        ops.project_onto(g, b) if onto else ops.project_out(g, b) for g, b in zip(grads, bases, strict=True)
    ]
    places = [g.data_ptr() for g in grads]
    compiled()._project_by_library(grads, bases, onto)
    assert [g.data_ptr() for g in grads] == places
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, atol=tolerance, rtol=tolerance)


def test_a_gpu_projects_gradients_that_are_not_dense():
    (grad,), (basis,) = stacked(torch.float32, torch.float32, ((8, 6), 1, 2))
    wide = torch.zeros(8, 12)
    view = wide[:, ::2].copy_(grad)
    compiled()._project_by_library([view], [basis], False)
    torch.testing.assert_close(view, ops.project_out(grad, basis))
    assert not wide[:, 1::2].any()


def test_the_door_for_that_refuses_what_the_others_hand_on():
    project, basis = compiled()._project_by_library, torch.eye(4)[:, :2]
    for grad in (torch.zeros(3, 4, device="meta"), torch._neg_view(torch.zeros(3, 4))):
        with pytest.raises(NotImplementedError, match="_project_by_library: tensors must be plain"):
            project([grad], [basis], False)
    with pytest.raises(ValueError, match="bases must have 1 tensors like grads, got 0"):
        project([torch.zeros(3, 4)], [], False)
