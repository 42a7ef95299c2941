import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import demo, fisher_diagonal

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def trained(one_thread):
    """The demo's own network and settings; only the retrained one is trained for less long."""
    train_set, test_set = demo.load_digits()
    model, seconds = demo.train(train_set, epochs=demo.EPOCHS, seed=0)
    full = fisher_diagonal(model, DataLoader(train_set, demo.BATCH_SIZE))
    return train_set, test_set, model, seconds, full


def accuracies(case):
    return {row.network: row.accuracies for row in case.rows}


def test_the_defaults_forget_a_class_and_keep_the_rest(trained):
    *given, full = trained
    before = [p.detach().clone() for p in given[2].parameters()]
    case = demo.forget_class(*given, full=full, epochs=2, seed=0)
    known = accuracies(case)
    assert known["original"]["test, class 3"] >= 0.95
    assert known["SSD"]["test, class 3"] <= 0.05
    assert known["SSD"]["forget"] <= 0.05
    assert known["SSD"]["retain"] >= known["original"]["retain"] - 0.03
    assert known["SSD"]["test, other classes"] >= known["original"]["test, other classes"] - 0.03
    assert known["retrained"]["test, class 3"] == 0
    assert 0 < case.rows[1].changed < 0.05
    assert all(torch.equal(a, b) for a, b in zip(before, given[2].parameters(), strict=True))


def test_random_samples_are_reported_as_they_come_out(trained):
    *given, full = trained
    case = demo.forget_samples(*given, full=full, epochs=2, seed=0)
    known = accuracies(case)
    assert set(known["SSD"]) == {"retain", "forget", "test"}
    assert known["SSD"]["retain"] >= known["original"]["retain"] - 0.03
    text = demo.table(case)
    assert text.splitlines()[0] == "Forget 50 random samples"
    assert "approximate unlearning often changes little" in text.replace("\n", " ")
    assert [line.split()[0] for line in text.splitlines()[4:7]] == ["original", "SSD", "retrained"]


def test_every_class_is_tried(trained):
    train_set, test_set, model, _, full = trained
    sentence = demo.each_class(train_set, test_set, model, full=full)
    assert sentence.startswith("Each of the ten classes in turn: test accuracy on the forgotten class ")


def test_a_seed_decides_the_network(one_thread):
    images, labels = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    small = TensorDataset(images, labels)
    state = torch.get_rng_state()
    first, again, other = (demo.train(small, epochs=1, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in demo.make_model(0).parameters()) == 110_922


def test_it_runs_from_start_to_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    everything = demo.load_digits()
    monkeypatch.setattr(demo, "load_digits", lambda: tuple(TensorDataset(*part[:200]) for part in everything))
    monkeypatch.setattr(demo, "each_class", lambda *_, **__: "Each class.")
    n_threads, said = torch.get_num_threads(), []
    cases = demo.run(tmp_path / "new", epochs=1, say=said.append)
    text = "\n".join(said)
    assert [case.title for case in cases] == ["Forget class 3", "Forget 50 random samples"]
    assert "do not prove" in text.replace("\n", " ")
    assert "digits.png" in text
    assert (tmp_path / "new" / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert torch.get_num_threads() == n_threads


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    cases = [demo.Case("Forget", tuple(demo.Row(n, {"retain": 1.0}, 0.0, 1.0) for n in demo._COLORS), "")]
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"the picture needs matplotlib: pip install 'unlearn_ext\[demo\]'"):
        demo.picture(cases, tmp_path / "x.png")
    monkeypatch.setattr(demo, "_cases", lambda *_: cases)
    said = []
    demo.run(tmp_path, say=said.append)
    assert said[0].startswith("No picture: the picture needs matplotlib")
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"the demo needs scikit-learn: pip install 'unlearn_ext\[demo\]'"):
        demo.load_digits()
