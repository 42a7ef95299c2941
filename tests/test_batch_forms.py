"""Batches of forms that are not read are refused with what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux

INPUTS, LABELS = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


@dataclass
class Pair:
    inputs: Tensor
    labels: Tensor


REFUSED = {
    "not batched": (DataLoader(TensorDataset(INPUTS, LABELS), batch_size=None), "DataLoader a batch_size"),
    "arrays": ([(INPUTS.numpy(), LABELS.numpy())], "torch.as_tensor"),
    "a class": ([Pair(INPUTS, LABELS)], r"needs a method to\(device\)"),
    "other names": ([{"x": INPUTS, "labels": LABELS}], r"inputs=lambda batch: batch\['x'\]"),
}
CALLS = {
    "fisher_diagonal": ux.fisher_diagonal,
    "accuracy": ux.metrics.accuracy,
    "kfac_factors": ux.kfac_factors,
    "finetune": lambda model, data: ux.METHODS["finetune"](model, data, data, epochs=1),
}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 3))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_not_read(form: str, call: str) -> None:
    data, message = REFUSED[form]
    with pytest.raises((ValueError, TypeError), match=message):
        CALLS[call](_model(), data)


def test_what_the_message_says_works() -> None:
    task = ux.tasks.Classification(inputs=lambda batch: batch["x"], labels="y")
    found = ux.fisher_diagonal(_model(), [{"x": INPUTS, "y": LABELS}], task=task)
    expected = ux.fisher_diagonal(_model(), [(INPUTS, LABELS)])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_an_error_inside_the_model_is_told_as_it_is() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise TypeError("from inside")

    with pytest.raises(TypeError, match="from inside"):
        ux.fisher_diagonal(Failing(), [{"x": INPUTS, "labels": LABELS}])
