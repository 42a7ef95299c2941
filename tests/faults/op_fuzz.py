"""Random calls of every op: ``python tests/faults/op_fuzz.py --calls 1000000``.

Each call goes through ``torch.ops``, through the direct door and to the kernels in plain PyTorch, on copies
of the same arguments: any shapes, dtypes, layouts, aliases and numbers, most of them fit, some do not. All
three give the same answer and leave the same in what they write, or refuse in the same words and write
nothing.
"""

import argparse
import collections
import copy
import math
import warnings

import torch
from op_draws import EXACT, OPS, Draw, spoiled, tensors_in

from unlearn_ext import _C
from unlearn_ext.ops.fallback import KERNELS


def run(call, arguments, settings):
    """Call on a copy; what comes back, what was left in the arguments, and the words of a refusal."""
    # The huge ones share one element: copied as they are.
    given = copy.deepcopy(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            back = call(*given, **settings)
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        return given, None, error
    return given, back, None


def _bits(tensor):
    flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8) if flat.numel() else flat


UNITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def terms_of(name, arguments, settings, n_results, largest, unit):
    """How large the terms are whose sums the results and arguments are: sums are exact to a share of it."""
    given = list(tensors_in(arguments))
    if name in POWERS_OF_SUMS:
        return [powers_of_terms(name, arguments, settings, largest, unit)] * (n_results + len(given))
    if name.startswith("masked"):  # a step may leave next to nothing of a parameter
        return [*[0.0] * n_results, *map(_largest, given)]
    if not name.startswith("project"):
        return [0.0] * (n_results + len(given))
    grads, bases = ([value] if isinstance(value, torch.Tensor) else value for value in arguments)
    sizes = [(_largest(grad), max(1.0, _largest(basis))) for grad, basis in zip(grads, bases, strict=True)]
    terms = [grad * basis * basis for grad, basis in sizes]
    return [max((term for term in terms if math.isfinite(term)), default=0.0)] * (n_results + len(given))


POWERS_OF_SUMS = {"fisher_linear_", "fisher_bias_", "fisher_affine_", "fisher_embedding_", "fisher_conv_"}


def powers_of_terms(name, arguments, settings, largest, unit):
    """How far powers of sums are off where sums are off by a share ``unit`` of their terms; divided by it.

    Terms that cancel leave a sum s far smaller than their own size t: it is off by unit * t, its square by
    2 s unit t + (unit t)^2.
    """
    *factors, grads = arguments[1:]
    if not all(isinstance(factor, torch.Tensor) for factor in (*factors, grads)) or grads.ndim < 2:
        return 0.0
    n_places = math.prod(grads.shape[2:] if name == "fisher_conv_" else grads.shape[1:-1])
    sizes = [_largest(factor) for factor in (*factors, grads) if factor.is_floating_point()]
    term = max(1, n_places) * math.prod(sizes)
    weight = abs(settings.get("weight", 1.0))
    if settings.get("power", 2) == 1:
        found = weight * term
    else:
        found = 2 * math.sqrt(weight * largest) * term + weight * unit * term * term
    found *= max(1, len(grads))
    return found if math.isfinite(found) else 0.0


def _largest(tensor):
    if tensor.device.type == "meta" or tensor.numel() > 2**30:
        return 0.0
    finite = tensor[torch.isfinite(tensor)].double().abs()
    return float(finite.max()) if finite.numel() else 0.0


def same(a, b, unit, least=0.0):
    """Whether two tensors are alike: bit by bit where unit is 0, else as sums of terms of size `least`."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type == "meta" or a.numel() == 0 or a.numel() > 2**30:
        return True
    if not unit or not a.is_floating_point():
        return torch.equal(_bits(a), _bits(b))
    x, y = a.double(), b.double()
    odd = ~(torch.isfinite(x) & torch.isfinite(y))
    if odd.any():  # an overflow on the way may come earlier or later
        if not bool((~torch.isfinite(x[odd]) | ~torch.isfinite(y[odd])).all()):
            return False
        x, y = x[~odd], y[~odd]
    size = max(least, float(x.abs().max()) if x.numel() else 0.0)
    return bool(((x - y).abs() <= unit * (size + x.abs()) + 1e-44).all())


def words_of(error):
    """What a refusal says; which of two that share memory is named first depends on where they lie."""
    text = str(error).split("\n")[0]
    for what in ("must not share memory with another argument", "can't allocate memory"):
        if what in text:
            return what
    return text


def judge(name, arguments, settings):
    """Run a call through all doors.

    Returns:
        What happened: ``"answered"``, ``"refused"``, or what is wrong with it.
    """
    packet, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.unlearn_ext, packet), overload or "default")
    before = copy.deepcopy(arguments)
    has_meta = any(tensor.device.type == "meta" for tensor in tensors_in(arguments))
    given, back, error = run(op, arguments, settings)
    if error is not None:
        touched = [
            not torch.equal(_bits(a), _bits(b))
            for a, b in zip(tensors_in(given), tensors_in(before), strict=True)
            if a.device.type != "meta" and a.numel() < 2**30
        ]
        if any(touched):
            return f"refused and written: {error}"
    doors = {"direct door": getattr(_C, packet), "plain PyTorch": KERNELS[name]}
    if has_meta:  # what the dispatcher never hands to kernels
        del doors["plain PyTorch"]
    for door, call in doors.items():
        theirs, answer, refusal = run(call, arguments, settings)
        if (error is None) != (refusal is None):
            return f"{door} differs: {error!r} against {refusal!r}"
        if error is not None:
            words = {words_of(error), words_of(refusal)}
            if (
                len(words) > 1 and "can't allocate memory" not in words
            ):  # at which point memory runs out may differ
                return f"{door} says otherwise: {error!r} against {refusal!r}"
            continue
        dtypes = [tensor.dtype for tensor in tensors_in(arguments) if tensor.is_floating_point()]
        coarsest = max((UNITS.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        unit = 0.0 if name in EXACT or door == "direct door" else coarsest
        mine = [*tensors_in([back]), *tensors_in(given)]
        others = [*tensors_in([answer]), *tensors_in(theirs)]
        terms = [0.0] * len(mine)
        if unit:
            n_results = len(mine) - len(list(tensors_in(given)))
            largest = _largest(mine[n_results]) if name in POWERS_OF_SUMS else 0.0
            terms = terms_of(name, arguments, settings, n_results, largest, unit)
        if len(mine) != len(others) or not all(map(same, mine, others, [unit] * len(mine), terms)):
            return f"{door} has another answer"
    return "refused" if error is not None else "answered"


def is_symmetric(gram):
    """Whether a matrix is its own transpose; of what is none, an op says what is wrong with it."""
    if not isinstance(gram, torch.Tensor) or gram.device.type == "meta" or gram.ndim != 2:
        return True
    return gram.shape[0] != gram.shape[1] or gram.numel() > 2**20 or torch.equal(_bits(gram), _bits(gram.T))


def fuzz(n_calls, seed, say=None):
    """Make random calls.

    Args:
        n_calls: How many.
        seed: Of the first; every call can be made again by its own.
        say: What to do with what is wrong.

    Returns:
        How often what happened.
    """
    happened = collections.Counter()
    for number in range(seed, seed + n_calls):
        draw = Draw(number)
        name = draw.random.choice(list(OPS))
        arguments, settings = OPS[name](draw)
        if draw.random.random() < 0.3:
            arguments = spoiled(draw, arguments)
        if name.startswith("gram") and not is_symmetric(arguments[0]):
            continue  # of what is no Gram matrix the two halves are nobody's business
        outcome = judge(name, arguments, settings)
        if outcome not in ("answered", "refused"):
            if say is not None:
                say(f"call {number}, {name}: {outcome}")
            outcome = "wrong"
        happened[outcome] += 1
    return happened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = fuzz(options.calls, options.seed, lambda text: print(text, flush=True))
    print(dict(found))
    raise SystemExit(bool(found["wrong"]))
