"""One fault at a time: in a call of the user's code, in an operator, or at a line of the package."""

import ast
import dataclasses
import functools
import os
import sys
import traceback
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import fault_models
import torch
import whole_state
from fault_models import POINTS
from subjects import SUBJECTS
from torch.utils._python_dispatch import TorchDispatchMode

import unlearn_ext as ux

PACKAGE = str(Path(ux.__file__).parent) + os.sep
# An interrupt is looked at by Python after calls, never between these words and what follows them.
_NO_CALLS = ("try:", "else:", "finally:")


class InjectedError(Exception):
    """What none of our code knows."""


ERRORS = {
    "error": lambda: InjectedError("a fault"),
    "interrupt": lambda: KeyboardInterrupt("a fault"),
    "memory": lambda: torch.OutOfMemoryError("CUDA out of memory (a fault)"),
}


class Operators(TorchDispatchMode):
    """Counts operators, and fails in one as an allocator does."""

    def __init__(self, at=None, error=None):
        super().__init__()
        self.n, self.at, self.error, self.has_struck = 0, at, error, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        if self.n == self.at:
            self.has_struck = True
            raise self.error
        return func(*args, **(kwargs or {}))

    def places(self):
        """All operators."""
        return [(n, f"operator {n}") for n in range(1, self.n + 1)]


class Lines:
    """Counts executed lines of the package, and raises before one; where a line is run often: the first time
    and one later."""

    def __init__(self, at=None, error=None):
        self.seen, self.at, self.error, self.has_struck = {}, at, error, False

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)

    def _call(self, frame, event, argument):
        inside = frame.f_code.co_filename.startswith(PACKAGE) and not frame.f_code.co_name.startswith("<")
        return self._line if inside else None

    def _line(self, frame, event, argument):
        if event == "line":
            place = (frame.f_code.co_filename, frame.f_lineno)
            self.seen[place] = self.seen.get(place, 0) + 1
            if not self.has_struck and (place, self.seen[place]) == self.at:
                self.has_struck = True
                raise self.error
        return self._line

    def places(self):
        """The lines at which an interrupt could arrive, each with the first and the last time it was run."""
        for (file, line), times in self.seen.items():
            if line in _lines(file).between_calls:
                continue
            name = f"{Path(file).name}:{line}"
            yield ((file, line), 1), f"{name}, the first time"
            if times > 1 and line not in _lines(file).entering:
                yield ((file, line), times), f"{name}, time {times}"


@functools.cache
def _lines(file):
    """Lines where Python looks at no interrupt, and those that open a ``with``, to which it comes back on the
    way out, where it looks at none either before ``__exit__`` runs."""
    text = Path(file).read_text(encoding="utf-8")
    between = {number for number, line in enumerate(text.splitlines(), 1) if line.strip() in _NO_CALLS}
    entering = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            entering.update(range(node.lineno, node.body[0].lineno))
    return SimpleNamespace(between_calls=between, entering=entering)


WATCHERS = {"call": None, "operator": Operators, "line": Lines}


GOOD = ("returned, and said why", "returned the same", "not reached")


@dataclass
class Places:
    """Where faults can be put into a call, and what it does undisturbed."""

    all: list
    state: dict
    answer: object


@dataclass
class Outcome:
    """What a fault left: names of what differs, how the call ended, and where the fault was.

    A call may also return, if what it did is what it does undisturbed and it says what has happened; an
    interrupt must end it.
    """

    where: str
    differs: list
    ended: str

    @property
    def is_right(self):
        return not self.differs and self.ended.startswith(("raised", *GOOD))


def _called(subject, model, folder):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        answer = SUBJECTS[subject](model, folder)
    return answer, " ".join(str(warning.message) for warning in told)


def count(subject, kind, how, folder):
    """Run undisturbed, and list where faults can be put.

    Args:
        subject: A key of ``SUBJECTS``.
        kind: A class of ``fault_models``.
        how: ``"call"``, ``"operator"`` or ``"line"``.
        folder: For files.

    Returns:
        The places and the state afterwards, or a string: why the subject refuses this model.
    """
    model = fault_models.make(kind)
    POINTS.watch()
    watcher = None if how == "call" else WATCHERS[how]()
    torch.manual_seed(0)
    try:
        if watcher is None:
            answer, _ = _called(subject, model, folder)
            places = [(n + 1, name) for n, name in enumerate(POINTS.names)]
        else:
            with watcher:
                answer, _ = _called(subject, model, folder)
            places = list(watcher.places())
    except (NotImplementedError, ValueError, TypeError) as refused:
        return f"{type(refused).__name__}: {refused}"
    return Places(places, whole_state.of_model(model), answer)


def disturb(subject, kind, how, places, place, error, folder):
    """Run with one fault, and compare everything with what it was.

    Args:
        subject: A key of ``SUBJECTS``.
        kind: A class of ``fault_models``.
        how: ``"call"``, ``"operator"`` or ``"line"``.
        places: What ``count`` returned.
        place: One of them.
        error: A key of ``ERRORS``.
        folder: For files.

    Returns:
        What was left.
    """
    at, name = place
    made = ERRORS[error]()
    model = fault_models.make(kind)
    POINTS.watch(*((at, made) if how == "call" else ()))
    watcher = nullcontext() if how == "call" else WATCHERS[how](at, made)
    torch.manual_seed(0)
    process, before = whole_state.of_process(), whole_state.of_model(model)
    try:
        with watcher:
            answer, told = _called(subject, model, folder)
        # How often the engine looks again depends on the clock: the last places are not always reached.
        has_struck = POINTS.has_struck if how == "call" else watcher.has_struck
        ended = _returned(answer, told, places.answer, error) if has_struck else "not reached"
    except BaseException as raised:
        ended = _raised(raised, made)
    after = whole_state.of_model(model)
    differs = whole_state.differences(process, whole_state.of_process())
    model_differs = whole_state.differences(before, after)
    if ended.startswith(GOOD) and model_differs:
        model_differs = _differences_in_value(places.state, after)
    if left := [file for file in sorted(os.listdir(folder)) if not file.startswith(("pass.", "kept."))]:
        differs.append(f"files {left}")
    return Outcome(f"{subject}, {kind.__name__}, {error} at {name}", differs + model_differs, ended)


def _raised(raised, made):
    chain, link = [], raised
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if made in chain or "a fault" in str(raised):
        return "raised"
    return f"raised {type(raised).__name__}: {raised}" + "".join(
        traceback.format_tb(raised.__traceback__)[-2:]
    )


def _returned(answer, told, expected, error):
    if error == "interrupt":
        return "returned in spite of an interrupt"
    told += "".join(repr(getattr(answer, name, "")) for name in ("coverage", "history", "rows"))
    if "a fault" in told:
        return "returned, and said why"
    # A reading beyond what the answer needs may fail.
    return "returned the same" if _same(answer, expected) else f"returned something else: {told[-300:]}"


def _same(answer, expected):
    if isinstance(answer, ux.methods.SsdPlan):
        answer, expected = answer.importance_full, expected.importance_full
    if isinstance(answer, ux.UnlearnResult):
        return (answer.before, answer.after) == (expected.before, expected.after)
    if isinstance(answer, ux.Comparison):
        mine, theirs = ([_figures(row) for row in found.rows] for found in (answer, expected))
        return mine == theirs
    if isinstance(answer, Mapping):
        return all(_same(answer[name], expected[name]) for name in expected)
    if isinstance(answer, torch.Tensor):
        return torch.allclose(answer, expected, 1e-4, 1e-7)
    if dataclasses.is_dataclass(answer):
        fields = [field.name for field in dataclasses.fields(answer)]
        return all(_same(getattr(answer, name), getattr(expected, name)) for name in fields)
    return answer == expected


def _figures(row):
    return row.label, row.why, {name: value for name, value in row.measures.items() if name != "seconds"}


def _differences_in_value(expected, after):
    # Another model object: what identifies it differs.
    mine = [
        {
            name: value
            for name, value in state.items()
            if not name.endswith(("identity", "storage", ".grad", ".class", "hooks"))
        }
        for state in (expected, after)
    ]
    return whole_state.differences(*mine)
