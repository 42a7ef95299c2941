"""Who may use whom: the arrows of the package point one way, and the kernels know nothing of PyTorch."""

import ast
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unlearn_ext"
CSRC = ROOT / "csrc"

# Module -> modules of the package it may import. A module that is not here does not pass.
ALLOWED = {
    "_C": set(),
    "_internal": set(),
    "ops": {"_C", "_internal", "ops.reference"},
    "ops.reference": set(),
    "tasks": set(),
    "distributed": {"tasks", "_internal"},
    "resume": {"distributed", "tasks", "_internal"},
    "results": {"_internal"},
    "optim": {"ops", "_internal"},
    "fisher": {"fisher.engine", "ops", "subspace", "distributed", "resume", "tasks", "_internal"},
    "fisher.engine": {"ops", "tasks", "_internal"},
    "subspace": {"ops", "tasks", "distributed", "resume", "_internal"},
    "masks": {"ops", "tasks", "fisher", "fisher.engine", "distributed", "_internal"},
    "evaluation.metrics": {"tasks", "distributed", "_internal"},
    "methods": {
        "ops",
        "distributed",
        "tasks",
        "fisher",
        "subspace",
        "masks",
        "optim",
        "evaluation.metrics",
        "results",
        "_internal",
    },
    "evaluation": {"methods", "evaluation.metrics", "distributed", "tasks", "results", "_internal"},
    "hf": {"evaluation", "ops", "optim", "_internal"},
    "integrations": {"hf", "methods", "ops", "tasks", "results", "_internal"},
    "demo": {"evaluation", "evaluation.metrics", "fisher", "methods", "tasks", "results", "_internal"},
    "cli": {"__init__", "demo", "evaluation", "methods", "ops", "tasks", "_internal"},
    "__main__": {"cli"},
}
# Modules under the names that users know; they only hand on, and nothing of the package reads them.
PUBLIC = {
    "comparison": {"evaluation", "evaluation.metrics"},
    "data": {"distributed", "tasks"},
    "engine": {"fisher.engine"},
    "importance": {"fisher", "fisher.engine", "tasks"},
    "losses": {"tasks"},
    "metrics": {"evaluation.metrics"},
    "report": {"evaluation", "results", "_internal"},
}
ALLOWED |= PUBLIC
ALLOWED["__init__"] = {
    *PUBLIC,
    "_internal",
    "evaluation",
    "fisher",
    "hf",
    "integrations",
    "masks",
    "methods",
    "ops",
    "optim",
    "results",
    "subspace",
    "tasks",
}

FILES = sorted(PACKAGE.rglob("*.py"))


def _room(dotted):
    """Name in ALLOWED of a module below the package: its folder, or the folder's folder."""
    parts = dotted.removesuffix(".__init__").split(".")
    pair = ".".join(parts[:2])
    return pair if pair in ALLOWED else parts[0]


def _module(path):
    return _room(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def _imports(path):
    """Absolute dotted names that a file imports, wherever in it."""
    package = ["unlearn_ext", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def _is_module(dotted):
    path = PACKAGE.joinpath(*dotted.split("."))
    return dotted == "_C" or path.with_suffix(".py").exists() or path.is_dir()


def _edges(path):
    for name in _imports(path):
        root, _, rest = name.partition(".")
        if root == "unlearn_ext":
            # What is no module is a name that one gives out.
            while rest and not _is_module(rest):
                rest = rest.rpartition(".")[0]
            yield _room(rest) if rest else "__init__"


def test_every_allowed_arrow_points_down():
    graphlib.TopologicalSorter(ALLOWED).prepare()  # raises CycleError


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_only_what_lies_below_them(path):
    module = _module(path)
    assert module in ALLOWED, f"say in ALLOWED what {module} may import"
    assert set(_edges(path)) - {module} <= ALLOWED[module]


# typing_extensions comes with torch.
@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_itself_needs_only_torch_and_numpy(path):
    if _module(path) == "demo":
        pytest.skip("the demo comes with its own requirements")
    imported = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    allowed = (
        {"torch"}
        if _module(path) == "ops.reference"
        else {"torch", "numpy", "typing_extensions", "unlearn_ext"}
    )
    assert imported - sys.stdlib_module_names <= allowed


def _sources(*folders):
    return [path for folder in folders for path in sorted((CSRC / folder).rglob("*")) if path.is_file()]


def _code(path):
    """A source without its comments."""
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.S)


def _lines_with(pattern, paths):
    return {
        (str(path.relative_to(CSRC)), line.strip())
        for path in paths
        for line in _code(path).splitlines()
        if re.search(pattern, line)
    }


def test_kernels_are_launched_in_one_place():
    assert {path for path, _ in _lines_with("<<<", _sources("core", "kernels", "torch"))} == {"core/simt.h"}


def test_kernels_know_nothing_of_torch():
    assert not _lines_with(
        r"#include\s*[<\"](torch|ATen|c10|pybind11)\b|\bat::|\bc10::", _sources("core", "kernels")
    )


@pytest.mark.parametrize("folder, layers", [("core", {"core"}), ("kernels", {"core", "kernels"})])
def test_sources_include_only_their_own_layer_and_those_below(folder, layers):
    own = _lines_with(r"#include\s*\"", _sources(folder))
    # The stand-in for the CUDA runtime in native tests, found through their include path.
    own.discard(("core/simt.h", '#include "simt_cpu.h"'))
    assert {re.search(r'"(\w+)/', line).group(1) for _, line in own} <= layers


def test_macros_carry_the_name_of_the_package():
    defined = _lines_with(r"#\s*define", _sources("."))
    # Shared memory: the names are shared with the CPU stand-in, and they cannot be anything but macros.
    names = {(path, re.search(r"define\s+(\w+)", line).group(1)) for path, line in defined}
    shared = {("core/simt.h", "SIMT_SHARED"), ("core/simt.h", "SIMT_DYN_SHARED")}
    assert {name for path, name in names - shared if not name.startswith("UNLEARN_")} == set()
