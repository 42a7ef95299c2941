"""What the build promises: variants for several CPUs, kept apart, one of them chosen at run time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_C = pytest.importorskip("unlearn_ext._C", reason="nothing was compiled")

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"cp{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}"
CAPABILITIES = ["amx", "avx512_bf16", "avx512", "avx2", "baseline"]  # best first


def kernel_objects(variant: str) -> list[Path]:
    return sorted(BUILD.glob(f"CMakeFiles/kernels_{variant}.dir/**/*.o"))


@pytest.mark.skipif(not kernel_objects("baseline"), reason="the package was not built in this checkout")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.parametrize(
    "variant",
    # Two are the kernels of avx512 on a CPU with more instructions.
    [c for c in _C.build_info()["cpu_capabilities"] if c not in ("baseline", "amx", "avx512_bf16")],
)
def test_no_code_of_a_cpu_variant_can_replace_another(variant):
    # Of weak definitions with one name the linker keeps any: an inline function compiled for AVX-512 would
    # then run on every CPU.
    objects = kernel_objects(variant)
    assert len(objects) == len(kernel_objects("baseline"))
    listing = subprocess.run(["nm", "-A", "-C", *objects], check=True, capture_output=True, text=True).stdout
    symbols = [line for line in listing.splitlines() if line.split(":", 1)[1][17:18] in "WVu"]
    # The address of the unwinder's routine: data, and the same in every variant.
    symbols = [line for line in symbols if not line.endswith(" V DW.ref.__gxx_personality_v0")]
    assert symbols == []


def ask(capability: str) -> subprocess.CompletedProcess[str]:
    code = """
import torch
from unlearn_ext import _C
mask = torch.arange(1000) % 3 == 0
assert torch.equal(_C.unpack_mask(_C.pack_mask(mask), [1000]), mask)
fisher = [torch.ones(1000)]
_C.fisher_accumulate_(fisher, [torch.full((1000,), 2.0)])
assert torch.equal(fisher[0], torch.full((1000,), 5.0))
print(_C.build_info()["cpu_capability"])
"""
    environment = {**os.environ, "UNLEARN_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("capability", _C.build_info()["cpu_capabilities"])
def test_capability_can_be_lowered(capability):
    best = ask("").stdout.strip()
    got = ask(capability)
    assert got.returncode == 0, got.stderr
    # A wish beyond this CPU gives what it has.
    assert got.stdout.strip() == max(best, capability, key=CAPABILITIES.index)


def test_unknown_capability_is_refused():
    got = ask("sse9")
    assert got.returncode != 0
    assert "UNLEARN_CPU_CAPABILITY must be amx, avx512_bf16, avx512, avx2 or baseline, got sse9" in got.stderr


def test_build_info_describes_this_build():
    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert info["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert isinstance(info["cuda"], bool)
    assert info["cuda_reason"]
    assert bool(info["cuda_architectures"]) == info["cuda"]
    assert len(info["schemas"]) == len(set(info["schemas"]))


TORCH = """
class version: cuda = {cuda!r}
class _C: _GLIBCXX_USE_CXX11_ABI = True
__version__ = "2.13.0"
"""


@pytest.mark.skipif(not all(map(shutil.which, ("nvcc", "cmake", "ninja"))), reason="needs nvcc and cmake")
@pytest.mark.parametrize("wanted", ["ON", "AUTO"])
def test_a_toolkit_of_another_major_than_torchs_is_told_before_anything_is_compiled(wanted, tmp_path):
    # A torch that only says what it was built for is enough to configure.
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(TORCH.format(cuda="9.2"))
    got = subprocess.run(
        [
            *("cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-DUNLEARN_CUDA={wanted}"),
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    said = " ".join((got.stdout + got.stderr).split())
    assert "torch 2.13.0 is built for CUDA 9.2" in said
    if wanted == "ON":
        assert got.returncode != 0
        assert "set UNLEARN_CUDA=OFF" in said
    else:
        assert got.returncode == 0, said
        assert "unlearn_ext: CUDA OFF (nvcc is" in said
