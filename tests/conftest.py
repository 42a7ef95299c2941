import os
import random
import sys
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# The default profile draws the same examples everywhere; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("default")


# It registers a device for the whole process: test_fallback.py runs it in one of its own. Collecting doctests
# would import it.
collect_ignore = [] if any("foreign_device" in word for word in sys.argv) else ["foreign_device.py"]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "slow: needs minutes or many gigabytes; left out unless asked for")
    if config.getoption("--slow") and config.option.markexpr == "not slow":
        config.option.markexpr = ""


def _physical_cores():
    """Cores this process may use; the hardware threads of one core count once."""
    cpus = os.sched_getaffinity(0)
    try:
        siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
        return len({Path(siblings.format(cpu)).read_text() for cpu in cpus})
    except OSError:
        return len(cpus)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """How many processes `-n auto`, which `make test` passes, stands for; 0 is this one alone."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # pytest-xdist's own rule reads it
    # Starting workers takes longer than most files. Slow tests need the memory for themselves, CUDA tests
    # the GPU.
    few = len(config.args) < 3 and all(Path(name.partition("::")[0]).is_file() for name in config.args)
    chosen = config.option.markexpr.replace("not slow", "").replace("not cuda", "")
    alone = few or config.getoption("--slow") or "slow" in chosen or "cuda" in chosen or not _why_no_cuda()
    return 0 if alone else min(_physical_cores(), 16)


def _why_no_cuda():
    if not torch.cuda.is_available():
        return "no CUDA device"
    from unlearn_ext import ops

    return "" if ops.build_info()["cuda"] else "built without CUDA"


def pytest_report_header(config):
    return f"cuda tests: {'left out, ' + reason if (reason := _why_no_cuda()) else 'run'}"


def pytest_collection_modifyitems(config, items):
    # Left out rather than skipped: they are as many as all others together. `-m cuda` shows them as skipped.
    if "cuda" not in config.option.markexpr and _why_no_cuda():
        left_out = [item for item in items if item.get_closest_marker("cuda")]
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=left_out)
    # `-m slow` asks for the slow ones as `--slow` does.
    if not config.getoption("--slow") and "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device the ops run on."""
    if request.param == "cuda" and (reason := _why_no_cuda()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def generator(request):
    """A CPU generator whose seed depends on the test alone, so that a failure repeats on its own."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.nodeid.encode()))


def seed_everything():
    """Seed the global generators, with a number that no test uses: equal draws would depend on each other."""
    torch.default_generator.manual_seed(30_402_457)
    if torch.cuda.is_initialized():  # else nothing has been drawn there
        torch.cuda.manual_seed_all(30_402_457)
    random.seed(30_402_457)
    np.random.seed(30_402_457)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    # What several tests share is made before whichever of them comes first, and must not change its draws.
    if fixturedef.scope == "function":
        return (yield)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed_everything()
    try:
        return (yield)
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    # Tests of this size gain nothing from threads; that results do not depend on them has its own tests.
    # Before fixtures of any scope, and after a test that asked for more.
    torch.set_num_threads(1)
    # What a test draws without a seed of its own is the same alone and after others, in whatever process.
    seed_everything()
    # Some modules of torch.testing freeze the flags of backends for the whole process when they are imported.
    torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True
