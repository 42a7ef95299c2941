"""What surrounds a model in practice: checkpoints, autocast, compilers, half precision, and failures."""

import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, errors, one_by_one, split
from test_engine_layers import CrossAttention
from test_engine_models import small
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bench.models import GPTLMHeadModel
from unlearn_ext import fisher_diagonal, importance, ops
from unlearn_ext.fisher import diagonal
from unlearn_ext.fisher.engine import Channels, Gradients, Product, layers

N, CLASSES = 6, 3


class Checkpointed(nn.Module):
    """Blocks whose activations are computed twice, nested as far as that goes."""

    def __init__(self, reentrant, nested=False):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8))
            for _ in range(3)
        )
        self.head = nn.Linear(8, CLASSES)
        self.calls, self.reentrant, self.nested = 0, reentrant, nested

    def block(self, block, x):
        self.calls += 1
        return x + block(x)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            run = functools.partial(self.block, block)
            if self.nested:
                run = functools.partial(checkpoint, run, use_reentrant=self.reentrant)
            x = checkpoint(run, x, use_reentrant=self.reentrant)
        return self.head(x.sum(1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant, nested):
    torch.manual_seed(0)
    model, batch = Checkpointed(False, nested), (torch.randn(N, 4, 5), torch.randint(CLASSES, (N,)))
    expected = one_by_one(model, batch)
    model.reentrant = reentrant
    found = fisher_diagonal(model, [batch])
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, expected).values()) <= 1e-5
    model.calls = 0
    fisher_diagonal(model, [batch])
    assert model.calls >= 6  # it really is computed again


def test_checkpoints_work_as_before_afterwards():
    before = torch.utils.checkpoint._checkpoint_hook, torch.utils.checkpoint.CheckpointFunction
    model, batch = Checkpointed(True), (torch.randn(N, 4, 5), torch.randint(CLASSES, (N,)))
    fisher_diagonal(model, [batch])
    with pytest.raises(RuntimeError):
        fisher_diagonal(model, [(torch.randn(N, 4, 4), batch[1])])
    assert (torch.utils.checkpoint._checkpoint_hook, torch.utils.checkpoint.CheckpointFunction) == before


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit", "gpt"])
def test_autocast(name):
    model, batch = small(name)
    with torch.autocast("cpu", torch.bfloat16):
        expected = one_by_one(model, batch, dtype=torch.float32)
        found = fisher_diagonal(model, split(batch, 4))
        assert torch.is_autocast_enabled("cpu")
    assert set(found.coverage.values()) == {"fused"}
    assert all(value.dtype == torch.float32 for value in found.values())
    assert max(errors(found, expected).values()) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit", "gpt"])
def test_half_precision(name, dtype):
    model, batch = small(name)
    model.to(dtype)
    batch = tuple(t.to(dtype) if t.is_floating_point() else t for t in batch)
    expected = one_by_one(model, batch, dtype=dtype)
    found = fisher_diagonal(model, [batch])
    assert all(value.dtype == torch.float32 for value in found.values())
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, expected).values()) <= 5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_parts_and_functions_of_parameters(dtype):
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = CrossAttention()
            self.positions = nn.Parameter(torch.randn(1, 9, 8))
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.attention(x * self.scale.exp() + self.positions[:, : x.shape[1]])

    model, batch = Model().to(dtype), (torch.randn(N, 5, 8, dtype=dtype), torch.randint(CLASSES, (N,)))
    expected = one_by_one(model, batch, dtype=dtype)
    found = fisher_diagonal(model, [batch])
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, expected).values()) <= 5e-2


def test_double_precision():
    model, (x, y) = small("vit")
    assert_exact(model.double(), (x.double(), y), tolerance=1e-12)


def test_parameters_of_several_precisions():
    torch.manual_seed(0)

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(6, CLASSES).double()

        def forward(self, x):
            return self.second(self.first(x.float()).tanh().double())

    model, batch = Casting(), (torch.randn(N, 5), torch.randint(CLASSES, (N,)))
    found = fisher_diagonal(model, [batch])
    assert {name: value.dtype for name, value in found.items()} == {
        "first.weight": torch.float32,
        "first.bias": torch.float32,
        "second.weight": torch.float64,
        "second.bias": torch.float64,
    }
    reference = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    expected = dict(zip(found, one_by_one(reference, batch).values(), strict=True))
    assert max(errors(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("part", [False, True])
def test_compiled_models(part):
    model, batch = small("mlp")
    expected = one_by_one(model, batch)
    if part:
        model[2] = torch.compile(model[2], backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    found = fisher_diagonal(model, [batch])
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, dict(zip(found, expected.values(), strict=True))).values()) <= 1e-5


def test_channels_last_models():
    model, (x, y) = small("resnet18")
    expected = one_by_one(model, (x, y))
    model = model.to(memory_format=torch.channels_last)
    found = fisher_diagonal(model, [(x.to(memory_format=torch.channels_last), y)])
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, expected).values()) <= 1e-5


@pytest.mark.parametrize("picky", [False, True])
def test_passes_run_in_channels_last_order_where_the_model_allows_it(picky):
    seen = []

    class Watching(nn.Module):
        def forward(self, x):
            seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last)))
            return x.view(len(x), -1) if picky else x.flatten(1)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), Watching(), nn.Linear(48, CLASSES))
    batch = (torch.randn(N, 2, 6, 6), torch.randint(CLASSES, (N,)))
    assert_exact(model, batch)
    assert (N, not picky) in seen


class Operators(TorchDispatchMode):
    """Notes which operators ran, and the largest tensor any of them made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        return result


def watched(model, batch, **settings):
    fisher_diagonal(model, [batch, batch], **settings)  # which are verified
    with Operators() as operators:
        fisher_diagonal(model, [batch], **settings)
    return operators


@pytest.mark.usefixtures("no_certificates")
def test_neither_weight_gradients_nor_gradients_per_sample_are_made(monkeypatch):
    monkeypatch.setattr(diagonal, "weights_fingerprint", lambda *_, **__: "none")  # reads all weights at once
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 3))
    operators = watched(model, (torch.randn(16, 100), torch.randint(3, (16,))))
    assert operators.largest == 100 * 100  # the importances themselves
    # Two products for the outputs of the last two layers' gradients; none for a weight, none below the first.
    assert operators.names.count("mm") == 2
    assert operators.names.count("addmm") == 3
    assert operators.names.count("fisher_linear_") == operators.names.count("fisher_bias_") == 3
    # Tied tables and shared layers: twenty samples' gradients of the table would be 20 times its size.
    model = GPTLMHeadModel(width=16, depth=1, heads=2, length=8, vocabulary=500)
    text = torch.randint(500, (20, 9))
    assert watched(model, (text[:, :-1], text[:, 1:])).largest <= 20 * 8 * 500  # the logits


@pytest.mark.usefixtures("no_certificates")
def test_convolutions_compute_no_weight_gradient():
    model, batch = small("cnn")
    seen = []

    class Masks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ == "convolution_backward":
                seen.append(tuple(args[-1]))
            return function(*args, **(kwargs or {}))

    fisher_diagonal(model, [batch, batch])
    with Masks():
        fisher_diagonal(model, [batch])
    assert seen == [(True, False, False)] * 3


@pytest.mark.usefixtures("no_certificates")
def test_frozen_parameters_and_those_left_out_cause_no_work():
    model, batch = small("vit")
    model.requires_grad_(False)
    model.blocks[1].requires_grad_(True)
    operators = watched(model, batch)
    assert operators.names.count("fisher_linear_") == 4
    found = assert_exact(model, batch)
    assert all(name.startswith("blocks.1") for name in found)
    model.requires_grad_(True)
    operators = watched(model, batch, params=["head.weight", "blocks.1.mlp.2.weight"])
    assert operators.names.count("fisher_linear_") == 2
    # Nothing below the second block's last layer is differentiated.
    assert not [name for name in operators.names if "attention" in name and "backward" in name]


@pytest.mark.usefixtures("no_certificates")
def test_the_graph_of_a_pass_is_gone_afterwards():
    import gc

    model, batch = small("gpt")
    fisher_diagonal(model, [batch])
    gc.collect()
    gc.disable()
    try:
        alive = {id(o) for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
        fisher_diagonal(model, [batch])
        left = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and id(o) not in alive]
    finally:
        gc.enable()
    assert not [tuple(t.shape) for t in left]


# Failures half-way ---------------------------------------------------------------------------------------


def state_of(model):
    return [
        *(module.training for module in model.modules()),
        *(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        *(p.requires_grad for p in model.parameters()),
        *(id(p.grad) for p in model.parameters()),
        *(len(p._backward_hooks or ()) for p in model.parameters()),
        *(t.tolist() for t in model.state_dict().values()),
        *(t.data_ptr() for t in model.state_dict().values()),
        torch.get_rng_state().tolist(),
    ]


class Failing(nn.Module):
    """Fails in the forward or backward pass of a whole batch, when it is told to."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.recurrent, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)
        self.error, self.where = None, None

    def maybe_fail(self, where, n):
        if self.error is not None and self.where == where and n == 4:
            raise self.error

    def forward(self, x):
        n = len(x)
        x = self.body(x).flatten(2).transpose(1, 2)
        self.maybe_fail("forward", n)
        x = self.recurrent(x)[0][:, -1]
        if self.where == "backward":
            x.register_hook(lambda grad: self.maybe_fail("backward", n))
        return self.head(x)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["forward", "backward", "data"])
def test_a_failure_leaves_no_trace(where, error):
    torch.manual_seed(0)
    model = Failing()
    model.body[1].eval()
    model.head.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)

    class Data:
        def __iter__(self):
            for _ in range(2):
                yield torch.randn(4, 1, 4, 4), torch.randint(CLASSES, (4,))
                if model.where == "data" and model.error:
                    raise model.error

    fisher_diagonal(model, Data())
    for checked_before in (True, False):
        model.error, model.where = error, where
        if not checked_before:
            model.body.append(nn.Identity())
        before = state_of(model)
        with pytest.raises(error):
            fisher_diagonal(model, Data())
        assert state_of(model) == before
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_inside_the_engine(monkeypatch, error):
    """An interrupt gets through; an error of one op in the check costs its parameter the fast way only."""
    model, batch = small("mlp")
    monkeypatch.setattr(ops, "fisher_bias_", lambda *_, **__: (_ for _ in ()).throw(error("stop")))
    before = state_of(model)
    if error is KeyboardInterrupt:
        with pytest.raises(error):
            fisher_diagonal(model, [batch])
    else:
        found = assert_exact(model, batch, fused=["0.weight", "2.weight", "4.weight"])
        assert found.coverage["0.bias"] == "fallback: ZeroDivisionError: stop; vmap"
    assert state_of(model) == before


def test_an_error_of_an_op_that_was_trusted_is_not_hidden(monkeypatch):
    """It may have written half of what it had to add."""
    model, batch = small("mlp")
    fisher_diagonal(model, [batch])
    monkeypatch.setattr(ops, "fisher_linear_", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError, match="full"):
        fisher_diagonal(model, [batch])


# Layers with rules of their own --------------------------------------------------------------------------


class Kernel(torch.autograd.Function):
    """A foreign function; autograd sees one node."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight, scale)
        return (x @ weight.mT) * scale

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        inner = grad * scale
        return (
            inner @ weight,
            inner.flatten(0, -2).mT @ x.flatten(0, -2),
            (grad * (x @ weight.mT)).flatten(0, -2).sum(0),
        )


class Foreign(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.scale = nn.Parameter(torch.rand(outputs))

    def forward(self, x):
        return Kernel.apply(x, self.weight, self.scale)


class Renamed(Foreign):
    """Keeps the forward, so the rule holds."""


class Doubled(Foreign):
    def forward(self, x):
        return 2 * super().forward(x)


def foreign_rule(layer, inputs, grad_output):
    x = inputs[0]
    return {
        "weight": Product(x, grad_output * layer.scale),
        "scale": Channels(grad_output, x @ layer.weight.mT),
    }


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(layers, "_rules", {})


@pytest.mark.parametrize("size", [(5,), (4, 5)])
@pytest.mark.parametrize("kind", [Foreign, Renamed])
def test_a_registered_layer_is_fused(rules, kind, size):
    torch.manual_seed(0)
    importance.register_layer(Foreign, foreign_rule)
    model = nn.Sequential(kind(5, 6), nn.Tanh(), kind(6, CLASSES))
    reduce = nn.Identity() if len(size) == 1 else nn.Flatten(1)
    model = nn.Sequential(model, reduce, nn.Linear(CLASSES * size[0] if len(size) > 1 else CLASSES, CLASSES))
    batch = (torch.randn(N, *size), torch.randint(CLASSES, (N,)))
    assert_exact(model, batch)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_registered_layer_used_twice_and_elsewhere(rules):
    @importance.register_layer(Foreign)
    def rule(layer, inputs, grad_output):
        terms = foreign_rule(layer, inputs, grad_output)
        return {**terms, "scale": Gradients(terms["scale"].gradients(0, len(grad_output)))}

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Foreign(4, 4)

        def forward(self, x):
            x = F.relu_(self.layer(x))
            return F.linear(self.layer(x), self.layer.weight) + self.layer.scale

    torch.manual_seed(0)
    assert_exact(Twice(), (torch.randn(N, 4), torch.randint(4, (N,))))


def test_a_subclass_with_a_forward_of_its_own_is_not_taken_for_its_base(rules):
    importance.register_layer(Foreign, foreign_rule)
    torch.manual_seed(0)
    found = assert_exact(Doubled(4, 4), (torch.randn(N, 4), torch.randint(4, (N,))), fused=False)
    assert found.coverage["weight"].startswith("fallback: no rule for KernelBackward")


@pytest.mark.parametrize(
    "rule, why",
    [
        (lambda layer, inputs, grad: {"weight": Product(inputs[0], grad)}, "disagrees with plain autograd"),
        (lambda layer, inputs, grad: {}, "the rule of Foreign leaves it out"),
        (lambda layer, inputs, grad: {"weight": Product(grad, inputs[0])}, "a gradient of shape"),
        (lambda layer, inputs, grad: layer.nothing, "AttributeError: 'Foreign' object has no attribute"),
    ],
)
def test_a_wrong_rule_falls_back(rules, rule, why):
    importance.register_layer(Foreign, rule)
    torch.manual_seed(0)
    model = nn.Sequential(Foreign(5, 6), nn.Linear(6, CLASSES))
    found = assert_exact(
        model, (torch.randn(N, 5), torch.randint(CLASSES, (N,))), fused=["1.weight", "1.bias"]
    )
    assert found.coverage["0.weight"].startswith(f"fallback: {why}")


def test_an_input_changed_in_place_is_not_believed(rules):
    class Spoiling(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer = nn.Linear(4, 4), Foreign(4, 4)

        def forward(self, x):
            x = self.first(x)
            held = x.clone()
            y = Copying.apply(held, self.layer)
            held.zero_()
            return y

    class Copying:
        @staticmethod
        def apply(x, layer):
            return layer(x)

    class Cloned(Foreign):
        def forward(self, x):
            return Kernel.apply(x.clone(), self.weight, self.scale)

    importance.register_layer(Cloned, foreign_rule)
    torch.manual_seed(0)
    model = Spoiling()
    model.layer = Cloned(4, 4)
    found = assert_exact(
        model, (torch.randn(N, 4), torch.randint(4, (N,))), fused=["first.weight", "first.bias"]
    )
    assert found.coverage["layer.weight"].startswith("fallback: an input of Cloned was changed in place")


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM", "BertForSequenceClassification"])
def test_hugging_face_models(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = kind.config_class(
        vocab_size=40,
        **{
            "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12},
            "LlamaForCausalLM": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
            "BertForSequenceClassification": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_labels": CLASSES,
            },
        }[name],
    )
    model, tokens = kind(config), torch.randint(40, (N, 8))
    labels = torch.randint(CLASSES, (N,)) if "Classification" in name else tokens
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    assert_exact(model, batch, tolerance=2e-5, fused=None)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those that were made inside."""

    def __init__(self, model):
        super().__init__()
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.memory, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.memory[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.memory = {key: value for key, value in self.memory.items() if not value[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.memory.values()))
        return result


def test_the_first_call_holds_no_second_copy_of_the_model(monkeypatch):
    monkeypatch.setattr(diagonal, "weights_fingerprint", lambda *_, **__: "none")  # reads all weights at once
    torch.manual_seed(0)
    width, depth = 128, 12
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    batches = [(torch.randn(3, width), torch.randint(width, (3,))) for _ in range(2)]
    one = 4 * width**2
    with Alive(model) as alive:
        fisher_diagonal(model, batches)
    # The importances themselves; single samples' gradients are looked at layer by layer.
    assert alive.most <= (depth + 4) * one


class Neighbours(nn.Module):
    """Adds up entries over a graph, whose matrix has no dense memory, and works in place."""

    def __init__(self, layout, is_parameter):
        super().__init__()
        matrix = (torch.eye(5) + torch.eye(5).roll(1, 0)).to_sparse(layout=layout)
        if is_parameter:
            self.graph = nn.Parameter(matrix, requires_grad=False)
        else:
            self.register_buffer("graph", matrix)
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = (self.graph @ self.first(x).T).T
        h.mul_(0.5)
        return self.head(h.tanh())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("is_parameter", [True, False])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_what_is_sparse_and_frozen_stays(layout, is_parameter):
    torch.manual_seed(0)
    model = Neighbours(layout, is_parameter)
    dense = Neighbours(layout, is_parameter)
    dense.load_state_dict(model.state_dict())
    del dense.graph
    dense.register_buffer("graph", model.graph.to_dense())
    batch = (torch.randn(6, 5), torch.arange(6) % 3)
    found = fisher_diagonal(model, [batch])
    expected = one_by_one(dense, batch)
    assert max(errors(found, expected).values()) <= 1e-5
    assert torch.equal(model.graph.to_dense(), dense.graph)
    again = fisher_diagonal(model, [batch])
    assert again.weights_digest == found.weights_digest


def test_parameters_that_are_wider_than_what_is_computed_with_them():
    """Their importances are of their own dtype; gradients come in the other."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = (nn.Parameter(torch.randn(6, *size).double()) for size in ((4,), ()))
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(F.linear(x, self.weight.float(), self.bias.float()).tanh())

    torch.manual_seed(0)
    model, x, y = Wide(), torch.randn(N, 4), torch.arange(N) % CLASSES
    found = fisher_diagonal(model, [(x, y)])
    assert set(found.coverage.values()) == {"fused"}
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in range(N):
        loss = F.cross_entropy(model(x[sample : sample + 1]), y[sample : sample + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for total, grad in zip(expected.values(), grads, strict=True):
            total += grad.square() / N
    assert found["weight"].dtype == torch.float64
    assert max(errors(found, expected).values()) <= 1e-5
