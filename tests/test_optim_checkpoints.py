"""What the optimizers hand on: checkpoints that torch.optim continues, options, and runs without values."""

import copy
import pickle

import pytest
import torch
from test_optim import MASKED, PAIRS, assert_same_run, make_params, named, random_masks, run
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from unlearn_ext.optim import MaskedAdamW, MaskedSGD, ProjectedSGD


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("cls, options", MASKED)
def test_torch_optim_continues_a_checkpoint(cls, options, foreach):
    ours_params, their_params = make_params(), make_params()
    ours = cls(named(ours_params), **options)
    run(ours, ours_params, 5)
    for mine, theirs in zip(ours_params, their_params, strict=True):
        theirs.data.copy_(mine.data)
    theirs = PAIRS[cls](their_params, foreach=foreach, **options)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    theirs.param_groups[0]["foreach"] = foreach
    assert_same_run(ours, theirs, ours_params, their_params)


def test_every_step_of_a_checkpoint_is_its_own():
    params = make_params()
    optimizer = MaskedAdamW(named(params))
    run(optimizer, params, 2)
    steps = [state["step"] for state in optimizer.state_dict()["state"].values()]
    assert [float(step) for step in steps] == [2.0] * len(params)
    assert len({step.data_ptr() for step in steps}) == len(params)
    shared = {id(optimizer.state[p]["step"]) for p in params}
    assert len(shared) == 1
    steps[0].add_(7)
    assert all(float(optimizer.state[p]["step"]) == 2 for p in params)


@pytest.mark.parametrize("cls, options", [*MASKED, (ProjectedSGD, {"lr": 0.1, "bases": {}})])
def test_no_option_comes_in_from_a_checkpoint(cls, options):
    params = make_params()
    optimizer = cls(named(params), **options)
    wanted, defaults = set(optimizer.param_groups[0]), dict(optimizer.defaults)
    theirs = PAIRS.get(cls, torch.optim.SGD)(named(params), lr=0.1)
    for checkpoint in (optimizer.state_dict(), theirs.state_dict()):
        optimizer.load_state_dict(copy.deepcopy(checkpoint))
        assert set(optimizer.param_groups[0]) == wanted
        assert optimizer.defaults == defaults
    again = pickle.loads(pickle.dumps(optimizer))
    assert set(again.param_groups[0]) == wanted
    assert again.defaults == defaults


def test_other_options_of_a_group_stay():
    params = make_params()
    optimizer = MaskedAdamW(named(params))
    optimizer.param_groups[0]["initial_lr"] = 0.5
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["initial_lr"] == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda named_params: MaskedAdamW(named_params, masks=random_masks([p for _, p in named_params])),
        lambda named_params: MaskedAdamW(named_params, capturable=True),
        lambda named_params: MaskedSGD(named_params, momentum=0.9),
        lambda named_params: ProjectedSGD(named_params, bases={"p0": torch.eye(5)[:, :2]}, momentum=0.9),
    ],
)
def test_a_run_without_values(make):
    with FakeTensorMode():
        params = make_params()
        optimizer = make(named(params))
        run(optimizer, params, 3)
        checkpoint = optimizer.state_dict()
    assert all(isinstance(p, FakeTensor) for p in params)
    states = [value for state in checkpoint["state"].values() for value in state.values()]
    assert all(isinstance(value, FakeTensor) for value in states)
