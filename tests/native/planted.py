"""Plants bugs in copies of the CUDA kernels, one at a time, and expects the right check to turn red.

    planted.py [text]     all bugs, or those whose name contains the text

The bugs are in planted.txt. A kernel file is compiled with the flags of its build (build/native-*),
linked with the other objects of that build, and run on the cases that should notice, on reduced
sizes; sources are never changed. A bug that nobody notices means that the tests in this folder need
another case.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build"
LIMIT = 240  # seconds for a run: a bug that hangs counts as unnoticed

# What a mode of run.sh prints when it turns red for the reason it is there for.
RED = {
    "emulate": r"^FAIL ",
    "emulate-asan": r"ERROR: AddressSanitizer|runtime error:",
    "race": r"WARNING: ThreadSanitizer: data race",
    "race-inter": r"WARNING: ThreadSanitizer: data race",
    "traffic": r"^FAIL .* budgeted$",
}


@dataclass(frozen=True)
class Bug:
    """Where `old` stands in `file`, put `new` and compile `unit`: `cases` must turn red in `mode`."""

    name: str
    file: str  # below csrc/
    unit: str  # the same file or, for a header, a kernel that includes it
    old: str
    new: str
    mode: str
    cases: str


def read(path: Path) -> list[Bug]:
    """The bugs of a file like planted.txt."""
    bugs = []
    for paragraph in re.split(r"\n{2,}", path.read_text(encoding="utf-8").strip()):
        if paragraph.startswith("#"):
            continue
        name, head, *lines = paragraph.splitlines()
        files, mode, cases = head.split("; ")
        file, _, unit = files.partition(" in ")
        old, new = ("\n".join(line[2:] for line in lines if line.startswith(sign)) for sign in "-+")
        bugs.append(Bug(name, file, unit or file, old, new, mode, cases))
    return bugs


def command_of(mode: str, source: Path) -> list[str]:
    """How the build of `mode` compiles a kernel file, without its output and without stopping at warnings."""
    commands = json.loads((folder_of(mode) / "compile_commands.json").read_text(encoding="utf-8"))
    (entry,) = (c for c in commands if Path(c["file"]).resolve() == source)
    words = entry["command"].split()
    return [word for word in words[: words.index("-o")] if word != "-Werror"]


def folder_of(mode: str) -> Path:
    return BUILD / f"native-{mode.removesuffix('-inter')}"


def captured(command: list, **options) -> subprocess.CompletedProcess[str]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    return subprocess.run(command, **streams, **options)


def run(mode: str, cases: str, program: Path | None = None) -> tuple[bool, str]:
    """Whether the cases passed, and what they printed; `program` takes the place of the build's own."""
    env = {**os.environ, "UNLEARN_STOP_AT_FAILURE": "1", "UNLEARN_REDUCED": "1"}
    if program is not None:
        env["UNLEARN_TEST_PROGRAM"] = str(program)
    command = [HERE / "run.sh", "--run", mode, cases]
    try:
        done = captured(command, env=env, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return False, f"no end within {LIMIT} s"
    return done.returncode == 0, done.stdout


def planted(bug: Bug) -> str:
    """Empty if the bug turned the right check red, else what happened instead."""
    text = (CSRC / bug.file).read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        return f"its text is {text.count(bug.old)} times in {bug.file}"
    name = re.sub(r"\W+", "-", bug.name)
    copy = BUILD / "planted" / name
    patched = copy / "csrc" / bug.file
    patched.parent.mkdir(parents=True, exist_ok=True)
    patched.write_text(text.replace(bug.old, bug.new), encoding="utf-8")

    # The copy holds one file; it is found before the one it stands for.
    source = patched if bug.unit == bug.file else CSRC / bug.unit
    command = command_of(bug.mode, CSRC / bug.unit)
    kernel = copy / "kernel.o"
    options = [f"-I{copy / 'csrc'}", *command[1:], "-w", "-x", "c++"]
    compiled = captured([command[0], *options, "-c", source, "-o", kernel], cwd=folder_of(bug.mode))
    if compiled.returncode != 0:
        return f"does not compile:\n{compiled.stdout[:2000]}"
    objects = [
        path
        for target in ("test_kernels", "kernels_cuda", "known_traffic")
        for path in (folder_of(bug.mode) / "CMakeFiles" / f"{target}.dir").rglob("*.o")
        if path.name != f"{Path(bug.unit).name}.o"
    ]
    program = copy / "test_kernels"
    # For the traffic only the compiler's half of a sanitizer is wanted.
    flags = [word for word in command if word.startswith("-fsanitize") and bug.mode != "traffic"]
    subprocess.run([command[0], *flags, *objects, kernel, "-o", program], check=True)
    passed, output = run(bug.mode, bug.cases, program)
    program.unlink()
    if passed:
        return "nobody noticed"
    if not re.search(RED[bug.mode], output, re.MULTILINE):
        return f"red, but not as {bug.mode} should be:\n{output[-2000:]}"
    return ""


def main(arguments: list[str]) -> int:
    bugs = [bug for bug in read(HERE / "planted.txt") if not arguments or arguments[0] in bug.name]
    if not bugs:
        sys.exit(__doc__)
    for mode in sorted({bug.mode.removesuffix("-inter") for bug in bugs}):
        subprocess.run([HERE / "run.sh", "--build", mode], check=True)
    start = time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sound = sorted({(bug.mode, bug.cases) for bug in bugs})
        for (mode, cases), (passed, output) in zip(
            sound, pool.map(lambda pair: run(*pair), sound), strict=True
        ):
            if not passed or re.search(r"^0 cases", output, re.MULTILINE):
                sys.exit(f"{mode}, {cases}: not green without a planted bug\n{output[-2000:]}")
        print(f"{len(sound)} checks are green without a bug ({time.monotonic() - start:.0f} s)", flush=True)
        survived = 0
        for bug, trouble in zip(bugs, pool.map(planted, bugs), strict=True):
            survived += trouble != ""
            verdict = "SURVIVED" if trouble else "red"
            print(f"{verdict:8} {bug.mode:12} {bug.name} ({bug.file}) {trouble}", flush=True)
    print(f"{len(bugs)} bugs planted, {survived} survived ({time.monotonic() - start:.0f} s)")
    return survived != 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
