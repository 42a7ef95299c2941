"""Builds the compiled library by running CMake, where it can; the rest is in pyproject.toml, CMakeLists.txt.

UNLEARN_BUILD=auto|require|off: without a compiler, or after an error of the build, ``auto`` (the default)
goes on to a package whose ops run on plain PyTorch; ``require`` makes it an error; ``off`` builds nothing.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1
    try:
        from wheel.bdist_wheel import bdist_wheel
    except ImportError:
        bdist_wheel = None

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "require", "off")
MODE = os.environ.get("UNLEARN_BUILD", "") or "auto"
if MODE not in MODES:
    raise SystemExit(f"unlearn_ext: UNLEARN_BUILD must be one of {', '.join(MODES)}, got {MODE!r}")


class CannotBuildError(Exception):
    """Why the library cannot be compiled here, and what to do first; subprocesses have said the rest."""

    def __init__(self, reason, mend=""):
        super().__init__(reason)
        self.mend = mend


def torch_version():
    """The version of the torch to build against."""
    try:
        import torch
    except (ImportError, OSError) as error:
        raise CannotBuildError(
            f"torch cannot be imported where the package is built ({error}); pip's build isolation hides an "
            "installed one"
        ) from error
    return torch.__version__


def run(*command):
    """Run a part of the build, showing what it says; if it fails, the first error it named is the reason."""
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    lines = []
    for line in process.stdout:
        sys.stdout.write(line)
        lines.append(" ".join(line.split()))
    if process.wait() == 0:
        return
    # CMake says what is wrong in the line after "CMake Error at ...:".
    said = [
        after if re.fullmatch(r"CMake Error.*:", line) else line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if re.search(r"\berror\b", line, re.IGNORECASE)
    ]
    why = next(filter(None, [*said, *lines[-1:]]), f"exit status {process.returncode}")
    needs_compiler = re.search(r"CMAKE_C(XX|UDA)_COMPILER|Python_INCLUDE_DIRS|Development", " ".join(said))
    raise CannotBuildError(
        f"the build failed: {why[:200].rstrip('.')}",
        "install a C++20 compiler (g++ 11 or later) and Python's headers" if needs_compiler else "",
    )


class CMakeBuild(build_ext):
    """One CMake tree per Python and torch version, so that environments can share a checkout."""

    def build_extension(self, ext):
        """Compile and install into the package folder, or leave there why not."""
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        try:
            self.compile_into(package)
        except (CannotBuildError, OSError) as raised:
            error = (
                raised
                if isinstance(raised, CannotBuildError)
                else CannotBuildError(f"the build failed: {raised}")
            )
            if MODE == "require":
                raise SystemExit(f"unlearn_ext: {error}. {error.mend}".rstrip(". ")) from error
            self.go_without(package, error)
            return
        if getattr(self, "editable_mode", False):
            # The library itself is copied by setuptools.
            shutil.copy2(package / "_build_info.json", ROOT / "unlearn_ext")

    def compile_into(self, package):
        """Configure, build and install."""
        torch = torch_version()
        if not shutil.which("cmake"):
            raise CannotBuildError("CMake was not found", "`pip install cmake ninja`")
        generator = "Ninja" if shutil.which("ninja") else "Unix Makefiles"
        if generator != "Ninja" and not shutil.which("make"):
            raise CannotBuildError("neither ninja nor make was found", "`pip install ninja`")
        python = f"cp{sys.version_info.major}{sys.version_info.minor}"
        build = ROOT / "build" / f"{python}-torch{torch}{'' if generator == 'Ninja' else '-make'}"
        cuda = os.environ.get("UNLEARN_CUDA")
        run(
            *("cmake", "-S", ROOT, "-B", build, "-G", generator),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DUNLEARN_VERSION={self.distribution.get_version()}",
            *([f"-DUNLEARN_CUDA={cuda}"] if cuda else []),
            *shlex.split(os.environ.get("UNLEARN_CMAKE_ARGS", "")),
        )
        run("cmake", "--build", build, "--parallel", os.cpu_count() or 1)
        run("cmake", "--install", build, "--prefix", package)

    def go_without(self, package, error):
        """Say why once, here and to whoever imports the package."""
        print(
            f"unlearn_ext: nothing was compiled, the ops run on plain PyTorch, which is slower: {error}. "
            f"{error.mend + ', then i' if error.mend else 'I'}nstall again with UNLEARN_BUILD=require and "
            "--no-build-isolation.",
            file=sys.stderr,
        )
        self.extensions.clear()
        self.distribution.ext_modules = []
        folders = {package, *([ROOT / "unlearn_ext"] if getattr(self, "editable_mode", False) else [])}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            # A library of an earlier build is not that of these sources.
            for stale in folder.glob("_C.*"):
                with contextlib.suppress(OSError):
                    stale.unlink()
            text = json.dumps({"reason": str(error), "mend": error.mend})
            folder.joinpath("_build_info.json").write_text(text + "\n", encoding="utf-8")


def commands():
    """What setuptools runs of ours."""
    if MODE == "off":
        return {}
    if bdist_wheel is None:
        return {"build_ext": CMakeBuild}

    class Wheel(bdist_wheel):
        """A wheel for every platform, if nothing was compiled."""

        def run(self):
            self.run_command("build")
            self.root_is_pure = not self.distribution.has_ext_modules()
            super().run()

    return {"build_ext": CMakeBuild, "bdist_wheel": Wheel}


# Not an abi3 wheel: pybind11 binds the module to one Python version.
setup(
    ext_modules=[] if MODE == "off" else [Extension("unlearn_ext._C", [], optional=MODE == "auto")],
    cmdclass=commands(),
)
