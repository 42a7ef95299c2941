"""Calls that must fail: the class of the error, its message, and that nothing is written by either door."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from op_cases import CASES, LAYER_OPS, bits, compiled, mapped, tensors_of

from unlearn_ext import ops

NAN, INF = math.nan, math.inf
CASE_OF = {case.schema: case for case in CASES}

ones, zeros = torch.ones, torch.zeros


def masks():
    return [torch.full((2,), 0b0101_0101, dtype=torch.uint8), torch.full((1,), 0b111, dtype=torch.uint8)]


def parameters(dtype=torch.float32):
    return [ones(3, 4, dtype=dtype), ones(5, dtype=dtype)]


# Valid arguments of every op, by name; a bad call changes some of them.
VALID: dict[str, Callable[[], dict]] = {
    "fisher_accumulate_": lambda: {"fisher": parameters(), "grads": parameters()},
    "fisher_linear_": lambda: {
        "fisher": zeros(4, 3),
        "inputs": ones(2, 5, 3),
        "grad_outputs": ones(2, 5, 4),
    },
    "fisher_conv_": lambda: {
        "fisher": zeros(4, 3, 2, 2),
        "inputs": ones(2, 3, 5, 6),
        "grad_outputs": ones(2, 4, 4, 5),
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
    },
    "fisher_bias_": lambda: {"fisher": zeros(4), "grad_outputs": ones(2, 5, 4)},
    "fisher_affine_": lambda: VALID["fisher_bias_"]() | {"normalized": ones(2, 5, 4)},
    "fisher_embedding_": lambda: {
        "fisher": zeros(4, 3),
        "indices": torch.tensor([[0, 1, 3, 1], [2, 0, 0, 3]]),
        "grad_outputs": ones(2, 4, 3),
    },
    "selective_dampen_": lambda: {
        "params": parameters(),
        "importance_full": parameters(),
        "importance_forget": parameters(),
        "alpha": 0.5,
        "lambda_": 0.25,
    },
    "selected_counts": lambda: {
        "importance_full": parameters(),
        "importance_forget": parameters(),
        "alphas": [0.5, 2.0],
    },
    "ratio_quantile": lambda: {"importance_full": parameters(), "importance_forget": parameters(), "q": 0.5},
    "pack_mask": lambda: {"mask": ones(3, 4, dtype=torch.bool)},
    "pack_mask.list": lambda: {"masks": [ones(3, 4, dtype=torch.bool), ones(5, dtype=torch.bool)]},
    "unpack_mask": lambda: {"packed": masks()[0], "shape": [3, 4]},
    "unpack_mask.list": lambda: {"packed": masks(), "shapes": [[3, 4], [5]]},
    "topk_mask": lambda: {"scores": parameters(), "k": 3},
    "apply_mask_": lambda: {"grads": parameters(), "masks": masks()},
    "masked_sgd_": lambda: {
        "params": parameters(),
        "grads": parameters(),
        "momentum_buffers": parameters(),
        "masks": masks(),
        "lr": 0.1,
        "momentum": 0.9,
    },
    "masked_adamw_": lambda: {
        "params": parameters(),
        "grads": parameters(),
        "exp_avgs": parameters(),
        "exp_avg_sqs": parameters(),
        "masks": masks(),
        "step": 1,
        "lr": 0.1,
    },
    "masked_adamw_.tensor_step": lambda: VALID["masked_adamw_"]() | {"step": torch.tensor(1.0)},
    "gram_accumulate_": lambda: {"gram": zeros(4, 4), "inputs": ones(3, 4)},
    "gram_conv_accumulate_": lambda: {
        "gram": zeros(12, 12),
        "inputs": ones(2, 3, 5, 6),
        "kernel_size": [2, 2],
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
    },
    "project_out": lambda: {"grad": ones(3, 4), "basis": torch.eye(4)[:, :2]},
    "project_out_": lambda: {"grad": ones(3, 4), "basis": torch.eye(4)[:, :2]},
    "project_out_.list": lambda: {
        "grads": [ones(3, 4), ones(2, 5)],
        "bases": [torch.eye(4)[:, :2], torch.eye(5)[:, :1]],
    },
    "project_onto": lambda: VALID["project_out"](),
    "project_onto_": lambda: VALID["project_out_"](),
    "project_onto_.list": lambda: VALID["project_out_.list"](),
}


@dataclass(frozen=True)
class BadCall:
    """A valid call with some arguments changed, and how it must fail.

    ``change`` holds new values, or functions of the valid arguments. ``message`` is a regular expression for
    what follows the name of the op.
    """

    schema: str
    why: str
    change: dict
    error: type[Exception]
    message: str

    def arguments(self) -> dict:
        valid = VALID[self.schema]()
        new = {name: value(valid) if callable(value) else value for name, value in self.change.items()}
        return valid | new

    def __str__(self) -> str:
        return f"{self.schema}-{self.why}"


def _must(argument):
    """The form of a message about an argument, given as a regular expression."""
    return rf"{argument} must .+, got "


# Where two arguments do not fit together, either may be named.
ANY = r"\w+\[\d\]"


def _replaced(name, index, make):
    """The list ``name`` with one tensor replaced by ``make(tensor)``."""
    return {name: lambda valid: [make(t) if i == index else t for i, t in enumerate(valid[name])]}


def _out_of_range(schema, **values):
    for name, bad in values.items():
        for value in bad:
            yield BadCall(schema, f"{name} {value}", {name: value}, ValueError, _must(name))


def _wrong_dtype(schema, name, index, dtypes, argument=None):
    for dtype in dtypes:
        change = _replaced(name, index, lambda t, dtype=dtype: t.to(dtype))
        yield BadCall(schema, f"{name} {dtype}", change, TypeError, _must(argument or rf"{name}\[{index}\]"))


NOT_FLOATS = (torch.int64, torch.bool, torch.complex64)
HALVES = (torch.float16, torch.bfloat16)


def _lists(schema, kinds):
    """What every op on lists refuses. ``kinds``: list -> values, state or bits; the first leads."""
    first, *others = kinds
    for name in others:
        short = {name: lambda valid, name=name: valid[name][:1]}
        long = {name: lambda valid, name=name: [*valid[name], valid[name][0].clone()]}
        for why, change, count in (("short", short, 1), ("long", long, 3)):
            message = f"{name} must have 2 tensors like {first}, got {count}$"
            yield BadCall(schema, f"{name} too {why}", change, ValueError, message)
        if kinds[name] != "bits":
            for shape in [(3, 4, 1), (4, 3), (12,), (1, 4), ()]:
                change = _replaced(name, 0, lambda t, shape=shape: ones(shape, dtype=t.dtype))
                yield BadCall(schema, f"{name} of shape {shape}", change, ValueError, _must(rf"{name}\[0\]"))
    for name, kind in kinds.items():
        if kind == "bits":
            yield from _wrong_dtype(schema, name, 1, (torch.bool, torch.int8, torch.float32))
            sizes = {
                "one byte short": lambda t: t[:1],
                "two rows": lambda t: t[None],
                "twice": lambda t: t.repeat(2),
            }
            for why, make in sizes.items():
                change = _replaced(name, 0, make)
                yield BadCall(schema, f"{name} {why}", change, ValueError, _must(rf"{name}\[0\]"))
        else:
            yield from _wrong_dtype(schema, name, 1, NOT_FLOATS + (HALVES if kind == "state" else ()))


OVERLAPPING = {
    "expanded rows": lambda: ones(1, 4).expand(3, 4),
    "expanded columns": lambda: ones(3, 1).expand(3, 4),
    "sliding windows": lambda: ones(6).as_strided((3, 4), (1, 1)),
    "windows with a step": lambda: ones(8).as_strided((3, 4), (2, 1)),
}


# Pairs of 3 x 4 views that share elements.
SHARING = {
    "the same": lambda: [ones(3, 4)] * 2,
    "shifted by a row": lambda: (lambda base: (base[:3], base[1:]))(ones(4, 4)),
    "shifted by an element": lambda: (lambda base: (base[:12].view(3, 4), base[1:].view(3, 4)))(ones(13)),
    "the same columns": lambda: (lambda base: (base[:, ::2], base[:, ::2]))(ones(3, 8)),
    "one column shared": lambda: (lambda base: (base[:, :4], base[:, 3:]))(ones(3, 7)),
    "rows and columns": lambda: (lambda base: (base[:3], base.T[:3]))(ones(4, 4)),
    "dense and with gaps": lambda: (lambda base: (base[:12].view(3, 4), base.view(3, 8)[:, ::2]))(ones(24)),
}


def _shared_memory(schema, written, others):
    """What an op refuses in a list it writes."""
    for why, make in OVERLAPPING.items():
        change = _replaced(written, 0, lambda t, make=make: make())
        yield BadCall(schema, f"{written} {why}", change, ValueError, _must(rf"{written}\[0\]"))
    for why, make in SHARING.items():
        for other in others:
            one, two = make()
            change = {
                written: lambda valid, one=one: [one, valid[written][1]],
                other: lambda valid, two=two, other=other: [two, valid[other][1]],
            }
            yield BadCall(schema, f"{written} and {other} {why}", change, ValueError, _must(ANY))


def _shared_within(schema, written, others):
    """Two tensors of one written list that share elements."""
    for why, make in SHARING.items():
        change = {written: lambda valid, make=make: list(make())}
        for name in others:
            change[name] = lambda valid, name=name: [valid[name][0], valid[name][0].clone()]
        yield BadCall(schema, f"{written} {why}", change, ValueError, _must(rf"{written}\[\d\]"))


# Where a shape or a dtype does not fit the others', any of them may be named.
TENSORS = r"(fisher|inputs|normalized|indices|grad_outputs)(\[0\])?"


def _layer_calls(op):
    """What all Fisher ops of layers refuse."""
    yield from _out_of_range(op, weight=(NAN, INF, -INF, 1e39), power=(0, 3, -1))
    valid = VALID[op]()
    floats = [name for name in valid if name in ("inputs", "normalized", "grad_outputs")]

    def converted(name, dtype):
        return {name: lambda valid: valid[name].to(dtype)}

    for dtype in (*NOT_FLOATS, *HALVES, torch.float64):
        yield BadCall(op, f"fisher {dtype}", converted("fisher", dtype), TypeError, _must(TENSORS))
    for name in floats:
        for dtype in (*NOT_FLOATS, torch.float64):
            yield BadCall(op, f"{name} {dtype}", converted(name, dtype), TypeError, _must(TENSORS))
        if len(floats) == 2:
            yield BadCall(op, f"{name} half", converted(name, torch.float16), TypeError, _must(TENSORS))

    fisher = _must(r"fisher(\[0\])?")
    overlapping = {"fisher": lambda valid: valid["fisher"].flatten()[:1].expand(valid["fisher"].shape)}
    yield BadCall(op, "fisher expanded", overlapping, ValueError, fisher)
    windows = {
        "fisher": lambda valid: zeros(99).as_strided(valid["fisher"].shape, [1] * valid["fisher"].dim())
    }
    if valid["fisher"].dim() > 1:
        yield BadCall(op, "fisher of windows", windows, ValueError, fisher)
    none = {name: lambda valid, name=name: valid[name][:0] for name in (*floats, "indices") if name in valid}
    yield BadCall(op, "fisher expanded, no samples", overlapping | none, ValueError, fisher)
    for name in floats:
        one = {name: lambda valid, name=name: valid["fisher"].flatten()[-1].expand(valid[name].shape)}
        yield BadCall(op, f"fisher and {name} shared", one, ValueError, _must(TENSORS))

    # Axes added, removed, longer and shorter, as far as no valid call comes of it.
    free = {"fisher_bias_": {"grad_outputs": 2}, "fisher_embedding_": {"fisher": 1}}.get(op, {})
    for name in (one for one in valid if one in ("fisher", "indices", *floats)):
        shape = valid[name].shape
        shapes = [(), (*shape, 1), shape[:-1]]
        shapes += [] if len(shape) == 1 else [(math.prod(shape),)]
        shapes += [] if name in free else [(1, *shape)]
        for axis in range(free.get(name, 0), len(shape)):
            shapes += [
                (*shape[:axis], size, *shape[axis + 1 :]) for size in (shape[axis] + 1, shape[axis] - 1)
            ]
        for other in shapes:
            change = {name: lambda valid, name=name, other=other: zeros(other, dtype=valid[name].dtype)}
            yield BadCall(op, f"{name} of shape {list(other)}", change, ValueError, _must(TENSORS))


def _bad_calls():
    infinite = (NAN, INF, -INF)

    op = "fisher_accumulate_"
    yield from _out_of_range(op, weight=infinite, decay=(*infinite, -0.5), power=(0, 3, -1))
    yield from _lists(op, {"fisher": "state", "grads": "values"})
    yield from _shared_memory(op, "fisher", ["grads"])
    yield from _shared_within(op, "fisher", ["grads"])
    for name in ("fisher", "grads"):
        yield from _wrong_dtype(op, name, 1, [torch.float64], ANY)
    # Two rows that share an element, between the rows of a third tensor that shares none with them.
    base = zeros(4, 8)
    between = {"fisher": [base[:, :4], base[1, 4:7], base[1, 5:]], "grads": [ones(4, 4), ones(3), ones(3)]}
    yield BadCall(op, "fisher between the rows of another", between, ValueError, _must(r"fisher\[\d\]"))

    for op in LAYER_OPS:
        yield from _layer_calls(op)

    op = "fisher_conv_"
    wrong = {
        "stride": ([1], [1, 1, 1], [0, 1], [-1, 1], []),
        "dilation": ([1], [1, 1, 1], [0, 1], [1, -1], []),
        "padding": ([0], [0, 0, 0], [0] * 5, [-1, 0], [0, 0, -1, 0], []),
        "groups": (0, -1, 2, 3, 4, 2**40),
    }
    for name, values in wrong.items():
        other = f"({name}|{TENSORS})" if name == "groups" else name
        for value in values:
            yield BadCall(op, f"{name} {value}", {name: value}, ValueError, _must(other))
    # Of the right form, but the gradients are not of the size they give.
    wrong = {
        "stride": ([2, 1], [1, 2], [2**62, 1]),
        "dilation": ([2, 1], [1, 5], [1, 6], [2**62, 1]),
        "padding": ([1, 0], [0, 0, 0, 1], [2, 2, 2, 2], [2**61, 0]),
    }
    for name, values in wrong.items():
        for value in values:
            message = _must(f"({name}|{TENSORS})")
            yield BadCall(op, f"{name} {value}", {name: value}, ValueError, message)
    for n_dims in (0, 4):
        change = {name: ones(1, 1, *[1] * n_dims) for name in ("fisher", "inputs", "grad_outputs")}
        change |= {"stride": [1] * n_dims, "padding": [0] * n_dims, "dilation": [1] * n_dims}
        yield BadCall(op, f"{n_dims} spatial dimensions", change, ValueError, _must(TENSORS))
    no_taps = {"fisher": zeros(4, 3, 2, 0), "grad_outputs": ones(2, 4, 4, 7)}
    yield BadCall(op, "kernel without taps", no_taps, ValueError, _must(TENSORS))

    for op in ("fisher_bias_", "fisher_affine_"):
        yield from _out_of_range(op, channel_dim=(0, -3, 3, -4, 2**40, -(2**63)))
        change = {"channel_dim": 1}
        yield BadCall(op, "channels of another axis", change, ValueError, _must(TENSORS))
        vectors = {name: ones(4) for name in VALID[op]() if name != "fisher"}
        yield BadCall(op, "no axis of samples", vectors, ValueError, _must(f"({TENSORS}|channel_dim)"))

    op = "fisher_embedding_"
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16, torch.complex64):
        change = {"indices": lambda valid, dtype=dtype: valid["indices"].to(dtype)}
        yield BadCall(op, f"indices {dtype}", change, TypeError, _must(r"indices(\[0\])?"))
    for dtype, values in {torch.int64: (-1, 4, -(2**63), 2**40), torch.int32: (-1, 4)}.items():
        for value in values:
            indices = torch.tensor([[0, 1, 3, 1], [2, 0, value, 3]], dtype=dtype)
            message = rf"indices must .+, got {value}$"
            for padding_idx in (-1, 2):
                change = {"indices": indices, "padding_idx": padding_idx}
                why = f"index {value} {dtype}, padding {padding_idx}"
                yield BadCall(op, why, change, ValueError, message)
    yield from _out_of_range(op, padding_idx=(-2, 4, 2**40, -(2**63)))
    bits_shared = {
        "fisher": base,
        "indices": base.view(torch.int64)[:2, :2],
        "grad_outputs": ones(2, 2, 8),
    }
    yield BadCall(op, "fisher and indices shared", bits_shared, ValueError, _must(TENSORS))

    op = "selective_dampen_"
    importances = ["importance_full", "importance_forget"]
    yield from _out_of_range(
        op, alpha=(*infinite, -1e-9), lambda_=(*infinite, -1.0), exponent=(*infinite, 0.0, -1.0)
    )
    yield from _out_of_range(op, beta_min=(*infinite, -0.1), beta_max=(NAN, -INF, -0.1))
    above = {"beta_min": 0.5, "beta_max": 0.25}
    yield BadCall(op, "beta_min above beta_max", above, ValueError, _must("beta_m(in|ax)"))
    yield from _lists(op, {"params": "values"} | dict.fromkeys(importances, "state"))
    yield from _shared_memory(op, "params", importances)
    yield from _shared_within(op, "params", importances)
    for name in ("params", *importances):
        yield from _wrong_dtype(op, name, 1, [torch.float64], ANY)

    op = "selected_counts"
    yield from _lists(op, dict.fromkeys(importances, "state"))
    for value in (*infinite, -1.0):
        yield BadCall(op, f"alpha {value}", {"alphas": [1.0, value]}, ValueError, _must(r"alphas(\[1\])?"))
    for name in importances:
        yield from _wrong_dtype(op, name, 1, [torch.float64], ANY)

    op = "ratio_quantile"
    yield from _lists(op, dict.fromkeys(importances, "state"))
    yield from _out_of_range(op, q=(*infinite, -1e-9, 1.0 + 1e-9))
    nothing_left = {
        "no tensors": ([], []),
        "no scalars": ([zeros(0)], [zeros(0)]),
        "only x/0": ([zeros(3)], [ones(3)]),
        "only 0/0": ([zeros(3)], [zeros(3)]),
        "only NaN": ([torch.full((3,), NAN)], [ones(3)]),
    }
    for why, (full, forget) in nothing_left.items():
        change = {"importance_full": full, "importance_forget": forget}
        yield BadCall(op, why, change, ValueError, r"importance_\w+.* must .*finite.*, got ")
    for name in importances:
        yield from _wrong_dtype(op, name, 1, [torch.float64], ANY)

    for dtype in (torch.uint8, torch.float32, torch.int64):
        yield BadCall("pack_mask", f"{dtype}", {"mask": ones(3, dtype=dtype)}, TypeError, _must("mask"))

    op = "unpack_mask"
    for dtype in (torch.bool, torch.float32, torch.int8):
        yield BadCall(op, f"{dtype}", {"packed": ones(2, dtype=dtype)}, TypeError, _must("packed"))
    for shape in ([3, 6], [8], [0], [], [2**40], [2**62, 2**62]):
        yield BadCall(op, f"shape {shape}", {"shape": shape}, ValueError, _must("(packed|shape)"))
    for shape in ([-1], [-3, -4], [3, -4]):
        yield BadCall(op, f"shape {shape}", {"shape": shape}, ValueError, _must("shape"))
    yield BadCall(op, "two rows", {"packed": masks()[0][None]}, ValueError, _must("packed"))

    # The first of a list is fine.
    for dtype in (torch.uint8, torch.float32, torch.int64):
        change = _replaced("masks", 1, lambda t, dtype=dtype: t.to(dtype))
        yield BadCall("pack_mask.list", f"{dtype}", change, TypeError, _must(r"masks\[1\]"))
    op = "unpack_mask.list"
    for dtype in (torch.bool, torch.float32, torch.int8):
        change = _replaced("packed", 1, lambda t, dtype=dtype: t.to(dtype))
        yield BadCall(op, f"{dtype}", change, TypeError, _must(r"packed\[1\]"))
    for shape in ([9], [0], [2, 8], [2**40], [2**62, 2**62]):
        change = {"shapes": [[3, 4], shape]}
        yield BadCall(op, f"shape {shape}", change, ValueError, _must(r"(packed|shapes)\[1\]"))
    for shape in ([-1], [-5, -1]):
        yield BadCall(op, f"shape {shape}", {"shapes": [[3, 4], shape]}, ValueError, _must(r"shapes\[1\]"))
    change = _replaced("packed", 1, lambda t: t[None])
    yield BadCall(op, "two rows", change, ValueError, _must(r"packed\[1\]"))
    for shapes in ([[3, 4]], [], [[3, 4], [5], [1]]):
        told = f"shapes must have 2 entries like packed, got {len(shapes)}$"
        yield BadCall(op, f"{len(shapes)} shapes", {"shapes": shapes}, ValueError, told)
    yield BadCall(op, "no bits", {"packed": []}, ValueError, "shapes must have 0 entries like packed, got 2$")

    op = "topk_mask"
    yield from _out_of_range(op, k=(-1, 18, 2**40))
    yield BadCall(op, "k of no scores", {"scores": [], "k": 1}, ValueError, "k must .+, got 1$")
    nan = {"scores": [ones(3), torch.tensor([1.0, NAN])]}
    yield BadCall(op, "NaN", nan, ValueError, _must(r"scores\[1\]"))
    yield from _wrong_dtype(op, "scores", 1, (*NOT_FLOATS, torch.float16, torch.float64))

    op = "apply_mask_"
    yield from _lists(op, {"grads": "values", "masks": "bits"})
    yield from _shared_memory(op, "grads", [])
    yield from _shared_within(op, "grads", ["masks"])

    op = "masked_sgd_"
    yield from _out_of_range(op, lr=(*infinite, -0.1), momentum=(*infinite, -0.1), dampening=infinite)
    yield from _out_of_range(op, weight_decay=(*infinite, -0.1))
    yield from _lists(
        op, {"params": "values", "grads": "values", "momentum_buffers": "state", "masks": "bits"}
    )
    yield from _shared_memory(op, "params", ["grads", "momentum_buffers"])
    yield from _shared_memory(op, "momentum_buffers", ["grads"])
    yield from _shared_within(op, "params", ["grads", "momentum_buffers", "masks"])
    missing = {"momentum_buffers": []}
    message = "momentum_buffers must have 2 tensors like params, got 0$"
    yield BadCall(op, "momentum without buffers", missing, ValueError, message)
    for change in ({"momentum": 0.0}, {"dampening": 0.1}):
        yield BadCall(
            op, f"nesterov with {change}", {"nesterov": True} | change, ValueError, _must("nesterov")
        )
    for name in ("params", "grads"):
        yield from _wrong_dtype(op, name, 1, [torch.float16, torch.float64], ANY)

    states = ["exp_avgs", "exp_avg_sqs"]
    for op in ("masked_adamw_", "masked_adamw_.tensor_step"):
        yield from _out_of_range(
            op, lr=(*infinite, -0.1), eps=(*infinite, -1e-8), weight_decay=(*infinite, -0.1)
        )
        yield from _out_of_range(op, beta1=(*infinite, -0.1, 1.0), beta2=(*infinite, -0.1, 1.0))
        kinds = {"params": "values", "grads": "values"} | dict.fromkeys(states, "state") | {"masks": "bits"}
        yield from _lists(op, kinds)
        yield from _shared_memory(op, "params", ["grads", *states])
        yield from _shared_memory(op, "exp_avgs", ["exp_avg_sqs"])
        yield from _shared_within(op, "exp_avg_sqs", ["params", "grads", "exp_avgs", "masks"])
        for name in ("params", "grads"):
            yield from _wrong_dtype(op, name, 1, [torch.float16, torch.float64], ANY)
    yield from _out_of_range("masked_adamw_", step=(0, -1))
    op = "masked_adamw_.tensor_step"
    for value in (0.0, -1.0, NAN):
        yield BadCall(op, f"step {value}", {"step": torch.tensor(value)}, ValueError, _must("step"))
    yield BadCall(op, "step of one dimension", {"step": torch.tensor([1.0])}, ValueError, _must("step"))
    for dtype in (*NOT_FLOATS, *HALVES):
        change = {"step": torch.tensor(1).to(dtype)}
        yield BadCall(op, f"step {dtype}", change, TypeError, _must("step"))

    op = "gram_accumulate_"
    gram, inputs, either = _must(r"gram(\[0\])?"), _must(r"inputs(\[0\])?"), _must(r"(gram|inputs)(\[0\])?")
    for shape in [(4, 5), (5, 5), (4,), (1, 4, 4), ()]:
        yield BadCall(op, f"gram of shape {shape}", {"gram": zeros(shape)}, ValueError, gram)
    yield BadCall(op, "inputs 0-d", {"inputs": torch.tensor(1.0)}, ValueError, inputs)
    for dtype in (*NOT_FLOATS, *HALVES):
        yield BadCall(op, f"gram {dtype}", {"gram": zeros(4, 4, dtype=dtype)}, TypeError, gram)
    for dtype in NOT_FLOATS:
        yield BadCall(op, f"inputs {dtype}", {"inputs": ones(3, 4, dtype=dtype)}, TypeError, inputs)
    overlapping = {"expanded": zeros(1, 4).expand(4, 4), "windows": zeros(10).as_strided((4, 4), (2, 1))}
    for why, bad in overlapping.items():
        yield BadCall(op, why, {"gram": bad}, ValueError, gram)
        yield BadCall(op, f"{why}, no rows", {"gram": bad, "inputs": zeros(0, 4)}, ValueError, gram)
    shared = {
        "same": lambda g: g,
        "transposed": lambda g: g.T,
        "rows": lambda g: g[:2],
        "row": lambda g: g[1],
    }
    for why, view in shared.items():
        change = {"inputs": lambda valid, view=view: view(valid["gram"])}
        yield BadCall(op, f"gram and inputs {why}", change, ValueError, either)
    with_gaps = (lambda base: {"gram": base[:, ::2], "inputs": base[:, ::2]})(zeros(4, 8))
    yield BadCall(op, "gram and inputs same columns", with_gaps, ValueError, either)

    op = "gram_conv_accumulate_"
    wrong = {
        "kernel_size": ([2], [2, 2, 2], [0, 2], [-1, 2], [6, 2], [2, 7], []),
        "stride": ([1], [1, 1, 1], [0, 1], [-1, 1], []),
        "dilation": ([1], [1, 1, 1], [0, 1], [1, -1], [5, 1], []),
        "padding": ([0], [0, 0, 0], [0] * 5, [-1, 0], [0, 0, -1, 0], []),
        "groups": (0, -1, 2, 4),
    }
    for name, values in wrong.items():
        for value in values:
            yield BadCall(op, f"{name} {value}", {name: value}, ValueError, _must(f"({name}|inputs)"))
    for shape in [(11, 11), (12, 11), (12,), (2, 12, 12)]:
        yield BadCall(op, f"gram of shape {shape}", {"gram": zeros(shape)}, ValueError, gram)
    for shape in [(12, 12), (4, 4), (2, 4, 4)]:
        change = {"gram": zeros(shape), "groups": 3}
        yield BadCall(op, f"gram of shape {shape} for 3 groups", change, ValueError, gram)
    for shape in [(3, 5, 6), (2, 3, 5, 6, 1), (5,)]:
        yield BadCall(op, f"inputs of shape {shape}", {"inputs": ones(shape)}, ValueError, inputs)
    yield BadCall(op, "gram float16", {"gram": zeros(12, 12, dtype=torch.float16)}, TypeError, gram)
    yield BadCall(op, "inputs int64", {"inputs": ones(2, 3, 5, 6, dtype=torch.int64)}, TypeError, inputs)
    yield BadCall(op, "gram expanded", {"gram": zeros(1, 12).expand(12, 12)}, ValueError, gram)
    shared = {"inputs": lambda valid: valid["gram"].flatten()[:90].view(1, 3, 5, 6)}
    yield BadCall(op, "gram and inputs shared", shared, ValueError, either)
    # 2^32 places by 2^31: one patch more than can be counted.
    huge = {"gram": zeros(1, 1), "inputs": ones(1, 1, 2, 2), "kernel_size": [1, 1], "stride": [1, 1]}
    huge |= {"padding": [2**31 - 1, 2**30 - 1], "dilation": [1, 1], "groups": 1}
    yield BadCall(
        op, "2^63 patches", huge, ValueError, "the patches must have fewer than 2\\^63 scalars, got "
    )

    grad, basis, either = _must(r"grad(\[0\])?"), _must(r"basis(\[0\])?"), _must(r"(grad|basis)(\[0\])?")
    for op in ("project_out", "project_out_", "project_onto", "project_onto_"):
        for shape in [(4,), (), (3, 2), (5, 2), (4, 5), (2, 4, 2), (0, 4, 2), (1, 1, 4, 2)]:
            yield BadCall(op, f"basis of shape {shape}", {"basis": zeros(shape)}, ValueError, basis)
        yield BadCall(op, "grad 0-d", {"grad": torch.tensor(1.0)}, ValueError, grad)
        for dtype in NOT_FLOATS:
            yield BadCall(op, f"grad {dtype}", {"grad": ones(3, 4, dtype=dtype)}, TypeError, grad)
        for dtype in (*NOT_FLOATS, torch.float16, torch.float64):
            yield BadCall(op, f"basis {dtype}", {"basis": zeros(4, 2, dtype=dtype)}, TypeError, basis)
        yield BadCall(op, "grad float64", {"grad": ones(3, 4, dtype=torch.float64)}, TypeError, basis)
    for op in ("project_out_", "project_onto_"):
        for why, make in OVERLAPPING.items():
            yield BadCall(op, f"grad {why}", {"grad": make()}, ValueError, grad)
        shared = {"basis": lambda valid: valid["grad"].flatten()[:8].view(4, 2)}
        yield BadCall(op, "grad and basis shared", shared, ValueError, either)
        columns = (lambda base: {"grad": base[:, :4], "basis": base[:, 3:5]})(ones(4, 8))
        yield BadCall(op, "grad and basis one column shared", columns, ValueError, either)

    for op in ("project_out_.list", "project_onto_.list"):
        short = {"bases": lambda valid: valid["bases"][:1]}
        yield BadCall(
            op, "bases too short", short, ValueError, "bases must have 2 tensors like grads, got 1$"
        )
        yield BadCall(
            op, "no grads", {"grads": []}, ValueError, "bases must have 0 tensors like grads, got 2$"
        )
        # The first pair is fine and must not be touched either.
        change = _replaced("bases", 1, lambda t: zeros(4, 2))
        yield BadCall(op, "basis of another layer", change, ValueError, _must(r"bas[ei]s\[1\]"))
        yield from _wrong_dtype(op, "bases", 1, [torch.float64, torch.int64], r"bas[ei]s\[1\]")
        yield from _wrong_dtype(op, "grads", 1, [torch.int64], r"grads?\[1\]")
        change = _replaced("grads", 1, lambda t: ones(1, 5).expand(2, 5))
        yield BadCall(op, "grad expanded", change, ValueError, _must(r"grads?\[1\]"))
        for why, make in SHARING.items():
            change = {
                "grads": lambda valid, make=make: list(make()),
                "bases": lambda valid: [valid["bases"][0], valid["bases"][0].clone()],
            }
            yield BadCall(op, f"grads {why}", change, ValueError, _must(r"grads?\[\d\]"))


BAD_CALLS = list(_bad_calls())


each_door = pytest.mark.parametrize("door", ["torch.ops", pytest.param("_C", marks=compiled)])


def _doors(schema):
    return CASE_OF[schema].doors


@pytest.mark.parametrize("schema", VALID)
def test_the_calls_that_the_bad_ones_are_made_from_succeed(schema):
    for door in _doors(schema).values():
        door(**VALID[schema]())


@each_door
@pytest.mark.parametrize("bad", BAD_CALLS, ids=str)
def test_bad_calls_fail_and_write_nothing(bad, door):
    arguments = bad.arguments()
    before = [bits(tensor).clone() for tensor in tensors_of(arguments)]
    with pytest.raises(bad.error, match=f"^{re.escape(CASE_OF[bad.schema].name)}: {bad.message}") as raised:
        _doors(bad.schema)[door](**arguments)
    assert type(raised.value) is bad.error
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert torch.equal(bits(tensor), old)


def test_every_op_has_bad_calls():
    assert {bad.schema for bad in BAD_CALLS} == set(VALID) == set(CASE_OF)


@pytest.mark.parametrize("schema", [name for name in VALID if CASE_OF[name].written])
def test_tensors_without_memory_are_refused(schema):
    for door in _doors(schema).values():
        with pytest.raises(NotImplementedError):
            door(**mapped(lambda tensor: tensor.to("meta"), VALID[schema]()))


@pytest.mark.parametrize("schema", VALID)
def test_sparse_tensors_are_refused(schema):
    for name, value in VALID[schema]().items():
        tensors = list(tensors_of(value))
        if not tensors or tensors[0].dim() == 0:
            continue
        sparse = mapped(lambda tensor: tensor.to_sparse(), value)
        for door in _doors(schema).values():
            with pytest.raises((ValueError, NotImplementedError)):
                door(**(VALID[schema]() | {name: sparse}))


@pytest.mark.cuda
@each_door
@pytest.mark.parametrize("schema", [name for name in VALID if "pack_mask" not in name])
def test_tensors_of_one_row_must_be_on_one_device(schema, door):
    if not torch.cuda.is_available() or not ops.build_info()["cuda"]:
        pytest.skip("needs a CUDA device")
    valid = VALID[schema]()
    on_gpu = mapped(torch.Tensor.cuda, valid)
    names = [name for name, value in valid.items() if list(tensors_of(value)) and name != "step"]
    for name in names:
        if name == "scores":
            on_gpu["scores"] = [valid["scores"][0], on_gpu["scores"][1]]
        arguments = on_gpu | {name: valid[name] if name != "scores" else on_gpu["scores"]}
        before = [bits(tensor).clone() for tensor in tensors_of(arguments)]
        with pytest.raises(ValueError, match=r"must be on .*, got "):
            _doors(schema)[door](**arguments)
        for tensor, old in zip(tensors_of(arguments), before, strict=True):
            assert torch.equal(bits(tensor), old)
