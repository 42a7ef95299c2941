"""Stages that run one after the other, each in a process and a time of its own, and the record they leave.

A stage is a command that is handed the path of a JSON file and writes what it finds there as it goes: one
that fails, crashes the driver or runs out of time leaves what it had, and the next one runs all the same.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PASSED, FAILED, TIMED_OUT, SKIPPED = "passed", "failed", "timed out", "skipped"

# A command that finds that it has nothing to do here leaves with this code, and says why under "skipped".
NOTHING_TO_DO = 77

_LOG_BYTES = 1 << 20  # kept of what one stage prints: the end of it


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: In the record, and on the command line.
        seconds: The time it may take.
        command: What is run; the path of its JSON file is added at the end.
    """

    name: str
    seconds: float
    command: Sequence[str]


class Notes:
    """What a stage has found, on disk as soon as it is noted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, Any] = {}

    def __setitem__(self, key: str, value: object) -> None:
        self._found[key] = value
        write_json(self._path, self._found)

    def row(self, **values: object) -> None:
        """Add a row to the stage's table."""
        self["rows"] = [*self._found.get("rows", []), values]


def write_json(path: Path, value: object) -> None:
    """Write a file that is whole at every moment."""
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def run(
    stages: Sequence[Stage],
    record: dict[str, Any],
    save: Callable[[], object],
    log: Path,
    *,
    seconds: float,
    cwd: Path,
) -> bool:
    """Run stages.

    Args:
        stages: In this order.
        record: Gets an entry per stage under ``"stages"``: status, seconds, summary, and a reason where it
            did not pass.
        save: Called whenever the record has changed.
        log: File to which everything printed is added.
        seconds: For all stages together; those that no time is left for are skipped.
        cwd: Where the commands run.

    Returns:
        Whether none failed or ran out of time.
    """
    end = time.monotonic() + seconds
    entries = record.setdefault("stages", {})
    for stage in stages:
        left = end - time.monotonic()
        if left < 1:
            entries[stage.name] = {"status": SKIPPED, "seconds": 0.0, "reason": "no time left", "summary": {}}
        else:
            entries[stage.name] = _run_one(stage, min(stage.seconds, left), log, cwd)
        save()
        print(describe(stage.name, entries[stage.name]), flush=True)
    return all(entries[stage.name]["status"] in (PASSED, SKIPPED) for stage in stages)


def describe(name: str, entry: dict[str, Any]) -> str:
    """Say in a line how a stage went."""
    reason = f": {entry['reason']}" if entry.get("reason") else ""
    return f"{entry['seconds']:6.1f} s  {name}: {entry['status']}{reason}"


def _run_one(stage: Stage, seconds: float, log: Path, cwd: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output, found = Path(folder) / "output", Path(folder) / "found.json"
        start = time.monotonic()
        with output.open("wb") as sink:
            try:
                status, reason = _finish([*stage.command, str(found)], sink, seconds, cwd)
            except OSError as error:
                status, reason = FAILED, str(error)
        taken = time.monotonic() - start
        try:
            summary = json.loads(found.read_text(encoding="utf-8"))
        except FileNotFoundError:
            summary = {}
        text = output.read_bytes()[-_LOG_BYTES:].decode(errors="replace")
    if status == SKIPPED:
        reason = summary.pop("skipped", reason)
    elif status == FAILED and not reason:
        reason = summary.pop("failed", None) or _last_line(text)
    entry = {"status": status, "seconds": round(taken, 1), "reason": reason, "summary": summary}
    with log.open("a", encoding="utf-8") as file:
        file.write(f"==== {stage.name}\n{text}\n{describe(stage.name, entry)}\n\n")
    return entry


def _finish(command: Sequence[str], sink: IO[bytes], seconds: float, cwd: Path) -> tuple[str, str]:
    # A session of its own: whatever the command has started ends with it.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=sink,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    end = time.monotonic() + seconds
    try:
        # Without reaping it: until then no other session can get its number.
        while not (ended := _has_ended(process)) and time.monotonic() < end:
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    if not ended:
        return TIMED_OUT, f"after {seconds:.0f} s"
    if code == 0:
        return PASSED, ""
    if code == NOTHING_TO_DO:
        return SKIPPED, ""
    return FAILED, f"signal {signal.Signals(-code).name}" if code < 0 else ""


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
