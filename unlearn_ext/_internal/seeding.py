"""Random numbers that do not depend on what was run before."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from unlearn_ext._internal.undo import Undone


@contextmanager
def random_states_kept(*data: object, devices: Iterable[int] | None = None) -> Iterator[None]:
    """Put every random generator that a pass may draw from back as it was.

    Args:
        *data: Loaders whose own generators are put back too.
        devices: The CUDA devices whose generators are; None: all.

    Yields:
        Nothing.

    Example:
        >>> with random_states_kept():
        ...     a = torch.rand(2), random.random(), np.random.rand()
        >>> with random_states_kept():
        ...     b = torch.rand(2), random.random(), np.random.rand()
        >>> torch.equal(a[0], b[0]), a[1:] == b[1:]
        (True, True)
    """
    own = {id(generator): generator for entry in data for generator in generators_of(entry)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    python, numpy = random.getstate(), np.random.get_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)

    of_torch = torch.random.fork_rng(range(torch.cuda.device_count()) if devices is None else devices)
    with Undone(put_back), of_torch:
        yield


@contextmanager
def seeded(seed: int, *data: object) -> Iterator[None]:
    """Set every random generator that a pass may draw from, and put all of them back afterwards.

    Those of torch (all CUDA devices too), NumPy and Python, and the loaders' own, so that what is run inside
    does not depend on what was run before.

    Args:
        seed: The seed.
        *data: Loaders whose own generators are set too.

    Yields:
        Nothing.

    Example:
        >>> with seeded(0):
        ...     a = torch.rand(2)
        >>> with seeded(0):
        ...     b = torch.rand(2)
        >>> torch.equal(a, b)
        True
    """
    with random_states_kept(*data):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for entry in data:
            for generator in generators_of(entry):
                generator.manual_seed(seed)
        yield


def generators_of(data: object) -> Iterator[torch.Generator]:
    """Find the generators that a loader draws from, beside the global ones.

    Args:
        data: Batches.

    Yields:
        Those of the loader and of its samplers.
    """
    places = [data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)]
    places.append(getattr(places[-1], "sampler", None))
    for place in places:
        generator = getattr(place, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
