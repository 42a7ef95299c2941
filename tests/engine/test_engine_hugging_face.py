"""The per-sample engine on models of transformers: everything is read off the graph, and right."""

import contextlib
import copy
from types import MethodType

import pytest
import torch
from language_models import DECODERS, OTHERS, batch_for, make, packed_batch, trimmed
from oracle import assert_exact, errors, one_by_one, split
from torch import nn

import unlearn_ext as ux
from unlearn_ext.fisher.engine import per_sample
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss

pytest.importorskip("transformers")

# Those whose graphs have little in common; the others run with --slow in what costs a setting of its own.
KINDS = ["Llama", "GPT2", "Gemma2", "Qwen3Moe", "T5ForConditionalGeneration", "BertForMaskedLM"]
NAMES = [*DECODERS, *OTHERS]
SOME = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]


def precise(model):
    """A copy in which the definition can be computed, and the precision in which it can."""
    model = copy.deepcopy(model)
    with contextlib.suppress(ValueError, AttributeError):
        model.set_experts_implementation("eager")  # grouped products know no float64
    # Gemma's masks are not made for float64: rows that are padding come out as NaN.
    return model, torch.float32 if "Gemma2" in type(model).__name__ else torch.float64


def expected_of(model, batch):
    model, dtype = precise(model)
    task = ux.tasks.infer(model, batch)
    return one_by_one(model, batch, loss_fn=task.loss, dtype=dtype)


def assert_fused(found):
    assert set(found.coverage.values()) == {"fused"}, found.coverage


def assert_close(found, expected, tolerance=1e-5):
    wrong = {name: error for name, error in errors(found, expected).items() if not error <= tolerance}
    assert not wrong


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_padded_batches(name, side):
    if name == "WhisperForConditionalGeneration" and side == "left":
        pytest.skip("its inputs have no padding")
    model, batch = make(name), batch_for(name, side)
    found = ux.fisher_diagonal(model, [batch])
    assert_fused(found)
    assert_close(found, expected_of(model, batch))


def padded_in_some(name, count=4):
    """Batches with padding at the right, at the left, and without any."""
    torch.manual_seed(1)
    batches = []
    for index in range(count):
        batch = dict(batch_for(name, ("right", "left")[index % 2]))
        ids = batch["input_ids"]
        batch["input_ids"] = torch.where(batch["attention_mask"] == 1, (ids + index) % 20 + 3, ids)
        if index == 2:
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        batches.append(batch)
    return batches


@pytest.mark.parametrize(
    "name", ["Llama", "GPT2", "BertForSequenceClassification", "T5ForConditionalGeneration"]
)
def test_masks_that_may_be_left_out_are_no_influence_of_samples(name, monkeypatch):
    """Transformers asks whether a mask hides anything in the whole batch."""
    model, batches = make(name), padded_in_some(name)
    parts = [expected_of(model, batch) for batch in batches]
    expected = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    found = ux.fisher_diagonal(model, batches)
    assert_fused(found)
    assert_close(found, expected)
    ux.fisher_diagonal(model, batches)  # every graph has come by, and a second batch of each
    calls = []
    real = PerSampleLoss.losses

    def losses(self, batch, n, **settings):
        calls.append(n)
        return real(self, batch, n, **settings)

    monkeypatch.setattr(PerSampleLoss, "losses", losses)
    monkeypatch.setattr(per_sample, "CERTIFICATES", 0.0)
    monkeypatch.setattr(per_sample, "LayoutProof", None)
    again = ux.fisher_diagonal(model, batches)
    assert calls == [4, 4, 4, 4]  # nothing but the batches
    assert_close(again, expected)


@pytest.mark.parametrize(
    "name", ["T5ForConditionalGeneration", "WhisperForConditionalGeneration", "BartForConditionalGeneration"]
)
def test_decoders_read_what_the_model_itself_would_derive_from_the_labels(name):
    """Also where some labels do not count."""
    import transformers

    if name.startswith("Bart"):
        sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": 40}
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()
        batch = {key: torch.randint(4, 40, (4, length)) for key, length in (("input_ids", 8), ("labels", 6))}
    else:
        model, batch = make(name).eval(), dict(batch_for(name))
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, -2:] = -100
    task = ux.tasks.infer(model, batch)
    assert torch.equal(task.forward(model, batch), model(**batch).logits)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_padding_does_not_matter(name, side):
    model, batch = make(name), batch_for(name, side)
    if "position_ids" not in batch:
        batch["position_ids"] = torch.arange(8).expand(4, 8)
    samples = trimmed(batch)
    parts = [expected_of(model, sample) for sample in samples]
    expected = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    assert_close(ux.fisher_diagonal(model, [batch]), expected)
    found = ux.fisher_diagonal(model, samples)
    assert_fused(found)
    assert_close(found, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_several_documents_in_a_row(name):
    model, batch = make(name), packed_batch()
    found = ux.fisher_diagonal(model, [batch])
    assert_fused(found)
    assert_close(found, expected_of(model, batch))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", SOME)
def test_gradient_checkpointing(name, use_reentrant):
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, batch = make(name), batch_for(name)
    model.config.use_cache = False  # with one, plain autograd cannot differentiate checkpointed layers either
    expected = expected_of(model, batch)
    task = ux.tasks.infer(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    calls = []

    def counted(layer):
        plain = layer._gradient_checkpointing_func

        def checkpoint(*args, **kwargs):
            calls.append(layer)
            return plain(*args, **kwargs)

        return checkpoint

    for layer in layers:
        layer._gradient_checkpointing_func = counted(layer)

    def loss(model, batch):
        # Transformers checkpoints in training mode only; without dropout, the mode changes nothing else.
        for layer in layers:
            layer.training = True
        return task.loss(model, batch)

    found = ux.fisher_diagonal(model, [batch], loss_fn=loss)
    assert set(calls) == set(layers)
    assert_fused(found)
    assert_close(found, expected)


def loop(model, batch):
    """Single samples at the model's own precision."""
    task, total = ux.tasks.infer(model, batch), {}
    names, parameters = zip(*model.named_parameters(), strict=True)
    samples = split(batch, 1)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for sample in samples:
        grads = iter(torch.autograd.grad(task.loss(model, sample).sum(), trained, allow_unused=True))
        for name, parameter in zip(names, parameters, strict=True):
            if parameter.requires_grad:
                grad = next(grads)
                square = torch.zeros(parameter.shape) if grad is None else grad.float().square()
                total[name] = total.get(name, 0) + square / len(samples)
    return total


def assert_as_precise_as_the_loop(found, model, batch, expected):
    own = errors(loop(model, batch), expected)
    wrong = {
        name: (error, own[name])
        for name, error in errors({name: found[name] for name in expected}, expected).items()
        if not error <= 2.5 * max(own[name], 4e-3)
    }
    assert not wrong


@pytest.mark.parametrize("name", SOME)
def test_bfloat16_weights(name):
    model, batch = make(name).to(torch.bfloat16), batch_for(name)
    if "input_features" in batch:
        batch["input_features"] = batch["input_features"].bfloat16()
    found = ux.fisher_diagonal(model, [batch])
    assert_fused(found)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_as_precise_as_the_loop(found, model, batch, expected_of(model, batch))


def wrapped(model):
    """Autocast inside ``forward``, as accelerate (and so the Trainer) puts it there."""
    operations = pytest.importorskip("accelerate.utils.operations")
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = MethodType(operations.convert_outputs_to_fp32(forward), model)
    return model


@pytest.mark.parametrize("name", SOME)
def test_autocast_inside_forward(name):
    model, batch = make(name), batch_for(name)
    expected = expected_of(model, batch)
    wrapped(model)
    found = ux.fisher_diagonal(model, [batch])
    assert_fused(found)
    assert_as_precise_as_the_loop(found, model, batch, expected)


class Rows(nn.Module):
    """Takes rows of tables by an index, as Whisper's positions and experts in batched products do."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.scales = nn.Parameter(torch.randn(7))
        self.experts = nn.Parameter(torch.randn(7, 3, 4))
        self.positions = nn.Parameter(torch.randn(9, 4))
        self.shared = nn.Parameter(torch.randn(9, 4))

    def forward(self, x):
        n, length = x.shape
        h = self.table[x - 3] + self.positions[torch.arange(length).expand(n, length)]
        h = h * (1 + self.scales[x][..., None]) + self.shared[torch.tensor([1, 1, 2, -1])]
        rows = torch.bmm(self.experts[x.reshape(-1)], h.reshape(-1, 4, 1))
        return rows.view(n, length, 3).sin().mean(1)


@pytest.mark.parametrize("power", [1, 2])
def test_rows_taken_by_an_index(power):
    torch.manual_seed(0)
    batch = torch.randint(7, (5, 4)), torch.randint(3, (5,))
    assert_exact(Rows(), batch, power=power)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_experts(name, implementation):
    model, batch = make(name), batch_for(name)
    expected = expected_of(model, batch)
    model.set_experts_implementation(implementation)
    found = ux.fisher_diagonal(model, [batch])
    assert_fused(found)
    assert_close(found, expected)
