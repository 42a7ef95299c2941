"""The command line: ``python -m unlearn_ext demo``, ``compare`` and ``info``."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import logging
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import unlearn_ext
from unlearn_ext import demo, ops, tasks
from unlearn_ext._internal.checkpoints import load_weights
from unlearn_ext._internal.files import write_text
from unlearn_ext._internal.logs import shown
from unlearn_ext.evaluation.compare import compare
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.methods import METHODS
from unlearn_ext.tasks.batches import Batches
from unlearn_ext.tasks.losses import LossFn

_COMPARE = """
Run unlearning methods on copies of a trained model and set them beside retraining. The user's code:

  --model MODULE:FACTORY   FACTORY() returns the model, untrained
  --data MODULE:FACTORY    FACTORY() returns (forget, retain, test): batches that can be read more than once
  --task NAME              what the model is for, where model and data do not tell
  --train MODULE:FUNCTION  FUNCTION(model, data) trains a fresh model in place, as the checkpoint was trained

Modules are looked for in the current folder first. Writes comparison.md, comparison.json and comparison.html.
A comparison that was interrupted continues where it was when it is called again with the same --out.
"""

# Words of other languages, and Python's.
_PYTHONS = {"true": "True", "false": "False", "none": "None", "null": "None"}

_EXAMPLE = """
example:
  python -m unlearn_ext compare --model mine:make_model --checkpoint model.pt --data mine:make_data \\
      --train mine:train --methods ssd "ssd:alpha=5,lambda_=0.1" gradient_masking --seeds 0 1 2 --out result
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What follows the program's name; that of this process by default.

    Returns:
        The exit code: 0, 1 after an error that has been reported (or if no method of a comparison ran), 130
        after an interrupt. Wrong usage exits with 2, by argparse.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            print(_info())
        elif options.command == "demo":
            demo.run(options.out, methods=options.methods, seed=options.seed)
        else:
            return _run_comparison(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # much of what runs here is the user's code, which may raise anything
        if options.traceback:
            traceback.print_exc()
        else:
            expected = isinstance(error, (ImportError, OSError, RuntimeError, ValueError))
            kind = "" if expected else f"{type(error).__name__}: "
            text = " ".join(str(error).split()) or type(error).__name__
            text = text.removeprefix(f"{options.command}: ")
            print(f"{options.command}: {kind}{text}{_task_hint(text)}", file=sys.stderr)
        return 1
    return 0


def _task_hint(text: str) -> str:
    # What Python code passes as an argument is an option here.
    named = re.search(r"task=ux\.tasks\.(\w+)\((.*?)\)", text)
    if named is None:
        return ""
    settings = f":{named[2].replace(' ', '')}" if named[2] else ""
    return f" (here: --task {named[1]}{settings})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m unlearn_ext", description=unlearn_ext.__doc__)
    parser.add_argument("--version", action="version", version=unlearn_ext.__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "info",
        parents=[common],
        help="show version, build, devices, operators and methods",
        description="Show version, torch, build, devices, methods and the operators with their schemas.",
    )
    shown = commands.add_parser(
        "demo",
        parents=[common],
        help="unlearn handwritten digits and compare with retraining",
        description=demo.__doc__,
    )
    _add_methods(shown, "those of the four families")
    _add_out(shown, "demo_output", "folder for the pages and the record")
    shown.add_argument(
        "--seed", type=int, default=0, help="seed of network, batches and methods (%(default)s)"
    )
    compared = commands.add_parser(
        "compare",
        parents=[common],
        help="compare methods on a model of yours",
        description=_COMPARE,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compared.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="makes the model")
    compared.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="FILE",
        help="its trained weights: a state_dict, or a mapping that holds one, of torch.save; or .safetensors",
    )
    compared.add_argument("--data", required=True, metavar="MODULE:FACTORY", help="makes the three sets")
    compared.add_argument(
        "--task",
        metavar="NAME",
        help="what the model is for, where model and data do not tell: one of "
        f"{', '.join(_task_names())}, with settings as in Segmentation:ignore_index=0, or your MODULE:NAME",
    )
    reference = compared.add_mutually_exclusive_group()
    reference.add_argument(
        "--train", metavar="MODULE:FUNCTION", help="retrains without the forget set, once per seed"
    )
    reference.add_argument(
        "--reference", type=Path, metavar="FILE", help="weights of a model retrained without the forget set"
    )
    _add_methods(compared, "ssd")
    compared.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="one run of each method per seed (0)"
    )
    compared.add_argument(
        "--cache-key",
        metavar="TEXT",
        help="stands for your own code where runs of earlier calls are looked up, instead of its content",
    )
    compared.add_argument(
        "--audit",
        type=int,
        default=0,
        metavar="N",
        help="also run every method N times, and hold every sample's log-odds against N retrained networks",
    )
    compared.add_argument("--device", default="cpu", help="where to run (%(default)s)")
    _add_out(compared, "comparison", "folder for the results")
    return parser


def _add_methods(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--methods",
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"methods to run ({default}); all: {', '.join(METHODS)}"
        + ("" if default != "ssd" else "; settings as NAME:key=value,key=value"),
    )


def _add_out(parser: argparse.ArgumentParser, default: str, what: str) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path(default), metavar="DIR", help=f"{what} (%(default)s)"
    )


def _run_comparison(options: argparse.Namespace) -> int:
    methods = [_method(text) for text in options.methods or ["ssd"]]
    options.out.mkdir(parents=True, exist_ok=True)
    factory = _named(options.model, "model")
    model = _loaded(factory, options.checkpoint).to(options.device)
    sets = _sets(_named(options.data, "data")())
    task = None if options.task is None else _task(options.task)
    reference = None
    if options.reference is not None:
        reference = _loaded(factory, options.reference).to(options.device)
    train = None if options.train is None else _named(options.train, "train")
    # With tracebacks: those of methods that failed, which cost no more than their own row, are logged.
    with shown(logging.DEBUG if options.traceback else logging.INFO):
        comparison = compare(
            model,
            *sets,
            methods=methods,
            reference=reference,
            seeds=options.seeds,
            make_model=None if train is None else factory,
            train=train,
            cache=options.out / "cache",
            cache_key=options.cache_key,
            audit=options.audit,
            task=task,
            progress=True,
        )
    # Shown first: what cannot be written is not lost.
    print(comparison.to_markdown())
    write_text(options.out / "comparison.md", comparison.to_markdown())
    comparison.to_json(options.out / "comparison.json")
    comparison.to_html(options.out / "comparison.html")
    print(f"written: {options.out}/comparison.md, comparison.json, comparison.html")
    return _exit_code(comparison)


def _exit_code(comparison: Comparison) -> int:
    ran = [row.why is None for row in comparison.rows if row.kind == "method"]
    return 0 if any(ran) else 1


def _method(text: str) -> tuple[str, Mapping[str, Any]]:
    name, _, rest = text.partition(":")
    settings = _settings(rest, f"--methods must be NAME or NAME:key=value,key=value, got {text!r}")
    if isinstance(settings.get("loss_fn"), str):
        settings["loss_fn"] = _loss(settings["loss_fn"])
    return name, settings


def _settings(rest: str, complaint: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    # Parsed as the arguments of a call, so that values may hold commas and quotes.
    try:
        call = ast.parse(f"f({rest})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        for keyword in call.keywords:
            if keyword.arg is None:
                raise ValueError
            if keyword.arg in settings:  # one of the two would be dropped unseen
                complaint += f"; {keyword.arg} is given twice"
                raise ValueError
            value = keyword.value
            # Else words, and words are true: strict=false would be strict.
            if isinstance(value, ast.Name) and value.id in _PYTHONS:
                complaint += f"; write {_PYTHONS[value.id]} instead of {value.id}"
                raise ValueError
            settings[keyword.arg] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
        raise ValueError(complaint) from error
    return settings


def _task_names() -> list[str]:
    return [name for name in tasks.__all__ if name != "Task" and isinstance(getattr(tasks, name), type)]


def _task(text: str) -> tasks.Task:
    name, _, rest = text.partition(":")
    if name in _task_names():
        settings = _settings(rest, f"--task must be NAME or NAME:key=value,key=value, got {text!r}")
        try:
            made: object = getattr(tasks, name)(**settings)
        except TypeError as error:
            raise ValueError(f"--task: {name}: {error}") from error
    elif not rest:
        nearest = difflib.get_close_matches(name, _task_names(), n=2, cutoff=0.4)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
        raise ValueError(
            f"--task must be one of {', '.join(_task_names())}, or MODULE:NAME, got {text!r}{hint}"
        )
    else:
        found = _named(text, "task", callable_only=False)
        made = found if isinstance(found, tasks.Task) or not callable(found) else found()
    if not isinstance(made, tasks.Task):
        raise ValueError(f"--task: {text} must be a task, or return one, got {type(made).__name__}")
    return made


def _loss(name: str) -> LossFn:
    if ":" in name:
        found: LossFn = _named(name, "methods loss_fn")
        return found
    known = unlearn_ext.losses.__all__
    if name not in known:
        raise ValueError(
            f"--methods: loss_fn must be one of {', '.join(known)} or 'MODULE:FUNCTION' in quotes, "
            f"got {name!r}"
        )
    found = getattr(unlearn_ext.losses, name)
    return found


def _named(text: str, option: str, *, callable_only: bool = True) -> Any:  # noqa: ANN401 - the user's
    module_name, _, name = text.partition(":")
    if not module_name or not name:
        raise ValueError(f"--{option} must be MODULE:NAME, got {text!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = importlib.import_module(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--{option}: {module_name} must have {name}, and has not")
        found = getattr(found, part)
    if callable_only and not callable(found):
        raise ValueError(f"--{option}: {text} must be a function, got {type(found).__name__}")
    return found


def _loaded(factory: Any, path: Path) -> nn.Module:  # noqa: ANN401 - the user's function
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model must return a torch.nn.Module, got {type(model).__name__}")
    load_weights(model, path)
    return model


def _sets(returned: Any) -> tuple[Batches, Batches, Batches]:  # noqa: ANN401 - the user's data
    if isinstance(returned, Mapping) and {"forget", "retain", "test"} <= set(returned):
        return returned["forget"], returned["retain"], returned["test"]
    if isinstance(returned, (tuple, list)) and len(returned) == 3:
        return returned[0], returned[1], returned[2]
    raise ValueError(
        "--data must return (forget, retain, test), or a mapping with these names, got "
        f"{type(returned).__name__}"
    )


def _info() -> str:
    build = ops.build_info()
    compiled = build["kernels"] == "compiled"
    missing = {
        "kernels": f"plain PyTorch: {build['reason']}",
        "compiled ones": f"{build['mend']} brings them",
    }
    lines = {
        "unlearn_ext": unlearn_ext.__version__,
        **({"kernels": "compiled"} if compiled else missing),
        "torch": f"{torch.__version__}" + (f" (built against {build['torch']})" if compiled else ""),
        "python": f"{sys.version.split()[0]}" + (f" (built for {build['python']})" if compiled else ""),
        "compiler": build["compiler"],
        "CUDA build": f"{'yes' if build['cuda'] else 'no'}: {build['cuda_reason']}",
        "CUDA architectures": _listed(build["cuda_architectures"]) or "none",
        "CUDA devices": _listed(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or "none",
        "CPU capability": f"{build['cpu_capability']} (of {_listed(build['cpu_capabilities'])})",
        "CPU threads": str(torch.get_num_threads()),
        "methods": _listed(METHODS),
    }
    width = max(map(len, lines))
    report = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    return "\n".join([*report, f"{len(build['schemas'])} operators", *(f"  {s}" for s in build["schemas"])])


def _listed(names: str | Iterable[str]) -> str:
    return names if isinstance(names, str) else ", ".join(names)
