"""Holds the compiled CUDA kernels to the budgets in budget.json, without a GPU.

    static_checks.py [--update] OBJECT...

Every instance of a kernel belongs to a row, named by the kernel and by what its template arguments
hold. A row states, by architecture, the most registers and the least occupancy (per cent of the warps
that a multiprocessor holds) of its instances, and the instructions each of them must have. No kernel
may spill or use local memory. `--update` writes the registers and occupancies of the objects into
budget.json, where whoever reviews a change sees it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
BUDGET = HERE / "budget.json"
TOOLS = HERE.parent.parent / "build" / "cuda-tools"
# Its wheel holds cuobjdump and nvdisasm, which not every installation of nvcc has.
TRITON = "triton==3.8.0"
LOCAL_MEMORY = ("LDL", "STL")


@dataclass
class Instance:
    """One compiled kernel: a template instance for one architecture."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    instructions: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor holds: CUDA C++ Programming Guide, specifications per compute capability."""

    warps: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


PROCESSORS = {
    80: Processor(64, 32, 164 << 10),
    86: Processor(48, 16, 100 << 10),
    89: Processor(48, 24, 100 << 10),
    90: Processor(64, 32, 228 << 10),
    100: Processor(64, 32, 228 << 10),
    120: Processor(48, 24, 100 << 10),
}
RESERVED = 1024  # bytes of shared memory the system takes for every block


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def occupancy(arch: int, threads: int, registers: int, shared: int) -> int:
    """Per cent of a multiprocessor's warps that blocks of such a kernel can fill."""
    p = PROCESSORS[arch]
    warps = -(-threads // 32)
    # Registers come in units of 256 per warp, and a warp's lie in one of four partitions.
    by_registers = p.registers // 4 // round_up(registers * 32, 256) * 4 // warps
    by_shared = p.shared // round_up(shared + RESERVED, 128)
    return 100 * min(p.blocks, p.warps // warps, by_registers, by_shared) * warps // p.warps


def tools() -> Path:
    """The folder of cuobjdump and nvdisasm: of the CUDA toolkit, else unpacked from the triton wheel."""
    found = shutil.which("cuobjdump")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    for folder in [*([Path(found).parent] if found else []), home, TOOLS]:
        if all((folder / name).exists() for name in ("cuobjdump", "nvdisasm")):
            return folder
    print(f"cuobjdump: not in the CUDA toolkit, taken from {TRITON}")
    TOOLS.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "-d", TOOLS, TRITON], check=True)
    (wheel,) = TOOLS.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("nvdisasm", "cuobjdump"):
            tool = TOOLS / name
            tool.write_bytes(archive.read(f"triton/backends/nvidia/bin/{name}"))
            tool.chmod(0o755)
    wheel.unlink()
    return TOOLS


def cuobjdump(option: str, path: str) -> Iterator[tuple[int, str, str]]:
    """Architecture, plain kernel name and line of everything it prints about kernels."""
    folder = tools()
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = [folder / "cuobjdump", option, path]
    mangled = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env).stdout
    text = subprocess.run(["c++filt"], input=mangled, stdout=subprocess.PIPE, text=True, check=True).stdout
    arch, name = 0, ""
    for line in text.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            arch, name = int(found[1]), ""
        elif found := re.match(r"\s*Function\s*:?\s(.*?):?$", line):
            name = plain(found[1])
        elif name:
            yield arch, name, line


def plain(signature: str) -> str:
    """`list_kernel<Row<float,float>,FisherAccumulate<float,1>,false>` of what a linker sees."""
    name = signature.replace("(anonymous namespace)::", "").replace("unlearn_ext::", "").removeprefix("void ")
    return name.split("(")[0].replace(" ", "")


def instances(path: str) -> list[Instance]:
    """The kernels of an object file."""
    found: dict[tuple[int, str], Instance] = {}
    for arch, name, line in cuobjdump("-res-usage", path):
        if "REG:" in line:
            use = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
            # From 9.0 on the reserved shared memory is counted in.
            shared = max(use["SHARED"] - (RESERVED if arch >= 90 else 0), 0)
            found[arch, name] = Instance(name, arch, use["REG"], use["STACK"] + use["LOCAL"], shared)
    for arch, name, line in cuobjdump("-sass", path):
        if op := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", line):
            found[arch, name].instructions.add(op[1])
    return list(found.values())


def row_of(instance: Instance, rows: dict[str, dict]) -> str | None:
    """The row whose first word is the kernel's name and whose others are all among its template arguments.

    Of several such rows the one with the most words.
    """
    kernel, _, arguments = instance.name.partition("<")
    fits = [
        words
        for words in map(str.split, rows)
        if words[0] == kernel and all(word in f"<{arguments}" for word in words[1:])
    ]
    return " ".join(max(fits, key=len)) if fits else None


def check(budget: dict, found: list[Instance], update: bool) -> list[str]:
    """Complaints; with `update` only those that no number in the budget can settle."""
    architectures, rows, bad = budget["architectures"], budget["kernels"], []
    for arch in sorted(set(architectures) ^ {i.arch for i in found}):
        bad.append(f"sm_{arch} is {'not in the objects' if arch in architectures else 'not in the budget'}")
    measured: dict[str, dict[int, list[Instance]]] = {row: {a: [] for a in architectures} for row in rows}
    for instance in found:
        row = row_of(instance, rows)
        where = f"sm_{instance.arch} {instance.name}"
        if row is None:
            bad.append(f"{where}: no row of the budget names it")
            continue
        if instance.arch in architectures:
            measured[row][instance.arch].append(instance)
        if instance.stack or any(op.startswith(LOCAL_MEMORY) for op in instance.instructions):
            bad.append(f"{where}: {instance.stack} bytes of local memory, or instructions that use some")
        for wanted in rows[row].get("needs", []):
            if not any(op.startswith(wanted) for op in instance.instructions):
                bad.append(f"{where}: has no {wanted}")
    for row, by_arch in measured.items():
        limits = rows[row]
        worst = []
        for arch, group in by_arch.items():
            if not group:
                bad.append(f"sm_{arch} {row}: no kernel of this name")
                break
            shared = limits.get("dynamic_shared", 0)
            occupancies = [occupancy(arch, limits["threads"], i.registers, i.shared + shared) for i in group]
            worst.append((max(i.registers for i in group), min(occupancies)))
        else:
            registers, occupancies = (list(column) for column in zip(*worst, strict=True))
            if update:
                limits["registers"], limits["occupancy"] = registers, occupancies
            for arch, uses, may in zip(architectures, registers, limits["registers"], strict=True):
                if uses > may:
                    bad.append(f"sm_{arch} {row}: {uses} registers, {may} allowed")
            for arch, reaches, least in zip(architectures, occupancies, limits["occupancy"], strict=True):
                if reaches < least:
                    bad.append(f"sm_{arch} {row}: occupancy {reaches} %, at least {least} % wanted")
    return bad


def written(budget: dict) -> str:
    """One line per kernel, so that a change of one is a change of one line."""
    rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in budget["kernels"].items())
    architectures = json.dumps(budget["architectures"])
    return f'{{\n  "architectures": {architectures},\n  "kernels": {{\n{rows}\n  }}\n}}\n'


def main(arguments: list[str]) -> int:
    update = "--update" in arguments
    objects = [argument for argument in arguments if not argument.startswith("-")]
    if not objects:
        sys.exit(__doc__)
    budget = json.loads(BUDGET.read_text(encoding="utf-8"))
    tools()  # fetched once, before several look for them
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [instance for of_one in pool.map(instances, objects) for instance in of_one]
    bad = check(budget, found, update)
    if update:
        BUDGET.write_text(written(budget), encoding="utf-8")
    if bad:
        print("\n".join(bad))
    print(f"{len(found)} kernels held to {len(budget['kernels'])} budgets: {len(bad)} complaints")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
