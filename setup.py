"""Builds the extension by running CMake; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake tree per Python and torch version, so that environments can share a checkout."""

    def build_extension(self, ext: Extension) -> None:
        """Configure, build and install into the package folder."""
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / f"{python}-torch{torch.__version__}"
        cuda = os.environ.get("UNLEARN_CUDA")
        extra = shlex.split(os.environ.get("UNLEARN_CMAKE_ARGS", ""))
        subprocess.run(
            [
                *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DUNLEARN_VERSION={self.distribution.get_version()}",
                *([f"-DUNLEARN_CUDA={cuda}"] if cuda else []),
                *extra,
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", build], check=True)
        subprocess.run(["cmake", "--install", build, "--prefix", package], check=True)


# Not an abi3 wheel: pybind11 binds the module to one Python version.
setup(ext_modules=[Extension("unlearn_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
