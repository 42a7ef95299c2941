"""The command line: ``python -m unlearn_ext info`` and ``python -m unlearn_ext demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import unlearn_ext
from unlearn_ext import demo, ops


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; that of this process by default.

    Returns:
        The exit code: 0, 1 after an error that has been reported, 130 after an interrupt. Wrong usage exits
        with 2, by argparse.
    """
    parser = argparse.ArgumentParser(prog="python -m unlearn_ext", description=unlearn_ext.__doc__)
    parser.add_argument("--version", action="version", version=unlearn_ext.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        help="show version, build, devices and operators",
        description="Show version, torch, build, devices and the operators with their schemas.",
    )
    demo_parser = commands.add_parser(
        "demo", help="unlearn handwritten digits and compare with retraining", description=demo.__doc__
    )
    demo_parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_output"),
        metavar="DIR",
        help="folder for the picture (%(default)s)",
    )
    demo_parser.add_argument("--seed", type=int, default=0, help="seed of network and batches (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            print(_info())
        else:
            demo.run(options.out, seed=options.seed)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> str:
    build = ops.build_info()
    lines = {
        "unlearn_ext": unlearn_ext.__version__,
        "torch": f"{torch.__version__} (built against {build['torch']})",
        "python": f"{sys.version.split()[0]} (built for {build['python']})",
        "compiler": build["compiler"],
        "CUDA build": f"{'yes' if build['cuda'] else 'no'}: {build['cuda_reason']}",
        "CUDA architectures": _listed(build["cuda_architectures"]) or "none",
        "CUDA devices": _listed(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or "none",
        "CPU capability": f"{build['cpu_capability']} (of {_listed(build['cpu_capabilities'])})",
        "CPU threads": str(torch.get_num_threads()),
    }
    width = max(map(len, lines))
    report = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    return "\n".join([*report, f"{len(build['schemas'])} operators", *(f"  {s}" for s in build["schemas"])])


def _listed(names: str | Iterable[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
