"""An interrupt at any line of what restores: the restoring is finished, and it is raised."""

import threading
from contextlib import ExitStack

import pytest
import torch
import whole_state
from disturb import Lines
from fault_models import Checkpointed
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.chosen import only_trainable
from unlearn_ext._internal.undo import Undone, handles
from unlearn_ext.fisher.engine import environment
from unlearn_ext.fisher.engine.layers import recorded


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.norm, self.head = nn.LSTM(4, 4, batch_first=True), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.norm(self.rnn(x.view(-1, 4, 4))[0].mean(1)))


BLOCKS = {
    "prepared": environment.prepared,
    "borrowed": borrowed,
    "only_trainable": lambda model: only_trainable(model, [name for name, _ in model.named_parameters()][:1]),
    "recorded": recorded,
    "unwritten": environment.unwritten,
    "handles": lambda model: _hooked(model),
}


def _hooked(model):
    stack = ExitStack()
    hooks = stack.enter_context(handles())
    hooks.extend(module.register_forward_hook(lambda *_: None) for module in model.modules())
    return stack


def run(block, model):
    with BLOCKS[block](model):
        loss = model(torch.ones(2, 16)).sum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize("kind", [Recurrent, Checkpointed])
@pytest.mark.parametrize("block", BLOCKS)
def test_an_interrupt_at_any_line_leaves_nothing(block, kind):
    run(block, kind())  # what is made once
    watcher = Lines()
    with watcher:
        run(block, kind())
    places = list(watcher.places())
    assert len(places) > 3
    for at, name in places:
        model = kind()
        process, before = whole_state.of_process(), whole_state.of_model(model)
        with pytest.raises(KeyboardInterrupt), Lines(at, KeyboardInterrupt("a fault")):
            run(block, model)
        after = whole_state.of_model(model)
        left = whole_state.differences(process, whole_state.of_process())
        left += [
            part
            for part in whole_state.differences(before, after)
            if block == "borrowed" or not part.startswith("norm.")  # running statistics
        ]
        assert not left, name


def test_shared_changes_hold_while_anybody_is_inside_and_go_after_an_interrupt():
    on = []

    class Change:
        def __enter__(self):
            on.append(1)

        def __exit__(self, *_):
            on.clear()

    shared = environment._Shared(Change)
    with shared.inside():
        thread = threading.Thread(target=shared.enter, args=("other",))
        thread.start()
        thread.join()
        with shared.inside():
            assert on == [1]
    assert on == [1]  # the other thread is still inside
    shared.leave("nobody")
    shared.leave("other")
    assert not on
    shared.leave("other")
    with shared.inside():
        assert on == [1]
    assert not on


def test_what_undoes_is_called_again_where_it_was_interrupted():
    calls = []

    def undo():
        calls.append(len(calls))
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Undone(undo):
        pass
    assert calls == [0, 1]
