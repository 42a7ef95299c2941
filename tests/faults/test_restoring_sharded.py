"""An interrupt at any line of the rooms of sharded models: shards, hooks, gradients and signals are as they
were, and the model computes what it did.

Of the blocks that restore every line is tried, of whole calls some, and with ``-m slow`` all.
"""

import random
import signal
import sys
import tempfile
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
import torch.distributed as dist
import whole_state
from disturb import PACKAGE, Lines
from torch import nn

import unlearn_ext as ux
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext._internal.undo import Undone
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.forward import try_up_to_model
from unlearn_ext.distributed.fsdp import reshard
from unlearn_ext.fisher.kfac_sharded import ShardedWatch
from unlearn_ext.fisher.sharded import ShardedLockstep
from unlearn_ext.integrations.lightning import _silent
from unlearn_ext.methods.run import Run
from unlearn_ext.methods.sharded_steps import ShardedSteps
from unlearn_ext.methods.until import measure
from unlearn_ext.resume.interrupts import waiting
from unlearn_ext.tasks.infer import INFERRED

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from sharded_models import images, shard, small

pytestmark = pytest.mark.usefixtures("every_certificate")
ROOMS = (
    "distributed/",
    "resume/",
    "optim/constrained",
    "fisher/sharded",
    "fisher/kfac_sharded",
    "methods/sharded",
    "subspace/sharded",
    "integrations/lightning",
)
FORGET, RETAIN = images(1, [2]), images(2, [3, 2])


@pytest.fixture(scope="module", autouse=True)
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def in_rooms(watcher):
    inside = tuple(PACKAGE + room for room in ROOMS)
    return [(at, name) for at, name in watcher.places() if at[0][0].startswith(inside)]


# The blocks, each on a model whose shards are in place.

BATCH, TASK = (torch.ones(2, 4), torch.tensor([0, 1])), ux.tasks.Classification()
WATCHES = WeakKeyDictionary()


def tiny():
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    fully_shard(model[0])
    return fully_shard(model)


def resharded(model):
    with MeshRanks(model, "block").sharded.resharded():
        model(BATCH[0]).sum().backward()


def gradients(model):
    sharded = MeshRanks(model, "block").sharded
    with sharded.resharded():
        lockstep = ShardedLockstep(sharded, sharded.leaves(), list(sharded.shards))
        with lockstep.marking(model) as marks:
            loss = model(BATCH[0]).sum()
        lockstep.gradients(loss, lambda *_: None, marks, lambda *_: None)


def recording(model):
    watch = WATCHES.get(model)
    if watch is None:
        ranks = MeshRanks(model, "block")
        with ranks.sharded.resharded():
            watch = WATCHES[model] = ShardedWatch(model, TASK, BATCH, ranks, is_drawn=False)
    with MeshRanks(model, "block").sharded.resharded(), watch.recording():
        watch.take_pass(TASK.loss(model, BATCH).sum(), 2)


def terms(model):
    ranks = MeshRanks(model, "block")
    steps = ShardedSteps(
        Run(model, "block", {}, ranks=ranks),
        lambda model, tagged: [(1.0, TASK.loss(model, tagged[1]))],
        list(model.parameters()),
        TASK,
    )
    with ranks.sharded.resharded():
        steps._terms(("forget", BATCH))


def held_back(model):
    with waiting():
        pass


def silent(model):
    with _silent(model):
        pass


BLOCKS = [resharded, gradients, recording, terms, held_back, silent]


def left_by(call, model, at):
    """What an interrupt has left, the model's state and the process's compared."""
    process, before = whole_state.of_process(), whole_state.of_model(model)
    with pytest.raises(KeyboardInterrupt), Lines(at, KeyboardInterrupt("a fault")):
        call(model)
    left = whole_state.differences(process, whole_state.of_process())
    return left + whole_state.differences(before, whole_state.of_model(model))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_an_interrupt_at_any_line_of_a_block_leaves_nothing(block):
    def call(model):
        with random_states_kept(), Undone(model.zero_grad):
            block(model)

    model = tiny()
    call(model)  # what is made once
    with torch.no_grad():
        expected = model(BATCH[0]).clone()
    reshard(model)
    with Lines() as watcher:
        call(model)
    places = in_rooms(watcher)
    assert len(places) > 3
    for at, name in places:
        assert not left_by(call, model, at), name
    with torch.no_grad():
        assert torch.equal(model(BATCH[0]), expected)


def test_a_signal_held_back_comes_although_the_restoring_was_interrupted():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))

    def call():
        with waiting():
            signal.raise_signal(signal.SIGTERM)

    try:
        handler = signal.getsignal(signal.SIGTERM)
        with Lines() as watcher:
            call()
        places = in_rooms(watcher)
        assert came == [1]
        for at, name in places:
            came.clear()
            with pytest.raises(KeyboardInterrupt), Lines(at, KeyboardInterrupt("a fault")):
                call()
            assert signal.getsignal(signal.SIGTERM) is handler, name
    finally:
        signal.signal(signal.SIGTERM, before)


def optimizer():
    torch.manual_seed(0)
    layer, other = nn.Linear(3, 2), nn.Linear(2, 2)
    made = ux.optim.MaskedAdamW(
        layer.named_parameters(), masks={"weight": torch.ones(2, 3) > 0, "bias": torch.zeros(2) > 0}
    )
    layer(torch.ones(1, 3)).sum().backward()
    made.step()
    return made, other


def add_group(made, other):
    names = [(f"other.{name}", parameter) for name, parameter in other.named_parameters()]
    masks = {name: torch.ones_like(parameter) > 0 for name, parameter in names}
    made.add_param_group({"params": names, "masks": masks, "lr": 0.5})


def load(made, other):
    checkpoint = made.state_dict()
    for state in checkpoint["state"].values():
        state["exp_avg"] = state["exp_avg"] + 1
    checkpoint["param_groups"][0]["lr"] = 0.25
    made.load_state_dict(checkpoint)


def contents(made):
    state = [
        {key: torch.as_tensor(value).tolist() for key, value in each.items()} for each in made.state.values()
    ]
    groups = [
        {**group, "params": [tuple(param.shape) for param in group["params"]]} for group in made.param_groups
    ]
    hooks = [len(value) for name, value in vars(made).items() if name.endswith("_hooks")]
    return state, groups, hooks, len(made._constraints), list(made._by_name)


@pytest.mark.parametrize("change", [add_group, load])
def test_an_optimizer_is_changed_all_or_nothing(change):
    made, other = optimizer()
    before = contents(made)
    change(made, other)  # what is made once
    made, other = optimizer()
    with Lines() as watcher:
        change(made, other)
    places, done, seen = in_rooms(watcher), contents(made), []
    assert done != before
    for at, name in places:
        made, other = optimizer()
        with pytest.raises(KeyboardInterrupt), Lines(at, KeyboardInterrupt("a fault")):
            change(made, other)
        assert contents(made) in (before, done), name
        seen.append(contents(made) == done)
    # Done only where the interrupt came when everything was.
    assert seen == sorted(seen)
    assert seen.count(False) > 10


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_comes_before_a_model_is_tried_without_running_it(is_compiled):
    model, ran = tiny(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: ran.append(1))
    if is_compiled:
        model.compile(backend="eager")
    try_up_to_model(model, TASK, BATCH)  # what is made once, by torch's compiler
    process, before = whole_state.of_process(), whole_state.of_model(model)
    try_up_to_model(model, TASK, BATCH)
    try_up_to_model(model, TASK, BATCH, lambda model, batch: model(torch.rand(2, 4)))
    with pytest.raises(ValueError, match="how samples are taken"):
        try_up_to_model(model, INFERRED, (BATCH[0], torch.zeros(4).long()))
    assert not ran
    assert not whole_state.differences(process, whole_state.of_process())
    assert not whole_state.differences(before, whole_state.of_model(model))
    try_up_to_model(model, TASK.with_loss(lambda *_: ran.append(1)), BATCH)  # a user's own is not run twice
    assert not ran


# Whole calls.


def bits(tensors):
    return [getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().tolist() for tensor in tensors]


def importances(model, folder, **settings):
    return bits(ux.fisher_diagonal(model, RETAIN, **settings).values())


def kept(model, folder):
    return importances(model, folder, checkpoint=folder / "pass", checkpoint_every=1)


def trained(model, folder):
    ux.gradient_masking(model, FORGET, RETAIN, epochs=1, lr=1e-3)
    return put_back(model)


def put_back(model):
    """The weights, which are those of a new model again."""
    found = bits(model.parameters())
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), shard(small()).parameters(), strict=True):
            parameter.to_local().copy_(value.to_local())
    return found


def factors(model, folder):
    found = ux.kfac_factors(model, RETAIN, generator=torch.Generator().manual_seed(0))
    return bits(tensor for name in found for tensor in found[name])


CALLS = {
    "importances": importances,
    "importances, kept": kept,
    "factors": factors,
    "gram": lambda model, folder: bits(ux.activation_gram(model, RETAIN).values()),
    "measure": lambda model, folder: [measure(model, RETAIN).loss],
    "trained": trained,
}


def all_places(call, model):
    """The call's answer, and the lines of the rooms that it runs."""
    with tempfile.TemporaryDirectory() as folder:
        CALLS[call](model, Path(folder))  # what is made once
    with tempfile.TemporaryDirectory() as folder, Lines() as watcher:
        answer = CALLS[call](model, Path(folder))
    return answer, in_rooms(watcher)


def disturb(call, n):
    """Interrupt a call at ``n`` of its lines, or all; the model serves for all of them."""
    model = shard(small())
    answer, places = all_places(call, model)
    assert len(places) > 20
    chosen = places if n is None else random.Random(call).sample(places, n)
    for at, name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            left = left_by(lambda model, folder=folder: CALLS[call](model, Path(folder)), model, at)
        if left and call == "trained":  # between the end of the run and its return: all of it is done
            left = [part for part in left if not part.endswith(".value")]
            assert put_back(model) == answer, name
        assert not left, name
    with tempfile.TemporaryDirectory() as folder:
        assert CALLS[call](model, Path(folder)) == answer
    return len(chosen)


@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_in_a_call_leaves_nothing(call):
    disturb(call, 4)


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_line_of_a_call_leaves_nothing(call):
    print(disturb(call, None), "lines")
