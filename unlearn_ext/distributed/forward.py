"""What fails around a sharded model's forward pass, and whether the other ranks can be told of it.

Inside a pass the ranks are in collectives of the model's own, where a message would be taken for their data.
What comes before the model is called can be tried before any rank is inside; what comes after it can be told,
where the number of calls is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import nn

from unlearn_ext._internal.modules import eager
from unlearn_ext._internal.undo import Undone, handles
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch


class _ReachedError(BaseException):
    # No Exception, which a task's own code might catch.
    pass


def calls_once(task: Task) -> bool:
    """Say whether it is known that a loss is one call of the model, and nothing of the user's around it.

    Args:
        task: The task, with its loss.

    Returns:
        True for the package's tasks and losses.
    """
    parts = (type(task).forward, task.loss_fn or type(task).forward)
    return all(getattr(part, "__module__", "").startswith("unlearn_ext.tasks.") for part in parts)


def try_up_to_model(
    model: nn.Module, task: Task, batch: Batch, call: Callable[[nn.Module, Batch], object] | None = None
) -> None:
    """Do what comes before a model is called on a batch, and raise what that raises.

    Nothing of the model runs, no random number is used up, and nothing is done for a task of which it is not
    known that it may be done twice.

    Args:
        model: The model.
        task: What it is for.
        batch: A batch on the model's device.
        call: ``call(model, batch)`` calls it; by default, as the task or its loss does.
    """
    if not calls_once(task) or callable(task.fields.inputs):
        return

    def stop(*_: object) -> None:
        raise _ReachedError

    chosen = call or (task.forward if task.loss_fn is None else task.loss)
    state = torch.get_rng_state()  # what labels are redrawn from

    def put_back() -> None:
        torch.set_rng_state(state)

    # A model compiled in place would be compiled anew for every hook.
    stance = eager() if getattr(model, "_compiled_call_impl", None) is not None else nullcontext()
    with Undone(put_back), stance, handles() as hooks, torch.no_grad(), suppress(_ReachedError):
        hooks.append(model.register_forward_pre_hook(stop, prepend=True))
        chosen(model, batch)


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[list[int]]:
    """Count a model's forward passes inside.

    Args:
        model: The model.

    Yields:
        How many have begun and how many have ended, so far.
    """
    passes = [0, 0]

    def begun(*_: object) -> None:
        passes[0] += 1

    def ended(*_: object) -> None:
        passes[1] += 1

    with handles() as hooks:
        hooks.append(model.register_forward_pre_hook(begun))
        hooks.append(model.register_forward_hook(ended))
        yield passes
