"""``python -m bench.gpu`` without a GPU: its stages, its record, and that it checks before it measures."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from unlearn_ext import ops

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
# The benchmarks are not part of the package.
sys.path.append(str(ROOT))

from bench.gpu import __main__ as script  # noqa: E402
from bench.gpu import checks, page, speed, stages  # noqa: E402
from bench.gpu.stages import Stage  # noqa: E402

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")


def python(code):
    return [sys.executable, "-c", f"import json, sys, time\n{code}"]


NOTE = "json.dump({'rows': [{'n': 1}]}, open(sys.argv[1], 'w'))"
STAGES = [
    Stage("raises", 60, python("print('so far')\nraise ValueError('too bad')")),
    Stage("crashes", 60, python("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")),
    # Long enough for a busy machine to start Python.
    Stage("hangs", 6, python(f"{NOTE}\nprint('here', flush=True)\ntime.sleep(600)")),
    Stage("is not there", 60, ["/no/such/program"]),
    Stage(
        "has nothing to do",
        60,
        python("json.dump({'skipped': 'no card'}, open(sys.argv[1], 'w')); sys.exit(77)"),
    ),
    Stage("passes", 60, python(NOTE)),
]


def run(chosen, folder, seconds=100.0):
    record, saved = {}, []
    good = stages.run(
        chosen, record, lambda: saved.append(json.dumps(record)), folder / "log", seconds=seconds, cwd=folder
    )
    return good, record["stages"], saved


def test_a_stage_that_goes_wrong_does_not_lose_the_others(tmp_path):
    good, entries, saved = run(STAGES, tmp_path)
    assert not good
    assert {name: (entry["status"], entry["reason"]) for name, entry in entries.items()} == {
        "raises": ("failed", "ValueError: too bad"),
        "crashes": ("failed", "signal SIGSEGV"),
        "hangs": ("timed out", "after 6 s"),
        "is not there": ("failed", "[Errno 2] No such file or directory: '/no/such/program'"),
        "has nothing to do": ("skipped", "no card"),
        "passes": ("passed", ""),
    }
    # What a stage noted before its time was up is kept, and every stage is on record once it is over.
    assert entries["hangs"]["summary"] == entries["passes"]["summary"] == {"rows": [{"n": 1}]}
    assert [len(json.loads(text)["stages"]) for text in saved] == [1, 2, 3, 4, 5, 6]
    log = (tmp_path / "log").read_text()
    assert "so far" in log
    assert "ValueError: too bad" in log
    assert "here" in log


def is_alive(process):
    """Whether a process runs: one that has ended and waits for its parent to notice does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_stage_that_is_ended_takes_its_children_along(tmp_path):
    child = "import time; time.sleep(600)"
    code = (
        f"import subprocess\nchild = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "json.dump({'child': child.pid}, open(sys.argv[1], 'w'))"
    )
    hangs = Stage("hangs", 5, python(f"{code}\nchild.wait()"))
    _, entries, _ = run([hangs, Stage("forgets", 60, python(code))], tmp_path)
    for entry in entries.values():
        child = entry["summary"]["child"]
        until = time.monotonic() + 60  # a signal is delivered at once, and acted on when there is a processor
        while is_alive(child) and time.monotonic() < until:
            time.sleep(0.01)
        assert not is_alive(child)


def test_what_no_time_is_left_for_is_skipped(tmp_path):
    waits = Stage("waits", 60, python("time.sleep(60)"))
    good, entries, _ = run([waits, Stage("late", 60, python(NOTE))], tmp_path, seconds=2.5)
    assert not good
    assert entries["waits"]["status"] == "timed out"
    assert entries["late"]["reason"] == "no time left"


def test_the_order_is_correctness_before_speed():
    names = [stage.name for stage in script.all_stages(dry=False, data=None)]
    assert names.index("tests") < names.index("ceilings")
    assert names[-6:] == ["ceilings", "list-ops", "layers", "networks", "methods", "compiled"]
    # All but the last, which takes what is left, fit into ten minutes.
    assert sum(stage.seconds for stage in script.all_stages(dry=False, data=None)[:-1]) < 600


@no_gpu
def test_a_dry_run_goes_through_and_writes_a_record(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(tmp_path)]
    chosen = ["environment", "native", "memcheck", "methods", "ceilings"]
    run = subprocess.run([*command, "--only", *chosen], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    record = json.loads((tmp_path / "gpu-none.json").read_text())
    outcomes = {name: (entry["status"], entry["reason"]) for name, entry in record["stages"].items()}
    assert outcomes == {
        "environment": ("passed", ""),
        "native": ("skipped", "no GPU"),
        "memcheck": ("skipped", "no GPU"),
        "ceilings": ("passed", ""),
        "methods": ("skipped", "no --data"),
    }
    assert record["stages"]["environment"]["summary"]["torch"] == torch.__version__
    assert record["stages"]["ceilings"]["summary"]["copy, bytes/s"] > 1e6
    text = (tmp_path / "gpu-none.md").read_text()
    assert text in run.stdout
    assert "dry run: nothing here is a measurement" in text
    assert "| native | skipped |" in text
    assert "==== ceilings" in (tmp_path / "gpu-none.log").read_text()


@no_gpu
def test_some_stages_join_an_earlier_run_of_the_same_commit(tmp_path, monkeypatch):
    for commit, expected in [("abc1", {"native"}), ("abc1", {"native", "memcheck"}), ("abc2", {"memcheck"})]:
        monkeypatch.setattr(script, "_commit", lambda commit=commit: commit)
        stage = "native" if expected == {"native"} else "memcheck"
        assert script.main(["--dry-run", "--out", str(tmp_path), "--only", stage]) == 0
        record = json.loads((tmp_path / "gpu-none.json").read_text())
        assert set(record["stages"]) == expected


@no_gpu
def test_without_a_gpu_only_a_dry_run_starts():
    run = subprocess.run([sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert "--dry-run" in run.stderr


# ---- What the checks make of what their tools say

SANITIZER = """#!/bin/sh
case "$1 $4" in
  "--tool=racecheck topk_mask") echo "==== RACECHECK SUMMARY: 2 hazards displayed (2 errors)"; exit 9;;
  --tool=racecheck*) echo "==== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)";;
  *topk_mask) sleep 60;;
  *"pack_masks, one") echo "FAIL test_select.cpp:1"; echo "========= ERROR SUMMARY: 0 errors"; exit 1;;
  *) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


@pytest.mark.parametrize(
    "tool, expected",
    [
        ("racecheck", {"topk_mask": "finding"}),
        ("memcheck", {"topk_mask": "not finished", "pack_masks, one": "finding"}),
    ],
)
def test_sanitizers_findings_are_told_from_clean_cases(tool, expected, tmp_path, monkeypatch):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = tmp_path / "found.json"
    assert checks.main(["sanitizer", f"--tool={tool}", "--case-seconds=8", str(found)]) == 1
    said = json.loads(found.read_text())
    outcomes = {row["case"]: row["outcome"] for row in said["rows"]}
    assert outcomes == dict.fromkeys(checks.SANITIZED, "clean") | expected
    assert said["failed"].startswith("finding: ")


def test_sanitized_cases_exist():
    sources = "".join(path.read_text() for path in (ROOT / "tests" / "native").glob("test_*.cpp"))
    registered = set(re.findall(r'Case \w+\("(.*?)"', sources))
    assert set(checks.SANITIZED) <= registered


def test_failed_tests_are_counted_and_named(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    report = tmp_path / "junit.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "."]
    code = subprocess.run(command, cwd=tmp_path, capture_output=True).returncode
    found = tmp_path / "found.json"
    assert checks._read_report(stages.Notes(found), report, code) == 1
    assert json.loads(found.read_text()) == {
        "failure": 1,
        "error": 0,
        "skipped": 1,
        "passed": 1,
        "names of the failed": ["test_it::test_b"],
        "failed": "1 of 3 failed, exit code 1",
    }


# ---- The stages that measure, at the sizes of a dry run


def measured(stage, folder):
    found = folder / "found.json"
    code = speed.main([stage, "--dry", str(found)])
    return code, json.loads(found.read_text())


@pytest.fixture(autouse=True)
def global_switches_stay():
    before = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = before


def rendered(stage, found):
    entry = {"status": "passed", "seconds": 1.0, "reason": found.get("failed", ""), "summary": found}
    record = {"device": "none", "dry run": True, "commit": "c", "date": "2000-01-01", "command": "x"}
    return page.render(record | {"stages": {stage: entry}})


@no_gpu
def test_list_ops_are_measured_against_a_copy_and_their_peers(tmp_path):
    code, found = measured("list-ops", tmp_path)
    assert code == 0
    rows = {(row["op"], row["dtype"]): row for row in found["rows"]}
    assert {op for op, _ in rows} == {*speed.WALKS, *speed.OTHERS}
    assert all(row["seconds"] > 0 and row["failures"] == {} for row in rows.values())
    row = rows["fisher_accumulate_", "float32"]
    assert row["share"] == pytest.approx(row["bytes"] / row["seconds"] / found["copy, bytes/s"])
    slowest = row["seconds"] > speed.NOISE * min(row["others"].values())
    assert row["met"] == (row["share"] >= 0.85 and not slowest)
    assert rows["topk_mask", "float32"]["passes"] > 0
    text = rendered("list-ops", found)
    assert "| `fisher_accumulate_` | tiny | float32 |" in text
    assert "passes; <= 6 passes: " in text


@no_gpu
def test_a_wrong_op_fails_its_stage_and_costs_its_row_only(tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "fisher_accumulate_", lambda *args, **kwargs: None)
    monkeypatch.setattr(ops, "topk_mask", lambda *args, **kwargs: 1 / 0)
    # A few of the ops: all of them go through in the test above.
    monkeypatch.setattr(speed, "WALKS", ("fisher_accumulate_", "apply_mask_"))
    monkeypatch.setattr(speed, "OTHERS", ("pack_mask", "topk_mask"))
    code, found = measured("list-ops", tmp_path)
    assert code == 1
    wrong = {row["op"]: row for row in found["rows"] if row["failures"]}
    assert set(wrong) == {"fisher_accumulate_", "topk_mask"}
    assert {row["op"] for row in found["rows"] if "seconds" in row} == {"apply_mask_", "pack_mask"}
    assert "seconds" not in wrong["fisher_accumulate_"]
    assert "AssertionError" in wrong["fisher_accumulate_"]["failures"]["ours"]
    assert "fisher_accumulate_ tiny float32" in found["failed"]
    text = rendered("list-ops", found)
    assert "| `topk_mask` | tiny | float32 | failed |" in text
    assert "- topk_mask tiny float32: ours: ZeroDivisionError" in text


@no_gpu
def test_layers_and_networks_go_through(tmp_path):
    code, found = measured("layers", tmp_path)
    assert code == 0
    assert {row["precision"] for row in found["rows"]} == {"float32", "bfloat16"}
    assert all(row["met"] == (row["share"] >= 0.6) for row in found["rows"])
    assert "| resnet18 head | float32 | 2 | 1 |" in rendered("layers", found)
    code, found = measured("networks", tmp_path)
    assert code == 0
    for row in found["rows"]:
        assert set(row["times"]) == {"ours", "plain forward and backward", "vmap(grad)", "single-sample loop"}
        assert row["errors"]["ours"] <= 2 * row["errors"]["single-sample loop"] + 1e-3
    assert "| tiny GPT | bfloat16 |" in rendered("networks", found)
