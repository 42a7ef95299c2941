"""Methods of this package for SUPREME, a benchmark of unlearning in image classification.

Once both are installed, ``supreme-unlearn -method ux_ssd ...`` finds them: they are entry points of the group
``supreme.unlearning_methods``. Each function takes what SUPREME gives to methods that it does not know.

``newton`` is not among them: it must compare with data that are neither trained on nor tested with, and
SUPREME hands none over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from unlearn_ext.methods import METHODS
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import Classification

# Images, coarse labels or nothing, labels.
_TASK = Classification(inputs=0, labels=2)


def ux_ssd(**given: Any) -> nn.Module:  # noqa: ANN401 - what SUPREME passes
    """Run ``ux.ssd`` with its defaults: the mildest dampening that forgets within the budget, or none.

    Args:
        **given: What SUPREME passes to every method; used are ``fabric``, ``model``,
            ``forget_train_dataloader`` and ``retain_train_dataloader``.

    Returns:
        The model.
    """
    return _run("ssd", given)


def ux_gradient_masking(**given: Any) -> nn.Module:  # noqa: ANN401 - what SUPREME passes
    """Run ``ux.gradient_masking`` with its defaults.

    Args:
        **given: See ``ux_ssd``.

    Returns:
        The model.
    """
    return _run("gradient_masking", given)


def ux_salun(**given: Any) -> nn.Module:  # noqa: ANN401 - what SUPREME passes
    """Run ``ux.salun`` with its defaults.

    Args:
        **given: See ``ux_ssd``.

    Returns:
        The model.
    """
    return _run("salun", given)


def ux_pgu(**given: Any) -> nn.Module:  # noqa: ANN401 - what SUPREME passes
    """Run ``ux.pgu`` with its defaults, on Gram matrices of both sets.

    Args:
        **given: See ``ux_ssd``.

    Returns:
        The model.
    """
    return _run("pgu", given)


def ux_unsir(**given: Any) -> nn.Module:  # noqa: ANN401 - what SUPREME passes
    """Run ``ux.unsir`` with its defaults; the forget data are not read.

    Args:
        **given: See ``ux_ssd``; also used are ``type_of_unlearning_strategy`` and ``forget_label_id``.

    Returns:
        The model.

    Raises:
        ValueError: If what is to be forgotten is not a whole class.
    """
    strategy = given.get("type_of_unlearning_strategy")
    if strategy != "fullclass":
        raise ValueError(
            f"ux_unsir: the strategy must be fullclass, got {strategy!r}; take ux_ssd or ux_salun"
        )
    return _run("unsir", given, forget_classes=[int(given["forget_label_id"])])


def _run(name: str, given: dict[str, Any], **settings: Any) -> nn.Module:  # noqa: ANN401 - of the method
    fabric = given["fabric"]
    wrapped: nn.Module = given["model"]
    model: nn.Module = getattr(wrapped, "module", wrapped).to(fabric.device)
    method: Callable[..., UnlearnResult] = METHODS[name]
    forget: Iterable[Any] | None = None if name == "unsir" else given["forget_train_dataloader"]
    if fabric.world_size > 1:
        settings["process_group"] = _group()
    result = method(model, forget, given["retain_train_dataloader"], task=_TASK, **settings)
    fabric.print(f"unlearn_ext: {result}")
    return model


def _group() -> object:
    from torch.distributed import group

    return group.WORLD
