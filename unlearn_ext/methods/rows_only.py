"""Training a few rows of the weights: gradients of these rows alone, once they have proved right."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.methods.loop import Objective, Terms, mean_of
from unlearn_ext.methods.run import Run
from unlearn_ext.optim.row_gradients import RowGradients
from unlearn_ext.tasks.batches import Batch

# Above this share of selected rows the small product saves too little to be worth cutting out its factors.
_MOST_ROWS = 0.5


class RowsOnly:
    """The objective, with weight gradients for selected rows only, once that has proved right.

    Args:
        run: The run.
        chosen: Packed masks of the parameters that are trained.
        objective: What to minimise.

    Attributes:
        parameters: What is trained, by name.
        facts: For the record: the weights concerned, or why there are none.
    """

    def __init__(self, run: Run, chosen: Mapping[str, Tensor], objective: Objective) -> None:
        self._run, self._chosen, self._objective = run, chosen, objective
        self.parameters = {name: p for name, p in parameters_by_name(run.model).items() if name in chosen}
        rows: dict[Tensor, Tensor] = {}
        self._weights: list[str] = []
        for name, p in self.parameters.items():
            if p.ndim < 2 or is_dtensor(p):  # whose products are whole while they are computed
                continue
            mask = ops.unpack_mask(chosen[name], [p.shape[0], p.numel() // p.shape[0]])
            selected = mask.any(1).nonzero().flatten()
            if len(selected) <= _MOST_ROWS * p.shape[0]:
                rows[p] = selected
                self._weights.append(name)
        self._mode: RowGradients | None = RowGradients(rows) if rows else None
        self._checked = False
        self.facts: dict[str, object] = {"weight_gradients": "full"}
        if not rows:
            self.facts["because"] = "most rows of every weight are selected"
            if any(map(is_dtensor, self.parameters.values())):
                self.facts["because"] = "the weights are sharded"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor | Terms:
        """Compute the objective; the first call checks the gradients of rows.

        Args:
            model: The model.
            batch: The batch.

        Returns:
            As the objective does.
        """
        if self._mode is not None and not self._checked:
            because = self._objection(model, batch, self._mode)
            if because is None:  # a batch without a sample, which shows nothing
                return self._objective(model, batch)
            self._checked = True
            if because:
                self._mode = None
                self.facts["because"] = because
            else:
                self.facts = {"weight_gradients": "selected rows", "weights": self._weights}
        if self._mode is None:
            return self._objective(model, batch)
        with self._mode:
            return self._objective(model, batch)

    def _objection(self, model: nn.Module, batch: Batch, mode: RowGradients) -> str | None:
        plain = self._gradients(model, batch)
        if not plain:
            return None
        try:
            rows = self._gradients(model, batch, mode)
        except Exception as error:  # whatever the reason, plain autograd has just shown that it can
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
        if mode.calls == 0:
            return "the model has no plain linear or convolutional layer among the selected"
        for name, parameter in self.parameters.items():
            mask = ops.unpack_mask(self._chosen[name], list(parameter.shape))
            expected, got = plain[name][mask].float(), rows[name][mask].float()
            tolerance = 0.1 if parameter.dtype in (torch.float16, torch.bfloat16) else 1e-3
            scale = plain[name].abs().max().float()
            # A NaN is the training loop's to report.
            if bool(((got - expected).abs() > tolerance * scale).any()):
                return f"gradients of {name} disagree with plain autograd"
        return ""

    def _gradients(
        self, model: nn.Module, batch: Batch, mode: RowGradients | None = None
    ) -> dict[str, Tensor]:
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        devices = {p.device.index for p in self.parameters.values() if p.is_cuda}
        with torch.random.fork_rng(devices):  # the same dropout and the same labels every time
            if mode is None:
                loss = mean_of(self._objective(model, batch))
            else:
                with mode:
                    loss = mean_of(self._objective(model, batch))
        found = self.parameters if loss.requires_grad else {}
        grads = torch.autograd.grad(loss, list(found.values()), materialize_grads=True) if found else ()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return dict(zip(found, grads, strict=True))
