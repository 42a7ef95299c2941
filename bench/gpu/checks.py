"""The stages that prove: what is there, the builds, native tests, compute-sanitizer, and ``pytest -m cuda``.

``python -m bench.gpu.checks STAGE [options] FILE`` runs one and writes what it finds to FILE. Nothing here
imports the package: it may not be built yet.
"""

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from bench.gpu.stages import NOTHING_TO_DO, Notes

ROOT = Path(__file__).parents[2]
NATIVE_TESTS = ROOT / "build" / "native-gpu" / "test_kernels"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

# One case of every kernel family, small enough for a tool that slows each access down a hundred times.
SANITIZED = (
    "selective_dampen",
    "masked_adamw",
    "apply_mask",
    "pack_masks, one",
    "topk_mask",
    "selected_counts",
    "ratio_quantile",
    "fisher_channels",
    "fisher_embedding",
    "fisher_weight: positions",
    "fisher_weight: convolutions",
    "unfold_rows",
    "add_symmetric",
)


def skip(notes: Notes, reason: str) -> int:
    print(reason)
    notes["skipped"] = reason
    return NOTHING_TO_DO


def architecture() -> str:
    """Return what to compile for: the card, or Hopper where there is none."""
    if not torch.cuda.is_available():
        return "90"
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def environment(notes: Notes, options: argparse.Namespace) -> int:
    """Write down what the figures depend on."""
    notes["torch"], notes["torch_cuda"] = torch.__version__, torch.version.cuda
    notes["python"], notes["system"] = platform.python_version(), platform.platform()
    notes["cores"] = os.cpu_count()
    for name, command in {
        "nvcc": ["nvcc", "--version"],
        "cmake": ["cmake", "--version"],
        "compute-sanitizer": ["compute-sanitizer", "--version"],
    }.items():
        notes[name] = _version(command)
    if not torch.cuda.is_available():
        if options.dry:
            notes["device"] = "none (dry run)"
            return 0
        notes["failed"] = "torch sees no GPU"
        return 1
    card = torch.cuda.get_device_properties(0)
    notes["device"], notes["capability"] = card.name, f"{card.major}.{card.minor}"
    notes["multiprocessors"], notes["l2_bytes"] = card.multi_processor_count, card.L2_cache_size
    notes["memory_bytes"] = card.total_memory
    fields = "driver_version,clocks.max.sm,clocks.max.mem,clocks.sm,power.limit,temperature.gpu"
    query = ["nvidia-smi", "--id=0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        notes["card"] = dict(zip(fields.split(","), (x.strip() for x in answer.split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        notes["card"] = {"unknown": str(error)}
    # The first work a card does tells whether there is anything to measure.
    x = torch.randn(1000, 1000, device="cuda")
    torch.testing.assert_close(
        (x @ x).cpu().double(), x.cpu().double() @ x.cpu().double(), rtol=1e-2, atol=1.0
    )
    return 0


def _version(command: Sequence[str]) -> str:
    program = _which(command[0])
    if program is None:
        return "not installed"
    try:
        text = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    found = re.search(r"\d+\.\d+(\.\d+)?", text)
    return found[0] if found else text.strip()


def build(notes: Notes, options: argparse.Namespace) -> int:
    """Build the package and the native tests for the card's architecture, side by side, without a network.

    A dry run leaves the installed package alone: it compiles and links the extension in a folder of its own.
    """
    if _which("nvcc") is None:
        if options.dry:
            return skip(notes, "no nvcc")
        notes["failed"] = "no nvcc on the PATH"
        return 1
    notes["architecture"] = architecture()
    cuda = f"-DCMAKE_CUDA_ARCHITECTURES={architecture()}"
    if options.dry:
        _cmake(".", "build/gpu-dry", f"-DPython_EXECUTABLE={sys.executable}", "-DUNLEARN_CUDA=ON", cuda)
        _run([sys.executable, ".ci/import_build.py", "build/gpu-dry"])
        return 0
    install = ["install", "--no-index", "--no-build-isolation", "--no-deps", "-e", "."]
    flags = {"UNLEARN_CUDA": "ON", "UNLEARN_CMAKE_ARGS": cuda}
    with ThreadPoolExecutor() as pool:
        running = {
            "package": pool.submit(_run, [sys.executable, "-m", "pip", *install], **flags),
            "native tests": pool.submit(
                _cmake, "tests/native", "build/native-gpu", "-DUNLEARN_TEST_BACKEND=gpu", cuda
            ),
        }
    broken = {name: str(error) for name, made in running.items() if (error := made.exception())}
    if broken:
        notes["failed"] = "; ".join(f"{name}: {error}" for name, error in broken.items())[:500]
    return len(broken)


def _cmake(source: str, folder: str, *definitions: str) -> None:
    generator = ["-G", "Ninja"] if _which("ninja") else []
    _run(["cmake", "-S", source, "-B", folder, *generator, *definitions])
    _run(["cmake", "--build", folder, "--parallel", str(os.cpu_count())])


def _run(command: Sequence[str], **variables: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env=_environment() | variables, check=True)


def _environment() -> dict[str, str]:
    # cmake and ninja may be installed beside this Python only, and CUDA's tools off the PATH.
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    folders = [Path(sys.executable).parent, os.environ["PATH"], cuda / "bin"]
    return {**os.environ, "PATH": ":".join(map(str, folders))}


def _which(program: str) -> str | None:
    return shutil.which(program, path=_environment()["PATH"])


def native(notes: Notes, options: argparse.Namespace) -> int:
    """Run the native tests on the card: the sources that the CUDA checker runs on a CPU."""
    if not torch.cuda.is_available():
        return skip(notes, "no GPU")
    run = subprocess.run([NATIVE_TESTS], stdout=subprocess.PIPE, text=True)
    print(run.stdout)
    lines = run.stdout.strip().splitlines()
    notes["result"] = lines[-1] if lines else f"exit code {run.returncode}"
    notes["failures"] = [line for line in lines if line.startswith("FAIL")][:20]
    return run.returncode


def sanitizer(notes: Notes, options: argparse.Namespace) -> int:
    """Run one of compute-sanitizer's tools on the native tests, case by case."""
    if not torch.cuda.is_available():
        return skip(notes, "no GPU")
    if _which("compute-sanitizer") is None:
        return skip(notes, "compute-sanitizer is not installed")
    # Starting under the tool takes longer than most cases: as many at a time as there are cores.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cases = [pool.submit(_sanitized, case, options) for case in SANITIZED]
        outcomes = []
        for case in as_completed(cases):
            name, outcome, said = case.result()
            notes.row(case=name, outcome=outcome, said=said)
            outcomes.append((name, outcome))
    for wrong in ("finding", "not finished"):
        if names := [name for name, outcome in outcomes if outcome == wrong]:
            notes["failed"] = f"{wrong}: {', '.join(names)}"
            return 1
    return 0


def _sanitized(case: str, options: argparse.Namespace) -> tuple[str, str, str]:
    tool = [_which("compute-sanitizer") or "", f"--tool={options.tool}", "--error-exitcode=9"]
    command = [*tool, str(NATIVE_TESTS), case]
    try:
        run = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=options.case_seconds,
            env={**os.environ, "UNLEARN_REDUCED": "1"},  # as for ThreadSanitizer
        )
    except subprocess.TimeoutExpired:
        return case, "not finished", f"stopped after {options.case_seconds} s"
    print(f"+ {' '.join(command)}\n{run.stdout[-4000:]}", flush=True)
    said = " ".join(line for line in run.stdout.splitlines() if "SUMMARY" in line or "FAIL" in line)
    # racecheck counts hazards, the others errors.
    clean = run.returncode == 0 and re.search(r"SUMMARY: 0 (errors|hazards)", said)
    return case, "clean" if clean else "finding", said[:300] or f"exit code {run.returncode}"


def tests(notes: Notes, options: argparse.Namespace) -> int:
    """Run ``pytest -m cuda``; without a GPU, a few of the same tests on the CPU."""
    chosen = (
        ["-m", "cuda"] if torch.cuda.is_available() else ["-k", "both_doors and fisher_accumulate_ and cpu"]
    )
    files = ["tests"] if torch.cuda.is_available() else ["tests/test_ops.py"]
    shared = importlib.util.find_spec("xdist") is not None and torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *chosen]
        # Compute contexts take half a gigabyte of the card each.
        command += ["-n", str(min(8, os.cpu_count() or 1))] if shared else []
        command += ["--continue-on-collection-errors", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT).returncode
        if not report.exists():
            notes["failed"] = f"pytest left no report, exit code {code}"
            return 1
        return _read_report(notes, report, code)


def _read_report(notes: Notes, report: Path, code: int) -> int:
    outcomes: dict[str, list[str]] = {"failure": [], "error": [], "skipped": [], "passed": []}
    for case in ET.parse(report).getroot().iter("testcase"):
        outcome = next((child.tag for child in case if child.tag in outcomes), "passed")
        outcomes[outcome].append(f"{case.get('classname')}::{case.get('name')}")
    for name, of_it in outcomes.items():
        notes[name] = len(of_it)
    broken = outcomes["failure"] + outcomes["error"]
    notes["names of the failed"] = broken[:50]
    if broken or code:
        notes["failed"] = f"{len(broken)} of {sum(map(len, outcomes.values()))} failed, exit code {code}"
    elif not outcomes["passed"]:
        notes["failed"] = "not one test ran"
        return 1
    return code


STAGES: dict[str, Callable[[Notes, argparse.Namespace], int]] = {
    "environment": environment,
    "build": build,
    "native": native,
    "sanitizer": sanitizer,
    "tests": tests,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.checks", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--tool", choices=TOOLS, default=TOOLS[0])
    parser.add_argument("--case-seconds", type=float, default=15.0, help="for one case of a sanitizer")
    parser.add_argument("--dry", action="store_true", help="also without a GPU")
    parser.add_argument("found", type=Path)
    options = parser.parse_args(arguments)
    return STAGES[options.stage](Notes(options.found), options)


if __name__ == "__main__":
    sys.exit(main())
