"""What every method does with models and data that are not the plainest: the right thing, or it refuses."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import unlearn_ext as ux
from unlearn_ext.methods.common import Paired, Portion

QUICK = {
    "ssd": {"alpha": 1.0},
    "gradient_masking": {"epochs": 2},
    "salun": {"epochs": 2},
    "pgu": {"epochs": 1},
    "unsir": {"noise_batch": 4, "noise_steps": 1, "repair_steps_min": 2},
    "retrain": {"make_model": lambda: network(1), "train": lambda model, retain: model},
    "finetune": {"epochs": 2},
    "gradient_ascent": {"epochs": 2, "cap": 10.0},
    "neg_grad_plus": {"epochs": 2},
    "random_label": {"epochs": 2},
    "bad_teacher": {"epochs": 2},
    "scrub": {"epochs": 2},
    "fisher_forgetting": {},
}
NAMES = tuple(QUICK)
TRAINING = tuple(name for name in NAMES if name not in ("ssd", "retrain", "fisher_forgetting"))


def network(seed=0, norm=nn.BatchNorm1d):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, 16), norm(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )


def samples(n=30, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=draws), torch.arange(n) % 3


def sets(batch=5, n=30):
    x, y = samples(n)
    parts = [(x[y == 0], y[y == 0]), (x[y > 0], y[y > 0])]
    return tuple(list(zip(a.split(batch), b.split(batch), strict=True)) for a, b in parts)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(name, model, forget, retain, **settings):
    return ux.unlearn(name, model, forget, retain, **{**QUICK[name], **settings})


# ---- wrapped, sharded, offloaded models


@pytest.fixture(scope="module")
def process_group():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def in_ddp():
    return nn.parallel.DistributedDataParallel(network())


def with_ddp_inside():
    model = network()
    model[3] = nn.parallel.DistributedDataParallel(model[3])
    return model


def in_fsdp():
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)


def sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(network(), mesh=init_device_mesh("cpu", (1,)))


def in_mkldnn():
    model = network()
    model[3].bias = nn.Parameter(model[3].bias.detach().to_mkldnn())
    return model


KNOW_SHARDS = ("gradient_masking", "newton", "salun", "ssd")

WRAPPED = {
    "DataParallel": (lambda: nn.DataParallel(network()), r"DataParallel; pass what it wraps, model\.module$"),
    "DDP": (in_ddp, r"DistributedDataParallel; pass what it wraps, model\.module, on one rank"),
    "DDP inside": (with_ddp_inside, r"its part 3 must not be wrapped .* model\.3\.module"),
    "FSDP1": (in_fsdp, "FullyShardedDataParallel; call it on an unsharded model"),
    "FSDP2": (sharded, "must not be sharded, got the DTensor"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "the lazy 0.weight; call the model once"),
    "meta": (lambda: network().to("meta"), "0.weight on the meta device; load the weights"),
    "MKLDNN": (in_mkldnn, r"computes no gradients, got 3\.bias; give it an nn\.Parameter of its to_dense"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize("name", NAMES)
def test_models_that_are_not_here_as_a_whole_are_refused(process_group, name, wrapper):
    make, message = WRAPPED[wrapper]
    if wrapper == "FSDP2" and name in KNOW_SHARDS:
        pytest.skip("it knows such models, see tests/distributed/test_sharded_*.py")
    model, (forget, retain) = make(), sets()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(NotImplementedError, match=message):
        run(name, model, forget, retain)
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gradient_masking", "newton", "salun"])
def test_a_mesh_of_one_rank_is_one_process(process_group, name):
    model, shards, (forget, retain) = network(), sharded(), sets()
    if name == "salun":
        model[1], shards[1] = nn.Identity(), nn.Identity()
    settings = QUICK.get(name, {"validation": retain, "until": 0.0, "budget": 1.0, "class_budget": 1.0})
    for one in (model, shards):
        draws = torch.Generator().manual_seed(0)
        result = ux.unlearn(name, one, forget, retain, generator=draws, **settings)
        assert result.changed > 0
    for own, part in zip(model.parameters(), shards.parameters(), strict=True):
        torch.testing.assert_close(part.full_tensor(), own, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_bars_of_sharded_models_are_shown_where_they_are_asked_for(process_group, capsys):
    forget, retain = sets()
    quiet = {"validation": retain, "until": 0.0, "budget": 1.0, "class_budget": 1.0}
    ux.newton(sharded(), forget, retain, generator=torch.Generator().manual_seed(0), **quiet)
    ux.activation_gram(sharded(), forget)
    assert capsys.readouterr().err == ""
    ux.activation_gram(sharded(), forget, progress=True)
    assert "activation Gram matrices" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrapper", ["DDP", "meta", "MKLDNN"])
def test_scores_and_gram_matrices_refuse_them_too(process_group, wrapper):
    make, message = WRAPPED[wrapper]
    forget, _ = sets()
    with pytest.raises(NotImplementedError, match=f"saliency.*{message}"):
        ux.saliency(make(), forget, score="grad")
    with pytest.raises(NotImplementedError, match=f"activation_gram.*{message}"):
        ux.activation_gram(make(), forget)


def test_a_ddp_model_goes_on_training_after_its_module_was_changed(process_group):
    wrapped, (forget, retain) = in_ddp(), sets()
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    for step in range(4):
        if step == 2:
            run("gradient_masking", wrapped.module, forget, retain)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(retain[0][0]), retain[0][1]).backward()
        optimizer.step()
    assert all(p.requires_grad and p.grad is not None for p in wrapped.parameters())


@pytest.mark.parametrize("name", [name for name in TRAINING if name not in ("pgu", "gradient_masking")])
def test_no_parameter_is_marked_as_frozen_in_between(name, monkeypatch):
    model, (forget, retain) = network(), sets()
    own, marked = {id(p) for p in model.parameters()}, []
    honest = torch.Tensor.requires_grad_

    def watching(tensor, *args, **kwargs):
        if id(tensor) in own:
            marked.append(tensor)
        return honest(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "requires_grad_", watching)
    run(name, model, forget, retain)
    assert not marked


@pytest.mark.parametrize("fails", [False, True])
def test_marks_that_save_memory_are_put_back(fails):
    model, (forget, retain) = network(), sets()
    model[0].bias.requires_grad_(False)
    inside = []

    def loss_fn(model, batch):
        inside.append([p.requires_grad for p in model.parameters()])
        if fails and not inside[-1][0]:
            raise KeyboardInterrupt
        return ux.losses.cross_entropy(model, batch)

    try:
        run("gradient_masking", model, forget, retain, loss_fn=loss_fn)
    except KeyboardInterrupt:
        assert fails
    assert inside[-1].count(False) > 2
    assert [p.requires_grad for p in model.parameters()] == [True, False, *[True] * 6]


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "pgu"])
def test_hooks_that_step_in_the_backward_pass_are_not_run(name):
    model, (forget, retain) = network(), sets()
    twin, calls = copy.deepcopy(model), []
    handles = [p.register_post_accumulate_grad_hook(lambda p: calls.append(p)) for p in model.parameters()]
    run(name, model, forget, retain, generator=torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    run(name, twin, forget, retain, generator=torch.Generator().manual_seed(0))
    assert not calls
    assert same(bits(model), bits(twin))


def test_reentrant_checkpoints_can_be_trained_through():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(4, 16), network(norm=nn.LayerNorm)[1:]

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.rest, self.first(x), use_reentrant=True)

    model, (forget, retain) = Checkpointed(), sets()
    plain = copy.deepcopy(model)
    plain.forward = lambda x: plain.rest(plain.first(x))
    for one in (model, plain):
        run("finetune", one, forget, retain)
    assert same(bits(model), bits(plain))


# ---- both sets are read in full


class Counting:
    """Batches that note which samples were read, in the same order every time."""

    def __init__(self, n, batch):
        self.x, self.y = torch.randn(n, 4), torch.arange(n) % 3
        self.batch, self.seen = batch, [0] * n

    def __len__(self):
        return -(-len(self.x) // self.batch)

    def __iter__(self):
        for part in torch.arange(len(self.x)).split(self.batch):
            for index in part.tolist():
                self.seen[index] += 1
            yield self.x[part], self.y[part]


@pytest.mark.parametrize(
    "name, longer", [("gradient_masking", 1), ("random_label", 0), ("neg_grad_plus", 0), ("bad_teacher", 1)]
)
def test_every_sample_is_read_equally_often_whatever_the_sizes_of_the_sets(name, longer):
    short = [(torch.randn(8, 4), torch.arange(8) % 3)]
    long = Counting(64, 8)
    both = (short, long) if longer else (long, short)
    masks = {n: torch.ones(p.shape, dtype=torch.bool) for n, p in network().named_parameters()}
    settings = {"gradient_masking": {"masks": masks}, "bad_teacher": {"retain_share": 0.25}}.get(name, {})
    ux.unlearn(name, network(), *both, epochs=0, **settings)
    besides = list(long.seen)  # what is read once per run, to count classes and to measure
    long.seen = [0] * 64
    ux.unlearn(name, network(), *both, epochs=8 if name == "bad_teacher" else 16, **settings)
    assert [seen - other for seen, other in zip(long.seen, besides, strict=True)] == [2] * 64


def test_pairs_and_portions_name_the_set_that_is_empty():
    with pytest.raises(ValueError, match=r"^who: retain must hold a batch, got none"):
        list(Paired("who", [(1,)], retain=[]))
    with pytest.raises(ValueError, match=r"^who: retain must hold a batch, got none"):
        list(Portion("who", "retain", [], 0.5))
    for name in ("gradient_masking", "bad_teacher", "random_label", "neg_grad_plus"):
        settings = {"score": "grad"} if name == "gradient_masking" else {}
        with pytest.raises(ValueError, match=f"{name}: retain must hold a batch"):
            run(name, network(), sets()[0], [], **settings)


# ---- compiled models


def compiled(model):
    made = torch.compile(model, backend="eager")
    training = model.training
    made.eval()(samples()[0])  # what has run is compiled, and calls no hooks any more
    made.train(training)
    return made


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_that_has_run_has_the_same_gram_matrices():
    model, (forget, _) = network().eval(), sets()
    expected = ux.activation_gram(model, forget)
    found = ux.activation_gram(compiled(model), forget)
    assert list(found) == list(expected) == ["0", "3", "5"]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(expected["_orig_mod.3"], expected["3"])


def test_a_part_that_is_compiled_is_called_as_if_it_were_not():
    model, (forget, retain) = network().eval(), sets()
    parts = copy.deepcopy(model)
    parts[3] = torch.compile(parts[3], backend="eager")
    assert list(ux.activation_gram(parts, forget)) == ["0", "3", "5"]
    scores = ux.saliency(parts, forget, retain)
    assert list(scores) == [name for name, _ in model.named_parameters()]
    assert [group.name for group in scores.groups] == [
        group.name for group in ux.saliency(model, forget, retain).groups
    ]


@pytest.mark.parametrize("name", NAMES)
def test_compiled_models_end_up_with_the_weights_of_plain_ones(name):
    model, (forget, retain) = network(), sets()
    twin = copy.deepcopy(model)
    plain = run(name, model, forget, retain, generator=torch.Generator().manual_seed(0))
    wrapped = run(name, compiled(twin), forget, retain, generator=torch.Generator().manual_seed(0))
    for key, tensor in bits(model).items():
        torch.testing.assert_close(twin.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)
    assert wrapped.changed_per_parameter.keys() == plain.changed_per_parameter.keys()
    if name == "gradient_masking":
        assert wrapped.history[-1]["weight_gradients"] == "selected rows"


def test_what_was_stored_for_a_plain_model_fits_the_compiled_one_and_back():
    model, (forget, retain) = network(), sets()
    other = compiled(copy.deepcopy(model))
    full = ux.fisher_diagonal(model, forget + retain)
    assert list(full) == list(ux.fisher_diagonal(other, forget))
    a = ux.ssd(model, forget, importance=full, alpha=1.0)
    b = ux.ssd(other, forget, importance=full, alpha=1.0)
    assert a.changed == b.changed > 0
    masks = ux.select_mask(ux.saliency(other, forget, score="grad"), 0.5)
    for one in (model, other):
        assert ux.gradient_masking(one, forget, masks=masks, epochs=1).changed > 0


def test_a_model_with_a_module_called_module_keeps_its_parameters_apart():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 3)
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.module(x) * self.weight

    forget, retain = sets()
    importance = ux.fisher_diagonal(Odd(), forget)
    assert list(importance) == ["weight", "module.weight", "bias"]
    assert importance["module.weight"].shape == (3, 4)
    assert importance["weight"].shape == (3,)
    for name in ("ssd", "gradient_masking", "finetune"):
        assert len(run(name, Odd(), forget, retain).changed_per_parameter) == 3


# ---- the generator decides everything


class Augmented(Dataset):
    """Draws noise from Python, NumPy and torch."""

    def __init__(self, part):
        self.x, self.y = (torch.cat(entries) for entries in zip(*part, strict=True))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        return self.x[index] + noise, self.y[index]


@pytest.mark.parametrize("name", NAMES)
def test_the_generator_decides_loaders_with_generators_of_their_own_and_augmentation(name):
    if name == "retrain":
        pytest.skip("trains by a function of the user's")
    own = torch.Generator().manual_seed(7)

    def loaders():
        return [DataLoader(Augmented(part), 5, shuffle=True, generator=own) for part in sets()]

    results = []
    for seed in (0, 0, 1):
        model = network()
        states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state(), own.get_state()
        run(name, model, *loaders(), generator=torch.Generator().manual_seed(seed))
        now = random.getstate(), np.random.get_state()[1], torch.get_rng_state(), own.get_state()
        if name not in ("ssd", "pgu"):  # which do not say to the run what data they read
            assert states[0] == now[0]
            assert np.array_equal(states[1], now[1])
            assert torch.equal(states[2], now[2])
            assert torch.equal(states[3], now[3])
            torch.rand(3), np.random.rand(3), random.random(), own.manual_seed(seed + 3)
        results.append(bits(model))
    if name not in ("ssd", "pgu"):
        assert same(results[0], results[1])
        assert not same(results[0], results[2])


def test_without_a_generator_the_random_states_decide_and_are_put_back():
    own = torch.Generator().manual_seed(7)
    forget, retain = ([*sets()][i] for i in (0, 1))
    results = []
    for seed in (0, 0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        model, state = network(), own.get_state()
        loader = DataLoader(Augmented(retain), 5, shuffle=True, generator=own)
        run("finetune", model, forget, loader)
        assert torch.equal(own.get_state(), state)
        results.append(bits(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


# ---- single samples


@pytest.mark.parametrize("name", ["salun", "unsir", "finetune"])
@pytest.mark.parametrize("n", [1, 6])
def test_a_batch_of_one_sample_goes_through_batch_norm(name, n):
    x, y = samples(36)
    forget = [(x[y == 0][:n], y[y == 0][:n])]
    kept, labels = x[y > 0][:n], y[y > 0][:n]
    retain = DataLoader(TensorDataset(kept, labels), 5)  # a last batch of one
    model = network()
    result = run(name, model, forget, retain)
    assert result.changed > 0
    assert all(torch.isfinite(tensor).all() for tensor in bits(model).values())


def test_single_values_use_the_statistics_and_leave_them():
    model = network()
    model[1].running_mean.fill_(0.5)
    statistics = copy.deepcopy(model[1].state_dict())
    twin = copy.deepcopy(model)
    x, y = samples(1)
    ux.methods.finetune(model, None, [(x, y)], epochs=1, lr=0.1, momentum=0, weight_decay=0)
    assert all(
        torch.equal(model[1].state_dict()[key], value) for key, value in statistics.items() if "run" in key
    )
    twin.eval()
    nn.functional.cross_entropy(twin(x), y).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


def test_larger_batches_go_on_moving_statistics():
    model, (_, retain) = network(), sets()
    twin = copy.deepcopy(model)
    ux.methods.finetune(model, None, retain[:1], epochs=1)
    twin(retain[0][0])
    assert torch.equal(model[1].running_mean, twin[1].running_mean)


# ---- numbers of epochs, coverage


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "unsir"])
def test_impossible_numbers_of_epochs_are_refused(name):
    model, (forget, retain) = network(), sets()
    with pytest.raises(ValueError, match=rf"{name}.*: epochs must be (>= 0|at least 1), got -1"):
        run(name, model, forget, retain, epochs=-1)


def test_epochs_must_be_an_integer():
    with pytest.raises(TypeError, match=r"finetune: epochs must be an integer, got 1\.5"):
        run("finetune", network(), *sets(), epochs=1.5)


@pytest.mark.parametrize("name", ["gradient_masking", "fisher_forgetting"])
def test_the_result_tells_how_importances_were_computed(name):
    result = run(name, network(), *sets())
    assert set(result.coverage.values()) == {"fused"}
    assert len(result.coverage) == 8


def test_a_result_without_importances_has_no_coverage():
    assert run("finetune", network(), *sets()).coverage == {}
