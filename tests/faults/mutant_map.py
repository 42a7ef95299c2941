"""Which tests execute which lines of the package, and how long they take."""

import ast
import functools
import json
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytest
from confined import ROOT, in_child, run_tests

PACKAGE = ROOT / "unlearn_ext"
# Room: folders of the package. The engine is measured with what it stands on.
ROOMS = {
    "engine": ["fisher", "ops", "tasks", "subspace", "resume", "distributed", "_internal"],
    "methods": ["methods"],
    "evaluation": ["evaluation"],
}
TEST_FILES = [
    *[
        "tests/engine",
        "tests/methods",
        "tests/test_[a-z]*.py",
        "tests/faults/test_*file*.py",
        "tests/faults/test_op_fuzz.py",
        "tests/distributed/test_r[a-z]*.py",
        "tests/distributed/test_sharded*.py",
    ],
    *[f"unlearn_ext/{folder}" for folders in ROOMS.values() for folder in folders],
]
# They build, start other processes throughout, or take minutes.
LEFT_OUT = "build cuda docs examples gpu_script hf_trainer hf_trainer_steps install library lightning site"


class TooLong(BaseException):
    """Ends a test that takes longer than the map allows; of no kind that a test would expect."""


class Tracer:
    """Lines of the package that this process and those forked from it execute.

    A fork tells what it executed, by a file in ``folder``, whenever it sends something and at its end.
    """

    def __init__(self, folder):
        self._folder = folder
        self._coverage = None
        multiprocessing.util.register_after_fork(self, Tracer._in_child)

    def start(self):
        import coverage  # which only drawing needs

        self._coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[f"{PACKAGE}/*"], messages=False
        )
        self._coverage.start()

    def stop(self):
        """What was executed since the start: file to lines."""
        self._coverage.stop()
        data = self._coverage.get_data()
        return {name: sorted(data.lines(name)) for name in data.measured_files()}

    def stop_all(self):
        """What was executed since the start, and since they last told, by forks."""
        found = defaultdict(set)
        told = [json.loads(path.read_text()) for path in self._folder.glob("*.json")]
        for lines in [self.stop(), *told]:
            for name, some in lines.items():
                found[name].update(some)
        for path in self._folder.glob("*"):
            path.unlink()
        return found

    def _in_child(self):
        if self._coverage is None:
            return
        self._coverage.stop()
        self.start()
        put = multiprocessing.queues.Queue.put

        def put_and_tell(queue, *arguments, **settings):
            self._tell()
            self.start()
            put(queue, *arguments, **settings)

        multiprocessing.queues.Queue.put = put_and_tell
        multiprocessing.util.Finalize(None, self._tell, exitpriority=0)

    def _tell(self):
        draft = self._folder / f"{os.getpid()}-{time.monotonic_ns()}"
        draft.write_text(json.dumps(self.stop()))
        draft.rename(draft.with_suffix(".json"))


class Recorder:
    """A plugin of pytest: what each test executes of the package, what it takes and whether it passes.

    A test that takes longer than ``limit`` seconds of the processor is ended and left out.
    """

    def __init__(self, journal, limit):
        self._journal = journal
        self._limit = limit
        self._passed = {}
        self._folder = tempfile.TemporaryDirectory()
        self._tracer = Tracer(Path(self._folder.name))
        signal.signal(signal.SIGVTALRM, self._end)

    def _end(self, *_):
        raise TooLong

    def pytest_collection_modifyitems(self, items):
        variants = defaultdict(list)
        for item in items:
            variants[item.nodeid.partition("[")[0]].append(item)
        items[:] = [kept for some in variants.values() for kept in {some[0], some[len(some) // 2]}]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        started, clock = time.process_time(), time.monotonic()
        signal.setitimer(signal.ITIMER_VIRTUAL, self._limit)
        self._tracer.start()
        yield
        found = self._tracer.stop_all()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self._passed.get(item.nodeid):
            # What ranks do takes none of this process's own time.
            is_of_ranks = "tests/distributed" in item.nodeid
            seconds = time.monotonic() - clock if is_of_ranks else time.process_time() - started
            lines = {
                str(Path(name).relative_to(ROOT)): with_headers(name, got) for name, got in found.items()
            }
            record = {"test": item.nodeid, "seconds": seconds, "lines": lines}
            append(self._journal, {**record, "file_seconds": started})

    def pytest_runtest_logreport(self, report):
        self._passed[report.nodeid] = report.passed and self._passed.get(report.nodeid, True)


@functools.cache
def functions(file):
    """``(first line, lines of the body)`` of each function of a file, decorators among the former."""
    nodes = ast.walk(ast.parse(Path(file).read_text()))
    found = [node for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [
        (
            min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]),
            range(node.body[0].lineno, node.end_lineno + 1),
        )
        for node in found
    ]


def with_headers(file, lines):
    """Lines that were executed and the first of their functions: defaults are written there."""
    return sorted(lines | {first for first, body in functions(file) if not lines.isdisjoint(body)})


def append(journal, record):
    with journal.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read(journal):
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def files_to_map():
    names = [path for pattern in TEST_FILES for path in sorted(ROOT.glob(pattern))]
    found = [file for path in names for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    is_test = [file for file in found if file.name.startswith("test_") or PACKAGE in file.parents]
    return [
        str(file.relative_to(ROOT))
        for file in is_test
        if file.stem.removeprefix("test_") not in LEFT_OUT.split()
        and (PACKAGE not in file.parents or ">>> " in file.read_text())
    ]


def draw_map(options):
    """Run each test file that the map lacks, or that is asked for, under `Recorder`."""
    records = read(options.map)
    if options.files:
        kept = [
            one for one in records if (one.get("file") or one["test"].partition("::")[0]) not in options.files
        ]
        options.map.write_text("".join(json.dumps(record) + "\n" for record in kept))
    done = {record["file"] for record in records if "file" in record}
    for file in options.files or [file for file in files_to_map() if file not in done]:
        limit = options.file_seconds

        def work(file=file):
            return run_tests([file], Recorder(options.map, options.test_seconds), "--maxfail=0")

        _, why = in_child(work, limit)
        append(options.map, {"file": file, "why": why})
        print(file, why, flush=True)
    return 0


class Tests:
    """What the map knows: tests by the lines they execute, cheapest first."""

    def __init__(self, journal):
        self.records = [record for record in read(journal) if "test" in record]
        self.records.sort(key=lambda record: record["seconds"])
        self._collecting = defaultdict(lambda: float("inf"))
        for record in self.records:
            file = record["test"].partition("::")[0]
            self._collecting[file] = min(self._collecting[file], record["file_seconds"])

    def of(self, file, place, limit, collects):
        """Tests that execute a place, up to ``limit`` seconds of them; the seconds; tests that may too.

        ``collects`` counts the time to collect their files as well.
        """

        def cost(record):
            first = self._collecting[record["test"].partition("::")[0]] if collects else 0.0
            return record["seconds"] + first / 4

        lines = set(range(place.first_line, place.last_line + 1))
        using = [record for record in self.records if file in record["lines"]]
        found = [record for record in using if lines & set(record["lines"][file])]
        if place.at_import:
            found = found or using
        chosen, files, seconds = [], set(), 0.0
        for record in sorted(found, key=cost):
            test_file = record["test"].partition("::")[0]
            collecting = self._collecting[test_file] if collects and test_file not in files else 0.0
            if seconds + record["seconds"] + collecting <= limit:
                seconds += record["seconds"] + collecting
                files.add(test_file)
                chosen.append(record["test"])
        names = [record["test"].partition("[")[0] for record in sorted(found or using, key=cost)]
        return chosen, seconds, list(dict.fromkeys(names))
