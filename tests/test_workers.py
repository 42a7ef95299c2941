"""How many processes the tests are spread over."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def conftest(monkeypatch, pytestconfig):
    """The conftest.py of this folder, on a machine of eight threads on four cores and no GPU."""
    conftest = pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))
    monkeypatch.delenv("PYTEST_XDIST_AUTO_NUM_WORKERS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    siblings = {f"cpu{cpu}/topology": f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}
    read = lambda path: next(text for name, text in siblings.items() if name in str(path))  # noqa: E731
    monkeypatch.setattr(conftest.Path, "read_text", read)
    monkeypatch.setattr(conftest, "_why_no_cuda", lambda: "no CUDA device")
    return conftest


@pytest.fixture
def workers(conftest):
    def count(*args, mark="not slow", slow=False):
        config = SimpleNamespace(
            args=list(args), option=SimpleNamespace(markexpr=mark), getoption={"--slow": slow}.__getitem__
        )
        return conftest.pytest_xdist_auto_num_workers(config)

    return count


def test_one_per_core(workers):
    assert workers("tests", "unlearn_ext") == workers(os.path.dirname(__file__)) == 4
    assert workers(__file__, "tests") == 4


def test_all_in_one_where_workers_cost_more_than_they_bring(workers):
    assert workers(__file__) == workers(f"{__file__}::test_one_per_core") == workers(__file__, __file__) == 0


@pytest.mark.parametrize("mark", ["slow", "slow or cuda", "cuda", "cuda and not slow"])
def test_all_in_one_where_tests_need_the_machine_for_themselves(workers, mark):
    assert workers("tests", mark=mark) == 0


def test_all_in_one_with_slow_tests_or_a_gpu(workers, conftest, monkeypatch):
    assert workers("tests", slow=True) == 0
    monkeypatch.setattr(conftest, "_why_no_cuda", lambda: "")
    assert workers("tests") == 0


def test_the_environment_decides_first(workers, monkeypatch):
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    assert workers("tests") is None


def test_every_thread_counts_where_cores_are_not_told(workers, conftest, monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(conftest.Path, "read_text", missing)
    assert workers("tests") == 8
