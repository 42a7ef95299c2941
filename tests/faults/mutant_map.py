"""Which tests execute which lines of the package, and how long they take."""

import functools
import json
import sys
import threading
import time
from collections import Counter, defaultdict
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
    *["tests/engine", "tests/methods", "tests/test_[a-z]*.py", "tests/faults/test_files.py"],
    *[f"unlearn_ext/{folder}" for folders in ROOMS.values() for folder in folders],
]
# They build, start other processes throughout, or take minutes.
LEFT_OUT = "build cuda docs examples gpu_script hf_trainer hf_trainer_steps install library lightning site"


class Recorder:
    """A plugin of pytest: what each test executes of the package, what it takes and whether it passes."""

    def __init__(self, journal):
        self._journal = journal
        self._lines = defaultdict(set)
        self._calls = Counter()
        self._passed = {}

    def _call(self, frame, event, arg):
        code = frame.f_code
        if not code.co_filename.startswith(str(PACKAGE)):
            return None
        self._lines[code.co_filename].add(code.co_firstlineno)
        self._calls[code] += 1
        return self._line if self._calls[code] < 10 else None

    def _line(self, frame, event, arg):
        self._lines[frame.f_code.co_filename].add(frame.f_lineno)
        return self._line

    def pytest_collection_modifyitems(self, items):
        variants = defaultdict(list)
        for item in items:
            variants[item.nodeid.partition("[")[0]].append(item)
        items[:] = [kept for some in variants.values() for kept in {some[0], some[len(some) // 2]}]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item):
        self._lines.clear()
        self._calls.clear()
        started = time.process_time()
        threading.settrace(self._call)
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        threading.settrace(None)
        if self._passed.get(item.nodeid):
            lines = {str(Path(name).relative_to(ROOT)): sorted(got) for name, got in self._lines.items()}
            record = {"test": item.nodeid, "seconds": time.process_time() - started, "lines": lines}
            append(self._journal, {**record, "file_seconds": started})

    def pytest_runtest_logreport(self, report):
        self._passed[report.nodeid] = report.passed and self._passed.get(report.nodeid, True)


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
    """Run each test file that the map lacks under `Recorder`."""
    done = {record["file"] for record in read(options.map) if "file" in record}
    for file in [file for file in options.files or files_to_map() if file not in done]:
        recorder = Recorder(options.map)
        limit = options.file_seconds
        _, why = in_child(functools.partial(run_tests, [file], recorder), limit, 12 * limit)
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

    def of(self, file, place, limit):
        """Tests that execute a place, up to ``limit`` seconds of them; the seconds; tests that may too."""
        lines = set(range(place.first_line, place.last_line + 1))
        using = [record for record in self.records if file in record["lines"]]
        found = [record for record in using if lines & set(record["lines"][file])]
        if place.at_import:
            found = found or using
        chosen, files, seconds = [], set(), 0.0
        for record in sorted(found, key=self._cost):
            test_file = record["test"].partition("::")[0]
            cost = record["seconds"] + (0 if test_file in files else self._collecting[test_file])
            if seconds + cost <= limit:
                seconds += cost
                files.add(test_file)
                chosen.append(record["test"])
        names = [record["test"].partition("[")[0] for record in sorted(found or using, key=self._cost)]
        return chosen, seconds, list(dict.fromkeys(names))

    def _cost(self, record):
        return record["seconds"] + self._collecting[record["test"].partition("::")[0]] / 4
