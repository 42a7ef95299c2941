"""Times the contenders of one group in turns, after each has shown that it computes the right thing."""

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Of the tensors an op writes, this many scalars are compared with the reference: all of a ViT-B/16 and its
# optimizer state. For larger models a copy of everything would not fit beside the tensors themselves.
_COMPARED_SCALARS = 300_000_000

FLOOR = "floor"


@dataclass
class Contender:
    """One way to do what the op does.

    Attributes:
        run: Does it once. Writes the race's tensors, or returns what is to be compared.
        read: Turns what ``run`` returned into tensors; not timed.
        compared: False for something that does other work and is only there for its time.
    """

    run: Callable[[], object]
    read: Callable[[Any], Any] | None = None
    compared: bool = True


@dataclass
class Race:
    """Everything that is timed together.

    Attributes:
        reference: What the contenders are compared with.
        contenders: Who takes part, by name.
        written: What the contenders write, if they write in place; all write the same tensors. Those of a
            tuple depend on one another and are compared and restored together.
        bytes_moved: What an ideal implementation reads and writes; 0 where arithmetic is the limit.
        floor: Tensors to write and tensors to read for an in-place addition, from whose speed the time that
            ``bytes_moved`` must take is derived.
        drifts: Running it over and over would leave the range of ordinary values, so ``written`` is restored
            before every run.
        rtol: Relative tolerance of the comparison, with an absolute one of the same size.
        read_reference: As ``Contender.read``.
    """

    reference: Callable[[], object]
    contenders: dict[str, Contender]
    written: Sequence[Tensor | tuple[Tensor, ...]] = ()
    bytes_moved: float = 0.0
    floor: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None
    drifts: bool = False
    rtol: float = 1e-5
    read_reference: Callable[[Any], Any] | None = None
    floor_bytes: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.floor is not None:
            written, read = self.floor
            # A copy moves the most bytes per second on a GPU, an addition in place on a CPU.
            if read[0].is_cuda:
                run = functools.partial(torch._foreach_copy_, [torch.empty_like(t) for t in read], read)
                self.floor_bytes = float(sum(2 * t.nbytes for t in read))
            else:
                run = functools.partial(torch._foreach_add_, written, read, alpha=0)
                self.floor_bytes = float(sum(2 * t.nbytes for t in written) + sum(t.nbytes for t in read))
            self.contenders[FLOOR] = Contender(run, compared=False)

    def only(self, names: Sequence[str], reference: str) -> "Race":
        """Leave out contenders; ``reference`` is the name under which the reference takes part."""
        everyone = {reference: Contender(self.reference, self.read_reference), **self.contenders}
        self.contenders = {name: everyone[name] for name in names}
        return self


@dataclass
class Times:
    """Seconds per lap of every contender, and why a contender was not timed."""

    laps: dict[str, list[float]]
    failures: dict[str, str]


def run_race(race: Race, device: torch.device, seconds: float, laps: tuple[int, int]) -> Times:
    """Check every contender, then let them take turns.

    Args:
        race: The contenders.
        device: Where their tensors are.
        seconds: Time that one contender may take altogether, or three times as much for its least number of
            laps.
        laps: Least and greatest number of laps.

    Returns:
        The lap times.
    """
    start = _Start(race)
    times = Times({}, dict(_failures(race, start)))
    running = {name: c.run for name, c in race.contenders.items() if name not in times.failures}
    before = start.restore if race.drifts else None
    times.laps = take_turns(running, device, seconds, laps, before=before)
    return times


def take_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float,
    laps: tuple[int, int],
    *,
    before: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time callables lap by lap, every one once in a lap.

    Args:
        runs: What to time, by name.
        device: Where it computes.
        seconds: As for ``run_race``.
        laps: Likewise.
        before: Called before every run, outside its time.

    Returns:
        The times of the laps in seconds, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    if not runs:
        return times
    stopwatch = _cuda_stopwatch() if device.type == "cuda" else _cpu_stopwatch
    gc.collect()
    gc.disable()
    try:
        names = list(runs)
        for lap in range(laps[1]):
            # The order changes, because a contender finds in the caches what the one before it left there.
            for name in names[lap % len(names) :] + names[: lap % len(names)]:
                done = times[name]
                enough = len(done) >= laps[0] or sum(done) > 3 * seconds
                if enough and sum(done) + max(done) > seconds:
                    continue
                if before is not None:
                    before()
                done.append(stopwatch(runs[name]))
    finally:
        gc.enable()
    return times


class _Start:
    """The written tensors as they were, as far as they are compared."""

    def __init__(self, race: Race) -> None:
        self.tensors: list[Tensor] = []
        for entry in race.written:
            together = [entry] if isinstance(entry, Tensor) else list(entry)
            if sum(t.numel() for t in [*self.tensors, *together]) > _COMPARED_SCALARS:
                break
            self.tensors += together
        self.values = [tensor.clone() for tensor in self.tensors]

    def restore(self) -> None:
        if self.tensors:
            torch._foreach_copy_(self.tensors, self.values)


def _failures(race: Race, start: _Start) -> Iterator[tuple[str, str]]:
    def outcome(contender: Contender) -> list[Tensor]:
        start.restore()
        result = contender.run()
        if race.written:
            return [tensor.clone() for tensor in start.tensors]
        result = contender.read(result) if contender.read else result
        return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]

    expected = outcome(Contender(race.reference, race.read_reference))
    options = {"rtol": race.rtol, "atol": race.rtol, "check_dtype": False, "check_stride": False}
    for name, contender in race.contenders.items():
        try:
            got = outcome(contender)
            if contender.compared:
                torch.testing.assert_close(got, expected, **options)
        except Exception as error:
            yield name, f"{type(error).__name__}: {error}"
    start.restore()


def _cpu_stopwatch(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_stopwatch() -> Callable[[Callable[[], object]], float]:
    # Larger than any L2 cache: a lap must not find its tensors there because the last one left them. Read and
    # not written, because a cache full of written lines would have to be emptied during the lap.
    flush = torch.zeros(128 * 2**20, dtype=torch.int32, device="cuda")
    largest = torch.zeros((), dtype=torch.int32, device="cuda")

    def stopwatch(run: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.amax(flush, (0,), out=largest)
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return stopwatch


class Replay:
    """A clock for pytest-benchmark that shows lap times measured before.

    pytest-benchmark times one contender after the other; ours took turns. Its rounds read the clock twice
    each, and find one of our laps between the two readings.
    """

    def __init__(self) -> None:
        self._laps: Iterator[float] = iter(())
        self._now = 0.0
        self._running = False

    def load(self, laps: Sequence[float]) -> None:
        """Show these laps in the next readings."""
        self._laps, self._running = iter(laps), False

    def __call__(self) -> float:
        """Read the clock."""
        if self._running:
            self._now += next(self._laps)
        self._running = not self._running
        return self._now


replay = Replay()
