"""Which library of ops is taken, what is said where it is not the compiled one, and that ops work then."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from op_cases import compiled

from unlearn_ext import cli, ops
from unlearn_ext._internal import version
from unlearn_ext.ops import fallback, library

HERE = f"torch {torch.__version__}"


@pytest.fixture
def bare(tmp_path):
    """The ops and what they are built on alone, without the compiled library beside them."""
    package = tmp_path / "unlearn_ext"
    package.mkdir()
    (package / "__init__.py").write_text("")
    for part in ("ops", "_internal"):
        shutil.copytree(Path(ops.__file__).parents[1] / part, package / part)
    return tmp_path


WORKS = """
import sys, warnings
sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]  # of the checkout
import torch
from unlearn_ext import ops
fisher = [torch.ones(3)]
ops.fisher_accumulate_(fisher, [torch.full((3,), 2.0)])
torch.ops.unlearn_ext.fisher_accumulate_(fisher, [torch.ones(3)])
assert fisher[0].tolist() == [6.0] * 3
try:
    from unlearn_ext import _C
except ImportError:
    print(ops.build_info()["kernels"])
"""


def _run(folder, choice=""):
    env = os.environ | {"UNLEARN_OPS": choice}
    return subprocess.run(
        [sys.executable, "-c", WORKS], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


def test_without_the_library_the_ops_work_and_one_warning_says_what_is_missing(bare):
    run = _run(bare)
    assert (run.returncode, run.stdout) == (0, "reference\n"), run.stderr
    said = [line for line in run.stderr.splitlines() if "unlearn_ext: " in line]
    assert len(said) == 1
    for part in ("plain PyTorch", HERE, "`UNLEARN_BUILD=require pip install", "UNLEARN_OPS=reference"):
        assert part in said[0]


def test_plain_kernels_on_purpose_are_no_warning(bare):
    run = _run(bare, "reference")
    assert (run.returncode, run.stdout, run.stderr) == (0, "reference\n", "")


@pytest.fixture
def loading(tmp_path, monkeypatch):
    """Loads with some files beside the package and some environment: what is found, and what is said."""

    def load(built=None, choice=None, found=None):
        monkeypatch.setattr(library, "_PACKAGE", tmp_path)
        monkeypatch.delenv("UNLEARN_OPS", raising=False)
        if choice is not None:
            monkeypatch.setenv("UNLEARN_OPS", choice)
        if built is not None:
            (tmp_path / "_build_info.json").write_text(json.dumps(built))

        def import_module(name):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(library.importlib, "import_module", import_module)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module, why = library._load()
        told = [one for one in caught if not issubclass(one.category, ResourceWarning)]  # of others' garbage
        return module, why, [str(one.message) for one in told]

    return load


MISSING = ModuleNotFoundError("No module named 'unlearn_ext._C'", name="unlearn_ext._C")


def test_the_library_is_taken_where_it_loads(loading):
    built = {"torch": torch.__version__, "python": "3.11.1", "cuda": "OFF"}
    for choice in (None, "", "auto", "compiled"):
        assert loading(built, choice, found="the library") == ("the library", "", [])


def test_what_the_build_said_is_handed_on(loading):
    built = {"reason": "CMake was not found", "mend": "`pip install cmake ninja`"}
    module, why, (said,) = loading(built, found=MISSING)
    assert (module, why) == (None, "CMake was not found")
    assert "slower: CMake was not found. `pip install cmake ninja`, then `UNLEARN_BUILD=require pip" in said


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_a_record_that_cannot_be_read_is_none(text, loading, tmp_path):
    (tmp_path / "_build_info.json").write_text(text)
    assert loading(found=MISSING)[1].startswith("this installation has no compiled library for torch")


def test_a_library_for_another_torch_is_not_loaded(loading):
    built = {"torch": "1.9.0+cu130", "python": "3.12.1", "cuda": "ON"}
    module, why, (said,) = loading(built, found="what would crash")
    assert module is None
    assert "built for torch 1.9.0+cu130 and Python 3.12.1 (CUDA: ON)" in why
    assert f"this is {HERE}" in said


def test_one_that_does_not_load_says_so(loading):
    module, why, (said,) = loading(found=ImportError("undefined symbol: c10"))
    assert module is None
    assert "undefined symbol: c10" in why
    assert why in said


@pytest.mark.parametrize("found", [MISSING, ImportError("undefined symbol")])
def test_it_can_be_asked_for(loading, found):
    with pytest.raises(ImportError, match=r"UNLEARN_BUILD=require pip install .* mends it$"):
        loading(choice="compiled", found=found)


def test_a_choice_that_is_none_is_refused(loading):
    with pytest.raises(ValueError, match="UNLEARN_OPS must be one of auto, compiled, reference, got 'fast'"):
        loading(choice="fast")


def test_info_says_what_is_missing_and_what_mends_it(monkeypatch, capsys):
    build = ops.build_info() | {"kernels": "reference", "reason": "no compiler", "mend": "`make it`"}
    monkeypatch.setattr(ops, "build_info", lambda: build)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "plain PyTorch: no compiler" in printed
    assert "`make it` brings them" in printed


# ---- CUDA tensors and a library without CUDA


@compiled
@pytest.mark.skipif(ops.build_info()["cuda"], reason="built with CUDA")
def test_the_first_op_on_a_cuda_device_warns_once(monkeypatch):
    # There is no device: the kernel is called as the dispatcher would.
    monkeypatch.setattr(fallback, "KERNELS", {"pack_mask": lambda mask: mask})
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    registered = {}

    class Library:
        def __init__(self, *_):
            pass

        def impl(self, name, kernel, key):
            registered[name, key] = kernel

    monkeypatch.setattr(torch.library, "Library", Library)
    fallback.fill_in("it takes its time")
    assert set(registered) == {("pack_mask", key) for key in ("CUDA", *fallback.OTHER_DEVICES)}
    with pytest.warns(UserWarning, match="it takes its time"):
        assert registered["pack_mask", "CUDA"](3) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registered["pack_mask", "CUDA"](4) == 4
        assert registered["pack_mask", "MPS"](5) == 5


# ---- The version


@pytest.mark.parametrize("text", [None, '[project]\nname = "other"\nversion = "9"\n', "[tool]\n"])
def test_the_version_is_that_of_the_checkout_or_else_of_the_distribution(text, tmp_path, monkeypatch):
    monkeypatch.setattr(version, "__file__", str(tmp_path / "unlearn_ext" / "_internal" / "version.py"))
    monkeypatch.setattr(version.importlib.metadata, "version", lambda name: f"{name} 7")
    read = version.version.__wrapped__
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    assert read() == "unlearn_ext 7"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "unlearn_ext"\nversion = "1.2.3"\n[tool]\n')
    assert read() == "1.2.3"
