"""A callback of the Trainer that puts masks on whatever optimizer there is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unlearn_ext.hf.guard import MaskGuard


def mask_callback(masks: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - a class of an optional package
    """Make a ``TrainerCallback`` under which scalars that may not change keep their bits.

    For optimizers of any kind: torch's own, Adafactor, Muon, 8-bit ones. Gradients of masked scalars are set
    to zero as they arrive, so that the Trainer's ``max_grad_norm`` is about the free ones. Whatever the
    optimizer does to masked scalars all the same (weight decay, momentum from earlier) is taken back right
    after its step, bit by bit, and so is what it does to their state, where that has the parameter's shape.
    ``masked_adamw`` does the same without the copies that this takes: of the parameters and their state,
    during the step.

    Not for optimizers that step inside the backward pass (LOMO, layer-wise GaLore), nor under FSDP.

    Args:
        masks: What may change, by parameter name, bool or packed, for every trainable parameter; names from
            before the model was compiled, wrapped or given adapters will do.

    Returns:
        The callback, for ``Trainer(callbacks=[...])``. When training begins it raises ValueError for a mask
        that is missing or has another shape, TypeError for one that is neither bool nor uint8, and
        NotImplementedError for a sharded model.

    Raises:
        ImportError: If transformers is not installed.
    """
    return _callback_class()(masks)


@functools.cache
def _callback_class() -> Any:  # noqa: ANN401 - a class of an optional package
    from transformers import TrainerCallback

    class MaskCallback(TrainerCallback):  # type: ignore[misc]
        """See ``mask_callback``."""

        def __init__(self, masks: Mapping[str, Tensor]) -> None:
            self._guard = MaskGuard(masks)

        def on_train_begin(self, *_: object, **given: Any) -> None:  # noqa: ANN401 - what the Trainer has
            self._guard.enter(given["model"])

        def on_pre_optimizer_step(self, *_: object, **given: Any) -> None:  # noqa: ANN401
            self._guard.keep(given["optimizer"])

        def on_optimizer_step(self, *_: object, **given: Any) -> None:  # noqa: ANN401
            self._guard.put_back(given["optimizer"])

        def on_train_end(self, *_: object, **__: object) -> None:
            self._guard.leave()

    return MaskCallback
