import json
import re
import subprocess
import sys
import warnings

import pytest
import torch

import unlearn_ext
from unlearn_ext import METHODS, cli, demo, ops
from unlearn_ext._internal.checkpoints import load_weights


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
    for method in METHODS:
        assert method in lines["methods"]


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


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["forget"],
        ["demo", "--seed", "x"],
        ["info", "--out", "x"],
        ["compare"],
        [
            "compare",
            "--model",
            "a:b",
            "--checkpoint",
            "x",
            "--data",
            "a:c",
            "--train",
            "a:t",
            "--reference",
            "y",
        ],
    ],
)
def test_wrong_usage_exits_with_2_and_a_hint(arguments, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert "usage: python -m unlearn_ext" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["info", "--help"], ["demo", "--help"], ["compare", "--help"]]
)
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
    def failing(out, *, methods, seed):
        raise error

    monkeypatch.setattr(demo, "run", failing)
    assert cli.main(["demo"]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith(message)
    assert len(printed.err.splitlines()) == 1


def test_an_unexpected_error_has_its_kind_told_and_its_place_on_request(monkeypatch, capsys):
    def failing(out, *, methods, seed):
        raise KeyError("weight")

    monkeypatch.setattr(demo, "run", failing)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == "demo: KeyError: 'weight'\n"
    assert cli.main(["demo", "--traceback"]) == 1
    assert "in failing" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--methods", "--method"])
def test_demo_passes_its_options(monkeypatch, tmp_path, option):
    seen = {}
    monkeypatch.setattr(demo, "run", lambda out, **settings: seen.update(out=out, **settings))
    assert cli.main(["demo", "--out", str(tmp_path / "x"), "--seed", "3", option, "ssd", "pgu"]) == 0
    assert seen == {"out": tmp_path / "x", "seed": 3, "methods": ["ssd", "pgu"]}


MINE = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from unlearn_ext.data import split
from unlearn_ext.tasks import Regression

torch.set_num_threads(1)
value = 3


def make_model():
    return nn.Linear(3, 3)


def make_data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    inputs = torch.eye(3)[labels] + 0.1 * torch.randn(60, 3, generator=generator)
    forget, retain = split(TensorDataset(inputs, labels), classes=2)
    return DataLoader(forget, 10), DataLoader(retain, 10), DataLoader(TensorDataset(inputs, labels), 30)


def make_named_data():
    return dict(zip(("forget", "retain", "test"), make_data()))


def make_wrong_data():
    return 1


def train(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for inputs, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def make_regression():
    generator = torch.Generator().manual_seed(0)
    sets = []
    for n in (4, 12, 8):
        x = torch.randn(n, 3, generator=generator)
        sets.append([(x, x)])
    return sets


class Own(Regression):
    pass


own_task = Own(tolerance=1.0)


def never(model, data):
    raise AssertionError("trained")


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def broken():
    raise IndexError("list index\\nout of range")
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a user's module and checkpoint, gone into."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 3)
    torch.save(model.state_dict(), "model.pt")
    yield tmp_path
    sys.modules.pop("mine", None)


def arguments(**changes):
    given = {"model": "mine:make_model", "checkpoint": "model.pt", "data": "mine:make_data", "out": "result"}
    flat = [
        part
        for name, value in {**given, **changes}.items()
        for part in (f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value]))
    ]
    return ["compare", *flat]


def test_compare_writes_its_results(mine, capsys):
    given = arguments(train="mine:train", methods=["ssd", "ssd:alpha=2,lambda_=0.5"], seeds=["0", "1"])
    assert cli.main(given) == 0
    printed = capsys.readouterr()
    assert "| ssd(alpha=2, lambda_=0.5) " in printed.out
    assert "retrained, seed 1" in printed.err
    assert {path.name for path in (mine / "result").iterdir()} == {
        "comparison.md",
        "comparison.json",
        "comparison.html",
        "cache",
    }
    parsed = json.loads((mine / "result" / "comparison.json").read_text(encoding="utf-8"))
    assert parsed["facts"]["forget_classes"] == [2]
    assert (mine / "result" / "comparison.md").read_text(encoding="utf-8") in printed.out
    assert cli.main(given) == 0
    assert capsys.readouterr().err.count("from the cache") >= 8


def test_compare_with_a_reference_and_other_forms(mine, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    weights = torch.load("model.pt", weights_only=True)
    safetensors.save_file(weights, "model.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, "wrapped.pt")
    given = arguments(data="mine:make_named_data", checkpoint="model.safetensors", reference="wrapped.pt")
    assert cli.main(given) == 0
    parsed = json.loads((mine / "result" / "comparison.json").read_text(encoding="utf-8"))
    (original,) = [entry for entry in parsed["table"] if entry["label"] == "original"]
    assert original["measures"]["js"]["value"] == pytest.approx(0, abs=1e-12)
    capsys.readouterr()


def wrapped(weights, form):
    prefixed = {f"_orig_mod.module.{name}": value for name, value in weights.items()}
    return {
        "model": {"model": weights, "optimizer": {"lr": 0.1}},
        "model_state_dict": {"epoch": 3, "model_state_dict": weights},
        "state_dict": {"state_dict": prefixed},
        "nested": {"model": {"state_dict": weights}},
        "prefixed": prefixed,
        "fsdp": {f"_fsdp_wrapped_module.{name}": value for name, value in weights.items()},
    }[form]


@pytest.mark.parametrize("form", ["model", "model_state_dict", "state_dict", "nested", "prefixed", "fsdp"])
def test_checkpoints_as_training_scripts_leave_them(tmp_path, form):
    weights = {"weight": torch.rand(3, 3), "bias": torch.rand(3)}
    torch.save(wrapped(weights, form), tmp_path / "model.pt")
    model = torch.nn.Linear(3, 3)
    load_weights(model, tmp_path / "model.pt")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in weights.items())


def test_a_model_with_a_part_called_module_is_loaded_by_its_own_names(tmp_path):
    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.bias = torch.nn.Linear(1, 1), torch.nn.Parameter(torch.zeros(1))

    model = Outer()
    torch.save(model.state_dict(), tmp_path / "model.pt")  # module.bias and bias have one plain name
    other = Outer()
    load_weights(other, tmp_path / "model.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
def test_a_damaged_checkpoint_is_refused_by_name_and_the_model_stays(tmp_path, form):
    """Cut at any byte, and with one bit flipped; what has no checksum may hold other weights then."""
    model = torch.nn.Linear(3, 3)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / ("kept.safetensors" if form == "safetensors" else "kept.pt")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    cuts = [data[:at] for at in range(0, len(data), 29)]
    flips = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(0, len(data), 11)]
    refused = 0
    for place, damaged in enumerate(cuts + flips):
        path.write_bytes(damaged)
        other = torch.nn.Linear(3, 3)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        told = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about the protocol of a pickle
                load_weights(other, path)
        except ValueError as error:
            told = str(error)
        if told:
            refused += 1
            assert str(path) in told
            assert "must" in told
        else:
            assert place >= len(cuts)
        expected = before if told else weights
        if told or form == "zip":
            assert all(torch.equal(other.state_dict()[name], value) for name, value in expected.items())
    assert refused >= len(cuts) + len(flips) // 4


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("kept.pt", b"", "kept.pt must be a file of torch.save .* got EOFError"),
        ("kept.pt", b"<html>not found</html>", "kept.pt must be a file of torch.save"),
        ("kept.safetensors", b"PK\x03\x04" + bytes(60), "kept.safetensors must be a safetensors file"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, name, content, says):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as refused:
        load_weights(torch.nn.Linear(2, 2), tmp_path / name)
    assert refused.value.__cause__ is not None
    with pytest.raises(FileNotFoundError):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "nowhere.pt")


def test_pickled_objects_are_refused_with_what_to_do(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"whole.pt must be .* save model.state_dict\(\) again"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "whole.pt")


@pytest.mark.parametrize(
    "stored, message",
    [
        ([1], "must hold a state_dict, got list"),
        (
            {"epoch": 3, "net": {}},
            "under one of state_dict, .*, model, got the keys epoch, net",
        ),
        (
            {"model": {"weight": torch.ones(1)}, "state_dict": {}},
            "got several: state_dict, model",
        ),
        ({"weight": torch.ones(3, 3), "scale": torch.ones(1)}, "it misses bias; has besides scale"),
        (
            {"weight": torch.ones(2, 3), "bias": torch.ones(3)},
            r"has weight of shape \[2, 3\] instead of \[3, 3\]",
        ),
        ({"weight": "a", "bias": torch.ones(3)}, "has str for weight"),
        (
            {"bias": torch.ones(3), "weight": torch.ones(3, 3, dtype=torch.int8)},
            "has weight as whole numbers, strided for floating-point numbers, strided",
        ),
        ({"bias": torch.ones(3), "weight": torch.ones(3, 3, device="meta")}, "has weight as meta for"),
        ({"bias": torch.ones(3), "weight": torch.ones(3, 3).to_sparse()}, "numbers, sparse_coo for"),
        ({"bias": torch.ones(3), "weight": torch.ones(3, 3) * 1j}, "has weight as complex numbers"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_and_the_model_stays(tmp_path, stored, message):
    torch.save(stored, tmp_path / "model.pt")
    model = torch.nn.Linear(3, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "model.pt")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_losses_are_named(mine, monkeypatch):
    seen = []

    def method(model, forget, retain, *, loss_fn=None):
        seen.append(loss_fn)

    monkeypatch.setitem(METHODS, "ssd", method)
    text = ["ssd:loss_fn=log_odds", "ssd:loss_fn='mine:loss'", "ssd"]
    assert cli.main(arguments(methods=text)) == 0
    import mine as users

    assert seen == [unlearn_ext.losses.log_odds, users.loss, None]


@pytest.fixture
def one_method(monkeypatch):
    """Every method's name stands for one that moves a bias and takes any task."""

    def moved(model, forget, retain, *, task=None, score=None):
        with torch.no_grad():
            model.bias.add_(0.1)

    for name in METHODS:
        monkeypatch.setitem(METHODS, name, moved)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("Regression:tolerance=0.5", "Regression(tolerance=0.5)"),
        ("mine:own_task", "Own(tolerance=1.0)"),
        ("mine:Own", "Own()"),
    ],
)
def test_the_task_is_named(mine, one_method, text, shown):
    assert cli.main(arguments(data="mine:make_regression", task=text)) == 0
    parsed = json.loads((mine / "result" / "comparison.json").read_text(encoding="utf-8"))
    assert parsed["facts"]["task"] == shown
    (original,) = [entry for entry in parsed["table"] if entry["label"] == "original"]
    retain = original["measures"]["retain"]
    if shown == "Own()":
        assert "without a tolerance" in retain["why"]
    else:
        import mine as users

        model = torch.nn.Linear(3, 3)
        model.load_state_dict(torch.load("model.pt", weights_only=True))
        x = users.make_regression()[1][0][0]
        error = (model(x) - x).abs().amax(1)
        assert retain["value"] == pytest.approx(float((error <= float(shown[-4:-1])).float().mean()))


@pytest.mark.parametrize(
    "text, message",
    [
        ("Segmentaton", "did you mean Segmentation"),
        ("Regression:tolerence=1", "--task: Regression: .*tolerence"),
        ("Regression:loss", "--task must be NAME or NAME:key=value"),
        ("mine:value", "mine:value must be a task, or return one, got int"),
        ("mine:make_model", "must be a task, or return one, got Linear"),
    ],
)
def test_a_wrong_task_is_a_line(mine, capsys, text, message):
    assert cli.main(arguments(task=text)) == 1
    printed = capsys.readouterr().err
    assert re.search(message, printed)
    assert len(printed.splitlines()) == 1


def test_data_that_need_a_task_are_refused_before_anything_runs(mine, capsys):
    given = arguments(data="mine:make_regression", train="mine:never")
    assert cli.main(given) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("compare: forget: ")
    assert "task=ux.tasks.Regression()" in printed
    assert printed.endswith(" (here: --task Regression)\n")


def test_settings_of_the_task_to_pass_are_shown_as_an_option_takes_them():
    text = "Classification: got 255; pass task=ux.tasks.Segmentation(ignore_index=255)"
    assert cli._task_hint(text) == " (here: --task Segmentation:ignore_index=255)"
    assert cli._task("Segmentation:ignore_index=255").ignore_index == 255
    assert cli._task_hint("alpha must be positive") == ""


def test_the_folder_is_made_before_anything_runs(mine, capsys, monkeypatch):
    monkeypatch.setattr(cli, "compare", lambda *_, **__: pytest.fail("ran"))
    (mine / "file").touch()
    assert cli.main(arguments(out="file/result")) == 1
    assert capsys.readouterr().err.startswith("compare: [Errno")


def test_the_table_is_shown_also_where_nothing_can_be_written(mine, capsys, monkeypatch):
    def full_disk(path, text):
        raise OSError("no space left on device")

    monkeypatch.setattr(cli, "write_text", full_disk)
    assert cli.main(arguments()) == 1
    printed = capsys.readouterr()
    assert "| original " in printed.out
    assert printed.err.endswith("compare: no space left on device\n")


def test_a_text_stands_for_the_code_in_the_cache(mine, capsys):
    assert cli.main(arguments(cache_key="1")) == 0
    (mine / "mine.py").write_text(MINE + "\n# edited\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(arguments(cache_key="1")) == 0
    assert "from the cache" in capsys.readouterr().err
    assert cli.main(arguments(cache_key="2", train="mine:train")) == 0
    assert "from the cache" not in capsys.readouterr().err


def test_compare_in_a_process_of_its_own(mine):
    done = subprocess.run(
        [sys.executable, "-m", "unlearn_ext", *arguments()], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "give reference=" in done.stdout


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "mine"}, "--model must be MODULE:NAME, got 'mine'"),
        ({"model": "mine:nothing"}, "--model: mine must have nothing, and has not"),
        ({"model": "mine:value"}, "--model: mine:value must be a function, got int"),
        ({"model": "mine:make_data"}, "--model must return a torch.nn.Module, got tuple"),
        ({"model": "nowhere:make"}, "No module named 'nowhere'"),
        ({"data": "mine:make_wrong_data"}, "--data must return (forget, retain, test)"),
        ({"data": "mine:broken"}, "IndexError: list index out of range"),
        ({"checkpoint": "missing.pt"}, "No such file or directory"),
        ({"methods": ["magic"]}, "methods must be among ssd"),
        ({"methods": ["ssd:alpha"]}, "--methods must be NAME or NAME:key=value,key=value, got 'ssd:alpha'"),
        ({"methods": ["ssd:alpha=open('x')"]}, "--methods must be NAME"),
        ({"methods": ["ssd:alpha=5,alpha=6"]}, "got 'ssd:alpha=5,alpha=6'; alpha is given twice"),
        ({"methods": ["ssd:strict=false"]}, "got 'ssd:strict=false'; write False instead of false"),
        ({"methods": ["ssd:until=none"]}, "write None instead of none"),
        (
            {"methods": ["ssd:alpa=3"], "train": "mine:never"},
            "ssd has no setting 'alpa'; did you mean",
        ),
        ({"methods": ["ssd:loss_fn=odds"]}, "loss_fn must be one of cross_entropy, log_odds"),
    ],
)
def test_mistakes_in_compare_are_a_line(mine, capsys, changes, message):
    assert cli.main(arguments(**changes)) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("compare: ")
    assert len(printed.splitlines()) == 1


def test_a_checkpoint_cannot_run_code(mine, capsys):
    class Trap:
        def __reduce__(self):
            return (open, ("trapped", "w"))

    torch.save({"weight": Trap()}, "model.pt")
    assert cli.main(arguments()) == 1
    assert not (mine / "trapped").exists()
    assert capsys.readouterr().err.startswith("compare: ")


def test_a_comparison_without_results_fails(mine, capsys):
    assert cli.main(arguments(methods=["ssd:alpha=-1"])) == 1
    assert "alpha must be" in capsys.readouterr().out


def test_tracebacks_of_failed_methods_are_shown_on_request(mine, capsys):
    assert cli.main([*arguments(methods=["ssd:alpha=-1"]), "--traceback"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "ValueError: " in printed


def test_settings_of_methods_are_python_values():
    assert cli._method("ssd") == ("ssd", {})
    assert cli._method("ssd:alpha=0.5,estimator=batch") == ("ssd", {"alpha": 0.5, "estimator": "batch"})
    assert cli._method("unsir:forget_classes=[1,2],x='a,b',y=-3") == (
        "unsir",
        {"forget_classes": [1, 2], "x": "a,b", "y": -3},
    )
    assert cli._method("ssd:strict=False,until=None") == ("ssd", {"strict": False, "until": None})
