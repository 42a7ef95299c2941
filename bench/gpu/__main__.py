"""Proves and measures the CUDA half on a machine with a GPU; needs no network, and takes under ten minutes.

Stages run one after the other, correctness before speed, each in its own process and time. One that fails
costs only its own results. Written are ``gpu-<device>.json``, ``gpu-<device>.md`` and ``gpu-<device>.log``:
to ``--out``, to the folder that the environment variable OUT names, or to ``bench/results`` (the log, which
is not for committing, to ``build/gpu``). With ``--only``, stages of an earlier run of the same commit stay.

``--dry-run`` goes through everything without a GPU, at small sizes, and writes to ``build/gpu``.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu import checks, page, stages
from bench.gpu.stages import Stage

RESULTS = checks.ROOT / "bench" / "results"
SCRATCH = checks.ROOT / "build" / "gpu"
MINUTES, DRY_MINUTES = 9.5, 30.0


def all_stages(*, dry: bool, data: Path | None) -> list[Stage]:
    """List the stages in their order, each with the time it may take at most.

    Args:
        dry: Small sizes, on a CPU where there is no GPU; ten times as long.
        data: CIFAR-10, if there is one.

    Returns:
        The stages.
    """
    small = ["--dry"] if dry else []

    def check(name: str, seconds: float, *arguments: str) -> Stage:
        command = [sys.executable, "-m", "bench.gpu.checks", arguments[0], *arguments[1:], *small]
        return Stage(name, seconds * (10 if dry else 1), command)

    def measure(name: str, seconds: float, *arguments: str) -> Stage:
        command = [sys.executable, "-m", "bench.gpu.speed", name, *arguments, *small]
        return Stage(name, seconds * (10 if dry else 1), command)

    return [
        check("environment", 20, "environment"),
        check("build", 110, "build"),
        check("native", 30, "native"),
        *(check(tool, 25, "sanitizer", f"--tool={tool}") for tool in checks.TOOLS),
        check("tests", 90, "tests"),
        measure("ceilings", 15),
        measure("list-ops", 35),
        measure("layers", 50),
        measure("networks", 70),
        measure("methods", 50, *([f"--data={data.resolve()}"] if data else [])),
        measure("compiled", 240),  # what is left, which it can use
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        0 if no stage failed or ran out of time; what is measured decides nothing.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [stage.name for stage in all_stages(dry=False, data=None)]
    parser.add_argument("--data", type=Path, help="CIFAR-10 as one file of JPEGs, for the methods")
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU, at small sizes")
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="STAGE", help=f"some of: {', '.join(names)}"
    )
    parser.add_argument("--minutes", type=float, help="for all stages (default: 9.5)")
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.is_file():
        parser.error(f"--data: there is no file {options.data}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run goes through the stages without one")

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    folder = options.out or _default_folder(options.dry_run)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"gpu-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}"
    files = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("json", "md", "log")}
    if folder == RESULTS:  # which is committed
        files["log"] = SCRATCH / files["log"].name
    files["log"].parent.mkdir(parents=True, exist_ok=True)
    files["log"].write_text("", encoding="utf-8")
    record: dict[str, Any] = {
        "device": device,
        "dry run": options.dry_run,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "command": shlex.join(
            ["python", "-m", "bench.gpu", *_arguments(sys.argv[1:] if arguments is None else arguments)]
        ),
    }

    if options.only is not None:
        record["stages"] = _earlier(files["json"], record)

    def save() -> None:
        stages.write_json(files["json"], record)
        files["md"].write_text(page.render(record), encoding="utf-8")

    chosen = [
        stage
        for stage in all_stages(dry=options.dry_run, data=options.data)
        if options.only is None or stage.name in options.only
    ]
    minutes = options.minutes or (DRY_MINUTES if options.dry_run else MINUTES)
    good = stages.run(chosen, record, save, files["log"], seconds=60 * minutes, cwd=checks.ROOT)
    print(f"\n{page.render(record)}\nwrote {', '.join(str(path) for path in files.values())}")
    return 0 if good else 1


def _earlier(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Return the stages of an earlier run of the same commit on the same device, which some are to join."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    same = all(found[key] == record[key] for key in ("device", "dry run", "commit"))
    return found["stages"] if same and re.fullmatch(r"[0-9a-f]+", record["commit"]) else {}


def _default_folder(dry: bool) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"])
    return SCRATCH if dry else RESULTS


def _commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=checks.ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
        return f"{commit} with local changes" if git("status", "--porcelain", "-uno") else commit
    except OSError:
        return "unknown"


def _arguments(arguments: Sequence[str]) -> list[str]:
    # Without the folders of this machine.
    return [Path(text).name if "/" in text else text for text in arguments]


if __name__ == "__main__":
    sys.exit(main())
