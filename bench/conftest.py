"""Options, environment and the fixture that races a group once and reports its contenders one by one."""

import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import roofline
from bench.race import FLOOR, Race, Times, replay, run_race


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("races")
    group.addoption("--race-threads", type=int, default=os.cpu_count(), help="CPU threads (default: all)")
    group.addoption("--race-device", default="cpu", help="cpu (default) or cuda")
    group.addoption("--race-seconds", type=float, default=1.0, help="time per contender (default: 1)")
    group.addoption(
        "--race-laps", type=int, nargs=2, default=(3, 40), help="least and most laps (default: 3 40)"
    )
    group.addoption(
        "--race-command", default="pytest bench/bench_ops.py", help="what the results name as their origin"
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--race-threads"))


def pytest_report_header(config: pytest.Config) -> str:
    info = environment(config)
    return f"races: {info['cpu']}, {info['threads']} threads, {info['device']}, torch {info['torch']}"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info.clear()
    machine_info.update(environment(config))
    if config.getoption("--race-device") == "cpu":
        machine_info["ceilings"] = roofline.ceilings()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict) -> None:
    # Every lap of every contender would make the file a hundred times as long; the statistics are enough.
    for entry in output_json["benchmarks"]:
        entry["stats"].pop("data", None)


def environment(config: pytest.Config) -> dict[str, object]:
    """Describe what the times depend on."""
    from unlearn_ext import ops

    device = config.getoption("--race-device")
    info: dict[str, object] = {
        "command": config.getoption("--race-command"),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "build": {k: v for k, v in ops.build_info().items() if k != "schemas"},
    }
    if device == "cuda":
        info["cuda"] = torch.version.cuda
        info["driver"], info["clock"] = _driver_and_clock()
    return info


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver_and_clock() -> tuple[str, str]:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader", "--id=0"]
    try:
        driver, clock = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        )
    except (OSError, subprocess.CalledProcessError, ValueError):
        return "unknown", "unknown"
    return driver, clock


class Races:
    """Keeps the last race, so that its contenders, which follow each other, share one measurement."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = torch.device(config.getoption("--race-device"))
        self._seconds = config.getoption("--race-seconds")
        self._laps = tuple(config.getoption("--race-laps"))
        self._group = ""
        self._result: tuple[Race, Times] | Exception | None = None

    def run(self, group: str, build: Callable[[], Race]) -> tuple[Race, Times]:
        """Race a group, unless it was the last one."""
        if group != self._group:
            self._group = group
            self._result = None  # before the next race needs the memory
            torch.manual_seed(0)
            try:
                race = build()
                self._result = race, run_race(race, self.device, self._seconds, self._laps)
            except Exception as error:  # then every contender fails, without another attempt
                self._result = error
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result


@pytest.fixture(scope="session")
def races(request: pytest.FixtureRequest) -> Races:
    return Races(request.config)


@pytest.fixture
def compete(races: Races, benchmark) -> Callable[[str, str, Callable[[], Race]], None]:
    """Report one contender of a group; the first one asked for makes the whole group run."""

    def compete(group: str, name: str, build: Callable[[], Race]) -> None:
        race, times = races.run(group, build)
        assert name in race.contenders, f"{group} has no contender {name!r}, but {list(race.contenders)}"
        if name in times.failures:
            pytest.fail(f"{name} does not do what the reference does: {times.failures[name]}", pytrace=False)
        benchmark.group = group
        benchmark.extra_info.update(
            contender=name, bytes_moved=race.floor_bytes if name == FLOOR else race.bytes_moved
        )
        laps = times.laps[name]
        replay.load(laps)
        benchmark.pedantic(lambda: None, rounds=len(laps))

    return compete
