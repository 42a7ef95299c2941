"""What runs on every rank in test_sharded_*.py."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from sharded_models import blocks_of, images, language_model, shard, shares, small, texts

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from oracle import errors, one_by_one

import unlearn_ext as ux
from unlearn_ext._internal.fingerprint import weights_fingerprint


def whole(importance):
    """Importances gathered on every rank."""
    return {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in importance.items()}


def own(parts):
    return parts[dist.get_rank()]


def all_of(parts):
    return [batch for part in parts for batch in part]


def loop_over(model, batches, loss, power, dtype=torch.float64):
    """The loop over single samples, of batches of several sizes."""
    sizes = [len(next(ux.data.tensors_in(batch))) for batch in batches]
    found = [one_by_one(model, batch, loss, power, dtype) for batch in batches]
    total = sum(sizes)
    return {
        name: sum(n * each[name] for n, each in zip(sizes, found, strict=True)) / total for name in found[0]
    }


def assert_as_alone(
    model, sharded, parts, *, fused=True, tolerance=1e-5, power=2, loss_fn=None, dtype=torch.float64
):
    """The sharded model's importances are those of one float64 loop over all ranks' samples."""
    found = ux.fisher_diagonal(sharded, own(parts), power=power, loss_fn=loss_fn)
    batches = all_of(parts)
    is_text = isinstance(batches[0], dict)
    loss = loss_fn or (ux.tasks.CausalLM().loss if is_text else ux.losses.cross_entropy)
    expected = loop_over(model, batches, loss, power, dtype)
    worst = errors(whole(found), expected, power)
    wrong = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not wrong, wrong
    assert found.n_samples == sum(len(next(ux.data.tensors_in(batch))) for batch in batches)
    assert found.n_batches == len(batches)
    if fused is True:
        assert set(found.coverage.values()) == {"fused"}, found.coverage
    elif fused is not None:
        assert {name for name, how in found.coverage.items() if how != "fused"} == set(fused), found.coverage
    parameters = dict(sharded.named_parameters())
    for name, tensor in found.items():
        if hasattr(parameters[name], "placements"):
            assert tensor.placements == parameters[name].placements
            assert tensor.to_local().shape == parameters[name].to_local().shape
    assert found.weights_digest == weights_fingerprint(model)
    return max(worst.values())


def language(kind, settings=None, sharding=None, **checks):
    model = language_model(kind, **(settings or {}))
    parts = shares(texts, dist.get_world_size())
    sharded = shard(copy.deepcopy(model), **(sharding or {}))
    return assert_as_alone(model, sharded, parts, **checks)


def mesh_of(shape):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=("replicate", "shard")[-len(shape) :])


def language_hsdp(shape):
    return language("llama", {"tie_word_embeddings": True}, {"mesh": mesh_of(shape)})


def language_checkpointed(use_reentrant):
    model = language_model("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    sharded = shard(copy.deepcopy(model))
    return assert_as_alone(model, sharded, shares(texts, dist.get_world_size()))


def language_wrapped_in_checkpoints():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model = language_model("gpt2")
    sharded = copy.deepcopy(model)
    blocks = set(blocks_of(sharded))
    apply_activation_checkpointing(sharded, check_fn=lambda module: module in blocks)
    sharded = shard(sharded)
    found = ux.fisher_diagonal(sharded, own(shares(texts, dist.get_world_size())))
    expected = loop_over(model, all_of(shares(texts, dist.get_world_size())), ux.tasks.CausalLM().loss, 2)
    names = [name.replace("_checkpoint_wrapped_module.", "") for name in found]
    values = dict(zip(names, whole(found).values(), strict=True))
    worst = max(errors(values, expected).values())
    assert worst <= 1e-5
    assert set(found.coverage.values()) == {"fused"}
    return worst


def language_bf16():
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = language_model("llama")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    sharded = shard(copy.deepcopy(model), mp_policy=policy)
    parts = shares(texts, dist.get_world_size())
    found = ux.fisher_diagonal(sharded, own(parts))
    half = copy.deepcopy(model).to(torch.bfloat16)
    loss = ux.tasks.CausalLM().loss
    expected = loop_over(half, all_of(parts), loss, 2, torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert set(found.coverage.values()) == {"fused"}, found.coverage
    worst = {
        name: float((value - expected[name]).norm() / expected[name].norm())
        for name, value in whole(found).items()
    }
    assert max(worst.values()) <= 5e-2, worst
    return max(worst.values())


def language_gathered_throughout():
    return language("llama", {}, {"reshard_after_forward": False})


def language_offloaded():
    from torch.distributed.fsdp import CPUOffloadPolicy

    return language("llama", {}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def moe():
    model = language_model("moe")
    sharded = shard(copy.deepcopy(model))
    parts = shares(texts, dist.get_world_size())
    return assert_as_alone(model, sharded, parts, fused=None, dtype=torch.float32)


def uneven(power=2):
    model = small()
    return assert_as_alone(
        model, shard(copy.deepcopy(model)), shares(images, dist.get_world_size()), power=power
    )


def uneven_in_float64():
    model = small().double()
    parts = [[(x.double(), y) for x, y in part] for part in shares(images, dist.get_world_size())]
    return assert_as_alone(model, shard(copy.deepcopy(model)), parts, tolerance=1e-12)


def without_data_on_a_rank():
    model = small()
    parts = shares(images, dist.get_world_size(), [[3, 2], [], [1]])
    return assert_as_alone(model, shard(copy.deepcopy(model)), parts)


def ignored_and_frozen():
    from torch.distributed.fsdp import fully_shard

    model = small()
    model.body[1].bias.requires_grad_(False)
    sharded = copy.deepcopy(model)
    fully_shard(sharded.body)
    fully_shard(sharded, ignored_params={sharded.scale})
    return assert_as_alone(model, sharded, shares(images, dist.get_world_size()))


def sharded_along_the_second_dimension():
    from torch.distributed.tensor import Shard

    world = dist.get_world_size()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(25, 4 * world), torch.nn.ReLU(), torch.nn.Linear(4 * world, 5)
    )
    parts = [[(x.flatten(1), y) for x, y in part] for part in shares(images, world)]

    def place(parameter):
        return Shard(1) if parameter.ndim == 2 and parameter.shape[1] % world == 0 else None

    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(copy.deepcopy(model), shard_placement_fn=place)
    return assert_as_alone(model, sharded, parts)


def some_parameters():
    model = small()
    sharded, parts = shard(copy.deepcopy(model)), shares(images, dist.get_world_size())
    full = whole(ux.fisher_diagonal(sharded, own(parts)))
    some = ux.fisher_diagonal(sharded, own(parts), params=["head.weight", "stem.0.bias"])
    assert list(some) == ["stem.0.bias", "head.weight"]
    for name, tensor in whole(some).items():
        assert torch.allclose(tensor, full[name], rtol=1e-5, atol=0)


def drawn_targets():
    # Each rank's draws are its own; the same generators on one process draw the same.
    model = small()
    sharded, parts = shard(copy.deepcopy(model)), shares(images, dist.get_world_size())
    rank = dist.get_rank()
    found = ux.fisher_diagonal(
        sharded, own(parts), estimator="mc", generator=torch.Generator().manual_seed(rank)
    )
    pooled = None
    for other, part in enumerate(parts):
        one = ux.fisher_diagonal(model, part, estimator="mc", generator=torch.Generator().manual_seed(other))
        pooled = one if pooled is None else pooled + one
    worst = max(errors(whole(found), dict(pooled)).values())
    assert worst <= 1e-5
    assert (found.estimator, found.n_samples) == ("mc", pooled.n_samples)
    return worst


def as_it_was():
    model = small().train()
    model.stem[1].eval()
    sharded, parts = shard(model), shares(images, dist.get_world_size())
    sharded(own(parts)[0][0])  # the root stays gathered after this
    flags = [module.training for module in sharded.modules()]
    before = {name: t.full_tensor().clone() for name, t in _shards(sharded).items()}
    buffers = {name: t.clone() for name, t in sharded.named_buffers()}
    found = [ux.fisher_diagonal(sharded, own(parts)) for _ in range(2)]
    assert flags == [module.training for module in sharded.modules()]
    for name, tensor in _shards(sharded).items():
        assert torch.equal(tensor.full_tensor(), before[name])
        assert tensor.grad is None
    for name, tensor in sharded.named_buffers():
        assert torch.equal(tensor, buffers[name])
    for name, tensor in found[0].items():  # the same bits from run to run
        assert torch.equal(tensor.to_local(), found[1][name].to_local())
    loss = torch.nn.functional.cross_entropy(sharded(own(parts)[0][0]), own(parts)[0][1])
    loss.backward()  # training goes on
    assert all(tensor.grad is not None for tensor in _shards(sharded).values())


def _shards(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return dict(model.named_parameters())


class Opaque(torch.autograd.Function):
    """What no rule reads."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x * weight).sin()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        inner = grad * (x * weight).cos()
        return inner * weight, (inner * x).sum(0)


class Awkward(torch.nn.Module):
    """A weight that no rule reads, one made of two parameters, and a convolution that is transposed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(25, 6)
        self.opaque = torch.nn.Parameter(torch.randn(6))
        self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 7))
        self.last = torch.nn.Linear(7, 5)

    def forward(self, x):
        return self.last(self.normed(Opaque.apply(self.first(x.flatten(1)), self.opaque)).tanh())


def fallbacks():
    from torch.distributed.fsdp import fully_shard

    model = Awkward().eval()
    sharded = copy.deepcopy(model)
    fully_shard(sharded.first)
    fully_shard(sharded)
    names = {"opaque", "normed.parametrizations.weight.original0", "normed.parametrizations.weight.original1"}
    return assert_as_alone(model, sharded, shares(images, dist.get_world_size()), fused=names)


class Mixing(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(25, 6), torch.nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x.flatten(1))
        return self.last(x - x.mean(0))


def samples_that_influence_each_other():
    import warnings

    from torch.distributed.fsdp import fully_shard

    model = Mixing().eval()
    sharded = fully_shard(copy.deepcopy(model))
    names = {name for name, _ in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = shares(images, dist.get_world_size(), [[4, 3], [2, 2], [5]])
        # A sample on its own is its own mean: what little is left are the biases of the last layer.
        found = ux.fisher_diagonal(sharded, own(parts))
    assert all("influence each other" in how for how in found.coverage.values())
    expected = loop_over(model, all_of(parts), ux.losses.cross_entropy, 2)
    assert set(expected) == names
    assert torch.allclose(whole(found)["last.bias"].double(), expected["last.bias"], rtol=1e-5)
    assert float(whole(found)["first.weight"].abs().max()) < 1e-12


def loss_that_is_not_finite():
    model = shard(small())
    parts = shares(images, dist.get_world_size())
    if dist.get_rank() == 1:
        parts[1][1][0][0, 0, 0, 0] = float("nan")
    before = {name: t.full_tensor().clone() for name, t in _shards(model).items()}
    with pytest.raises(FloatingPointError, match="in batch 1" if dist.get_rank() == 1 else "on another rank"):
        ux.fisher_diagonal(model, own(parts))
    for name, tensor in _shards(model).items():
        assert torch.equal(tensor.full_tensor(), before[name])
    ux.fisher_diagonal(model, own(shares(images, dist.get_world_size())))  # and it works again


def data_that_cannot_be_read():
    class Broken(list):
        def __iter__(self):
            yield from super().__iter__()
            raise OSError("disk on fire")

    model = shard(small())
    data = own(shares(images, dist.get_world_size()))
    kind = OSError if dist.get_rank() == 0 else RuntimeError
    with pytest.raises(kind, match="disk on fire" if kind is OSError else "failed on another rank"):
        ux.fisher_diagonal(model, Broken(data[:1]) if kind is OSError else data)


def refusal(make):
    model, settings, kind = globals()[make]()
    with pytest.raises(kind) as error:
        ux.fisher_diagonal(model, own(shares(images, dist.get_world_size())), **settings)
    return str(error.value)


def whole_models_only():
    model, data = shard(small()), own(shares(images, dist.get_world_size()))
    for call in (
        lambda: ux.metrics.accuracy(model, data),
        lambda: ux.metrics.mia(model, forget=data, retain=data, test=data),
        lambda: ux.metrics.js_divergence(model, model, data),
        lambda: ux.metrics.language.probability(model, data),
        lambda: ux.pgu(model, data, data),
        lambda: ux.methods.finetune(model, data, data),
    ):
        with pytest.raises(NotImplementedError, match="model must not be sharded, got"):
            call()


def masks_of_a_callback():
    model = shard(small())
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    with pytest.raises(NotImplementedError, match="mask_callback: parameters must not be sharded"):
        ux.hf.mask_callback(masks).on_train_begin(None, None, None, model=model)


def fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(small(), device_id=torch.device("cpu")), {}, NotImplementedError


def tensor_parallel():
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(small(), mesh_of((dist.get_world_size(),)), {"head": ColwiseParallel()})
    return model, {}, NotImplementedError


def fsdp_of_tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(small(), mesh["tensor"], {"head": ColwiseParallel()})
    return fully_shard(model, mesh=mesh["data"]), {}, NotImplementedError


def two_meshes():
    from torch.distributed.fsdp import fully_shard

    world = dist.get_world_size()
    model = small()
    fully_shard(model.body, mesh=mesh_of((world,)))
    return fully_shard(model, mesh=mesh_of((1, world))), {}, NotImplementedError


def on_meta():
    with torch.device("meta"):
        model = small()
    return shard(model), {}, NotImplementedError


def mean_of_batches():
    return shard(small()), {"estimator": "batch"}, NotImplementedError


def no_data():
    with pytest.raises(ValueError, match="at least one sample on some rank"):
        ux.fisher_diagonal(shard(small()), [])


def gram_matrices():
    for model, make in ((small(), images), (language_model("gpt2"), texts)):
        parts = shares(make, dist.get_world_size(), [[3, 2], [], [1]])
        sharded = shard(copy.deepcopy(model))
        found = ux.activation_gram(sharded, own(parts))
        expected = ux.activation_gram(model, all_of(parts))
        assert list(found) == list(expected)
        assert found.n_samples == expected.n_samples
        for name, total in found.items():
            assert torch.allclose(total, expected[name], rtol=1e-5, atol=1e-6 * float(expected[name].max()))
        assert len({tuple(t.sum().item() for t in each) for each in _gathered(list(found.values()))}) == 1


def _gathered(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
