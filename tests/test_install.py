"""Installing: with a build that fails, without tools, without a build. The sources here are small stand-ins."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs the sources")
pytest.importorskip("setuptools.command.bdist_wheel", reason="needs setuptools 70.1 to make wheels")

FAILS = 'cmake_minimum_required(VERSION 3.24)\nproject(planted NONE)\nmessage(FATAL_ERROR "a planted error")\n'


@pytest.fixture
def sources(tmp_path):
    """The package's build files around an empty package, with a build that fails."""
    folder = tmp_path / "sources"
    (folder / "unlearn_ext").mkdir(parents=True)
    (folder / "unlearn_ext" / "__init__.py").write_text("")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "CMakeLists.txt").write_text(FAILS)
    return folder


def _wheel(sources, mode, path=None):
    env = os.environ | {"UNLEARN_BUILD": mode} | ({"PATH": path} if path is not None else {})
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel"],
        cwd=sources,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def _contents(sources):
    (wheel,) = (sources / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (facts,) = (name for name in names if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(facts).decode()
        assert not any(name.endswith(".so") for name in names)
        record = "unlearn_ext/_build_info.json"
        return json.loads(archive.read(record)) if record in names else None


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_an_error_of_the_build_ends_in_a_pure_wheel_that_knows_it(sources):
    run = _wheel(sources, "auto")
    assert run.returncode == 0, run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("unlearn_ext: nothing was compiled")]
    assert len(said) == 1
    assert "the build failed: a planted error" in said[0]
    assert _contents(sources) == {"reason": "the build failed: a planted error", "mend": ""}


def test_missing_tools_end_in_a_pure_wheel_that_names_them(sources, tmp_path):
    run = _wheel(sources, "auto", path=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert _contents(sources) == {"reason": "CMake was not found", "mend": "`pip install cmake ninja`"}


def test_a_build_that_is_required_fails_and_says_why(sources, tmp_path):
    run = _wheel(sources, "require", path=str(tmp_path))
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1] == "unlearn_ext: CMake was not found. `pip install cmake ninja`"
    assert not (sources / "dist").exists()


def test_no_build_is_a_pure_wheel(sources, tmp_path):
    run = _wheel(sources, "off", path=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert _contents(sources) is None


def test_a_mode_that_is_none_is_refused(sources):
    run = _wheel(sources, "on")
    assert run.returncode != 0
    assert "UNLEARN_BUILD must be one of auto, require, off, got 'on'" in run.stderr
