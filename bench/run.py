"""Runs the benchmarks and writes ``bench/results/<device>.json``, ``bench/RESULTS.md`` and its plot.

``python -m bench`` takes under eleven minutes on two CPU cores. A selection (``-k``) is printed and not
written.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        pytest's exit code: not 0 if a contender computes something else than the reference.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-k", metavar="EXPRESSION", help="run only what matches, such as 'topk_mask and float32'"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time per contender (default: 1)")
    parser.add_argument(
        "--slow", action="store_true", help="also the 1 B transformer: 16 GB of memory, minutes"
    )
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as scratch:
        partial = options.k is not None
        output = (
            Path(scratch) / "selection.json"
            if partial
            else table.FOLDER / "results" / f"{options.device}.json"
        )
        output.parent.mkdir(exist_ok=True)
        code = int(pytest.main(_pytest_arguments(options, output)))
        if not output.exists():
            return code
        print(
            table.render(table.load([output])) if partial else f"wrote {output} and {table.write_results()}"
        )
        return code


def _pytest_arguments(options: argparse.Namespace, output: Path) -> list[str]:
    arguments = [
        *(str(table.FOLDER / name) for name in ("bench_ops.py", "bench_fisher_ops.py", "bench_fisher.py")),
        # The repository's options are for tests: they collect doctests too.
        *("-o", "addopts="),
        *("-p", "no:cacheprovider"),
        *("-m", "" if options.slow else "not slow"),
        *("--quiet", "--disable-warnings"),
        "--benchmark-quiet",
        f"--benchmark-json={output}",
        f"--race-device={options.device}",
        f"--race-seconds={options.seconds}",
        f"--race-command={shlex.join(['python', '-m', 'bench', *sys.argv[1:]])}",
    ]
    if options.threads is not None:
        arguments.append(f"--race-threads={options.threads}")
    if options.k is not None:
        arguments += ["-k", options.k]
    return arguments
