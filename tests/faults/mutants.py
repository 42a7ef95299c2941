"""Do the tests notice a small wrong change? ``python tests/faults/mutants.py map``, then ``run --count 400``.

``map`` runs test files once and writes, for each test that passes, its time and the lines of the package that
it executes; of a test with variants it runs two. ``run`` changes one random place at a time and runs tests
that execute it, cheapest first, up to ``--seconds`` of them, then their other variants; a mutant is killed by
the first that fails. One that exceeds its time, of the processor's, is counted apart. ``--again survived
--fresh --seconds 40`` tries longer, and imports anew, so that what a function did at import is done by the
mutant. ``control`` runs the tests that killed on the code as it is: none may fail.
``map`` and ``run`` go on where their journals end.

Each mutant lives in a process of its own, forked from one that has imported everything but the package, with
bounded memory, time and file size, in an empty folder. Processes that tests start anew run the code as it is.
"""

import argparse
import functools
import gc
import hashlib
import importlib.machinery
import os
import resource
import sys
import tempfile
import time
import types
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from confined import ROOT, in_child, preload, run_tests
from mutant_map import PACKAGE, ROOMS, Tests, append, draw_map, read
from mutations import mutant, places


class Failure:
    """A plugin of pytest that keeps the first test that failed."""

    test = None

    def pytest_runtest_logreport(self, report):
        self.test = self.test or (report.nodeid if report.failed else None)

    def pytest_collectreport(self, report):
        self.test = self.test or (report.nodeid if report.failed else None)


@functools.cache
def sampled(seed):
    """All mutants of the rooms in a random order: ``(key, room, file, place)``.

    The order is that of the keys, digests of file, change and words: it stays where other code changes.
    """
    found, seen = [], Counter()
    for room, folders in ROOMS.items():
        for folder in folders:
            for path in sorted((PACKAGE / folder).rglob("*.py")):
                file = str(path.relative_to(ROOT))
                for place in places(path.read_text()):
                    identity = (seed, file, place.kind, place.part, place.words)
                    seen[identity] += 1
                    key = hashlib.sha256(repr((*identity, seen[identity])).encode()).hexdigest()[:16]
                    found.append((key, room, file, place))
    return sorted(found)


class Session:
    """A plugin of pytest: collects once, and then forks for every mutant instead of running the tests.

    ``seconds`` is what tests take; one that takes many times as long ends the process.
    """

    def __init__(self, work, seconds):
        self._work = work
        self._seconds = seconds
        self._items = {}
        self._variants = defaultdict(list)
        self._functions = []
        self._failed = ""

    def pytest_runtestloop(self, session):
        self._items = {item.nodeid: item for item in session.items}
        for test in self._items:
            self._variants[test.partition("[")[0]].append(test)
        # Before they are frozen, which hides them.
        functions = [thing for thing in gc.get_objects() if isinstance(thing, types.FunctionType)]
        self._functions = [one for one in functions if one.__code__.co_filename.startswith(str(PACKAGE))]
        gc.collect()
        gc.freeze()
        self._work(self)
        return True

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._failed = self._failed or report.nodeid

    def change(self, file, tree):
        """Give the functions of a module the code of another tree; whether any has changed."""
        path = str(ROOT / file)
        new = {(code.co_qualname, code.co_firstlineno): code for code in _codes(compile(tree, path, "exec"))}
        changed = False
        for function in self._functions:
            code = function.__code__
            other = new.get((code.co_qualname, code.co_firstlineno))
            if code.co_filename == path and other is not None and other != code:
                if other.co_freevars != code.co_freevars:
                    return False
                function.__code__ = other
                changed = True
        return changed

    def failing(self, tests, file="", tree=None, names=(), limit=0.0):
        """The first of these tests that fails on a mutant; None where only importing would change it.

        Where all pass, also of the other variants of the tests of some names, for so many seconds.
        """
        if tree is not None and not self.change(file, tree):
            return None
        self._run([self._items[test] for test in tests if test in self._items], float("inf"))
        if not self._failed and limit:
            others = [test for name in names for test in self._variants[name] if test not in tests]
            self._run([self._items[test] for test in others], time.process_time() + limit)
        return self._failed

    def until(self, tests, last, names):
        """The first test that fails of these and other variants up to ``last``."""
        others = [test for name in names for test in self._variants[name] if test not in tests]
        order = [test for test in [*tests, *others] if test in self._items]
        self._run([self._items[test] for test in order[: order.index(last) + 1]], float("inf"))
        return self._failed

    def _run(self, items, until):
        for item, following in zip(items, [*items[1:], None], strict=False):
            most = resource.getrlimit(resource.RLIMIT_CPU)[1]
            latest = int(time.process_time() + 6 * self._seconds.get(item.nodeid, 2) + 8)
            resource.setrlimit(resource.RLIMIT_CPU, (min(latest, most), most))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self._failed or time.process_time() > until:
                item.session._setupstate.teardown_exact(None)
                return


def _codes(code):
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def failing_import(tests, file, tree, names=(), limit=0.0):
    """As `Session.failing`, for what the import of a module evaluates: in a process without the package."""
    if not tests:
        return ""
    original = importlib.machinery.SourceFileLoader.get_code

    def get_code(loader, name):
        if loader.path == str(ROOT / file):
            return compile(tree, loader.path, "exec", dont_inherit=True)
        return original(loader, name)

    importlib.machinery.SourceFileLoader.get_code = get_code
    failure = Failure()
    return (failure.test or "collection") if run_tests(tests, failure) not in (0, 5) else ""


def run(options):
    """Try mutants that the journal lacks, in the order of the sample; print a table of all."""
    sampled(options.seed)  # once, for both
    if not options.fresh:
        if (session := os.fork()) == 0:
            in_session(options, lambda session: try_all(options, session.failing))
            os._exit(0)
        os.waitpid(session, 0)
    try_all(options, failing_import, collects=True)
    return report(options)


def in_session(options, work):
    """Do work within a session of pytest that has collected the test files of the map."""
    seconds = {record["test"]: record["seconds"] for record in read(options.map) if "test" in record}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        run_tests(sorted({test.partition("::")[0] for test in seconds}), Session(work, seconds), "-s")


def latest(options):
    """What is known of each mutant, by its key."""
    return {record["key"]: record for record in read(options.journal)}


def try_all(options, failing, collects=False):
    tests = Tests(options.map)
    before = latest(options)
    for number, (key, room, file, place) in enumerate(sampled(options.seed)[: options.count]):
        is_due = before[key]["outcome"] in options.again if key in before else not options.again
        if not is_due or (options.numbers and number not in options.numbers):
            continue
        chosen, seconds, names = tests.of(file, place, options.seconds, collects)
        if options.tests:
            chosen, seconds, names = options.tests, options.seconds, []
        tree, words = mutant((ROOT / file).read_text(), place)
        outcome, killer = "not covered", ""
        if chosen or names:
            more = options.variant_seconds if chosen else options.seconds
            work = functools.partial(failing, chosen, file, tree, names, more)
            killer, why = in_child(work, 4 * seconds + 3 * more + 20)
            if why == "returned" and killer is None:
                continue
            passed = "survived" if chosen else "not covered"
            outcome = ("killed" if killer else passed) if why == "returned" else why
        record = {
            "key": key,
            "number": number,
            "room": room,
            "file": file,
            **place._asdict(),
            "change": words,
        }
        append(options.journal, record | {"outcome": outcome, "by": killer, "tests": len(chosen)})
        print(number, outcome, f"{file}:{place.first_line}", words, killer, flush=True)


def control(options):
    """Run each test that has killed a mutant, and what ran before it then, on the code as it is."""

    def try_unchanged(session):
        tests = Tests(options.map)
        known, tried = latest(options), set()
        for key, _, file, place in sampled(options.seed)[: options.count]:
            killer = known.get(key, {}).get("by")
            if killer and killer not in tried:
                tried.add(killer)
                chosen, seconds, names = tests.of(file, place, options.seconds, False)
                work = functools.partial(session.until, chosen, killer, names)
                failed, why = in_child(work, 4 * seconds + 3 * options.seconds + 20)
                print(key, killer, f"WRONG {failed}" if failed else why, flush=True)

    in_session(options, try_unchanged)
    return 0


def report(options):
    """Print how many of each room came to what, and the survivors."""
    known = latest(options).values()
    counts = defaultdict(Counter)
    for record in known:
        for room in (record["room"], "all"):
            counts[room][record["outcome"]] += 1
    print(
        "\n| room | sampled | killed | timed out | crashed | survived | not covered |\n|---"
        + "|---" * 6
        + "|"
    )
    for room, found in sorted(counts.items(), key=lambda item: item[0] == "all"):
        numbers = [found[name] for name in ("killed", "timeout", "crash", "survived", "not covered")]
        print("|", " | ".join([room, *map(str, [found.total(), *numbers])]), "|")
    for record in known:
        if record["outcome"] != "killed":
            place = f"{record['file'].removeprefix('unlearn_ext/')}:{record['first_line']}"
            print(f"- {record['outcome']}: `{place}` {record['kind']}: `{record['change']}`")
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    folder = ROOT / "build" / "mutants"
    parser.add_argument("what", choices=["map", "run", "control", "report"])
    parser.add_argument("--map", type=Path, default=folder / "map.jsonl")
    parser.add_argument("--journal", type=Path, default=folder / "journal.jsonl")
    parser.add_argument(
        "--files", nargs="+", default=[], help="test files of the map; without: all but slow ones"
    )
    parser.add_argument(
        "--file-seconds", type=float, default=90, help="the most that a file of the map may take"
    )
    parser.add_argument(
        "--test-seconds", type=float, default=5, help="the most that a test of the map may take"
    )
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=[], help="mutants by their place in the sample"
    )
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="OUTCOME", help="try those that came to this before"
    )
    parser.add_argument("--tests", nargs="+", default=[], help="with --fresh: these instead of the map's")
    parser.add_argument(
        "--fresh", action="store_true", help="import the package anew for each: also what runs at import"
    )
    parser.add_argument(
        "--seconds", type=float, default=40, help="the most that the tests of a mutant may take"
    )
    parser.add_argument(
        "--variant-seconds",
        type=float,
        default=20,
        help="the most that other variants of tests that all pass may take",
    )
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    options.map, options.journal = options.map.resolve(), options.journal.resolve()  # children work elsewhere
    for path in (options.map, options.journal):
        path.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "report":
        return report(options)
    preload()
    return {"map": draw_map, "run": run, "control": control}[options.what](options)


if __name__ == "__main__":
    raise SystemExit(main())
