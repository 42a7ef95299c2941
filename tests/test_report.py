import functools
import json
import math

import numpy as np
import pytest
import torch

from unlearn_ext import UnlearnResult, losses, report


def result(**changes):
    fields = {
        "method": "ssd",
        "hyperparameters": {"alpha": 2.0},
        "seconds": {"importance": 1.25, "dampening": 0.25},
        "changed": 0.125,
        "changed_per_parameter": {"weight": 0.25, "bias": 0.0},
        "history": ({"phase": "dampening", "selected": 3},),
    }
    return UnlearnResult(**{**fields, **changes})


def test_the_record_is_frozen_and_prints_as_a_line():
    record = result()
    assert str(record) == "ssd: 12.5% of the parameters changed in 1.50 s"
    with pytest.raises(AttributeError):
        record.changed = 0.0


def test_json_holds_every_field():
    parsed = json.loads(result().to_json())
    assert parsed.pop("notice") == report.NOTICE
    assert parsed == {
        "method": "ssd",
        "hyperparameters": {"alpha": 2.0},
        "seconds": {"importance": 1.25, "dampening": 0.25},
        "changed": 0.125,
        "changed_per_parameter": {"weight": 0.25, "bias": 0.0},
        "history": [{"phase": "dampening", "selected": 3}],
    }


def test_json_is_strict_whatever_the_hyperparameters():
    odd = {
        "nan": math.nan,
        "inf": -math.inf,
        "tensor": torch.tensor([1.0, math.inf]),
        "number": np.float32(0.5),
        "function": losses.cross_entropy,
        "partial": functools.partial(losses.cross_entropy, shift=False),
        "set": {3},
        "device": torch.device("cpu"),
        7: None,
    }
    parsed = json.loads(result(hyperparameters=odd).to_json(), parse_constant=pytest.fail)["hyperparameters"]
    assert parsed == {
        "nan": "nan",
        "inf": "-inf",
        "tensor": [1.0, "inf"],
        "number": 0.5,
        "function": "unlearn_ext.losses.cross_entropy",
        "partial": "unlearn_ext.losses.cross_entropy(shift=False)",
        "set": [3],
        "device": "cpu",
        "7": None,
    }


def test_callables_are_named_without_their_address():
    class Loss:
        def __call__(self):
            return None

    assert report.callable_name(Loss()).endswith("Loss")
    assert "0x" not in report.callable_name(functools.partial(Loss(), 1, shift=True))


def test_the_wording_promises_no_erasure():
    assert "do not prove" in report.NOTICE
