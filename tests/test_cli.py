import subprocess
import sys

import pytest
import torch

import unlearn_ext
from unlearn_ext import cli, demo, ops


def test_info_tells_version_build_and_operators(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    build = ops.build_info()
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert unlearn_ext.__version__ in lines["unlearn_ext"]
    assert torch.__version__ in lines["torch"]
    assert f"{'yes' if build['cuda'] else 'no'}: {build['cuda_reason']}" in lines["CUDA build"]
    assert "CUDA architectures" in lines
    assert build["cpu_capability"] in lines["CPU capability"]
    for schema in build["schemas"]:
        assert schema in printed


@pytest.mark.parametrize("architectures, shown", [(["80", "90"], "80, 90"), ([], "none")])
def test_info_of_other_builds(monkeypatch, capsys, architectures, shown):
    build = {**ops.build_info(), "cuda_architectures": architectures}
    monkeypatch.setattr(ops, "build_info", lambda: build)
    cli.main(["info"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("CUDA architectures")]
    assert line.endswith(f"  {shown}")


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "unlearn_ext", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, unlearn_ext.__version__)


@pytest.mark.parametrize("arguments", [[], ["forget"], ["demo", "--seed", "x"], ["info", "--out", "x"]])
def test_wrong_usage_exits_with_2_and_a_hint(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: python -m unlearn_ext" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["info", "--help"], ["demo", "--help"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 0
    assert "usage: python -m unlearn_ext" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, code, message",
    [
        (ImportError("the demo needs scikit-learn: pip install"), 1, "demo: the demo needs scikit-learn"),
        (PermissionError(13, "Permission denied", "/root"), 1, "demo: [Errno 13] Permission denied: '/root'"),
        (ValueError("alpha must be"), 1, "demo: alpha must be"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_a_line_and_an_exit_code(monkeypatch, capsys, error, code, message):
    def failing(out, *, seed):
        raise error

    monkeypatch.setattr(demo, "run", failing)
    assert cli.main(["demo"]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert len(printed.err.splitlines()) == 1


def test_demo_passes_its_options(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda out, **settings: seen.update(out=out, **settings))
    assert cli.main(["demo", "--out", str(tmp_path / "x"), "--seed", "3"]) == 0
    assert seen == {"out": tmp_path / "x", "seed": 3}
