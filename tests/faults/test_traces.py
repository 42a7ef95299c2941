"""What a run leaves behind: the files it wrote, nothing of a sample in clear, and an end to all of it."""

import os
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import unlearn_ext as ux

# A sample that is recognised wherever its bytes stand.
SECRET = torch.tensor([1.2345678, -9.8765432, 0.1357924, 2.4680135])


def sets():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 4, generator=draws), torch.arange(24) % 3
    x[0] = SECRET
    parts = list(zip(x.split(6), y.split(6), strict=True))
    return parts[:1], parts[1:3], parts[3:]


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def run_everything(folder):
    forget, retain, test = sets()
    model = network()
    before = ux.report.weights_digest(model)
    ux.fisher_diagonal(model, forget).save(folder / "importances")
    ux.fisher_diagonal(model, forget, checkpoint=folder / "pass", checkpoint_every=1)
    ux.kfac_factors(model, forget + retain).save(folder / "factors")
    ux.activation_gram(model, forget + retain).save(folder / "grams")
    found = ux.compare(
        model,
        forget,
        retain,
        test,
        methods=["finetune"],
        metrics=("retain",),
        cache=folder / "cache",
        cache_key="1",
    )
    found.to_html(folder / "page.html")
    found.to_json(folder / "page.json")
    result = ux.methods.finetune(model, forget, retain, epochs=1)
    record = ux.report.evidence(result, model=model, before=before, forget_ids=["anna"], salt=b"s" * 16)
    record.to_json(folder / "record.json")


def all_files(folder):
    return {Path(place) / name for place, _, names in os.walk(folder) for name in names}


@pytest.mark.filterwarnings("ignore")
def test_every_file_is_listed_and_holds_no_sample(tmp_path):
    with ux.report.files_written() as written:
        run_everything(tmp_path)
    assert {path for path in written if path.exists()} == {
        path for path in all_files(tmp_path) if ".old" not in path.name
    }
    assert len(written) >= 8
    for path in all_files(tmp_path):
        data = path.read_bytes()
        for value in SECRET.tolist():
            single, double = struct.pack("<f", value), struct.pack("<d", value)
            assert single not in data, path
            assert double not in data, path
            assert f"{value:.5f}".encode() not in data, path
        assert b"anna" not in data, path


def test_everything_can_be_purged(tmp_path):
    forget, retain, _ = sets()
    model = network()
    importance = ux.fisher_diagonal(model, forget)
    factors, gram = ux.kfac_factors(model, forget), ux.activation_gram(model, forget)
    plan = ux.plan_ssd(model, forget, retain)
    importance.save(tmp_path / "kept")
    (tmp_path / "kept.old").write_text("an earlier version")
    ux.report.purge(importance, [factors, {"gram": gram}], plan, tmp_path / "kept")
    assert not os.listdir(tmp_path)
    tensors = [
        *importance.values(),
        *gram.values(),
        *(part for pair in factors.values() for part in pair[:2]),
    ]
    assert all(not tensor.any() for tensor in tensors)
    with pytest.raises(RuntimeError, match="purged"):
        plan.apply()


def test_what_cannot_be_purged_is_refused_before_anything_is(tmp_path):
    tensor = torch.ones(2)
    with pytest.raises(TypeError, match=r"purge: derived\[1\] must be a tensor, a Path"):
        ux.report.purge(tensor, str(tmp_path))
    assert tensor.sum() == 2


def test_an_edited_record_is_recognised(tmp_path):
    model = network()
    forget, retain, _ = sets()
    before = ux.report.weights_digest(model)
    result = ux.methods.finetune(model, forget, retain, epochs=1, lr=1e-3)
    record = ux.report.evidence(result, model=model, before=before)
    key = b"a secret of this size"
    text = record.to_json(tmp_path / "record.json", key=key)
    assert ux.report.read_record(tmp_path / "record.json", key)["method"] == "finetune"
    assert ux.report.read_record(text)["weights_before"] == before
    for old, new in ((before, "0" * 64), ('"finetune"', '"retrain"'), ('"notice"', '"Notice"')):
        assert old in text
        with pytest.raises(ValueError, match="another digest"):
            ux.report.read_record(text.replace(old, new))
    with pytest.raises(ValueError, match="another signature"):
        ux.report.read_record(text, b"another secret of it")
    with pytest.raises(ValueError, match="no signature"):
        ux.report.read_record(record.to_json(), key)
    with pytest.raises(ValueError, match="at least 16 bytes"):
        record.to_json(tmp_path / "new.json", key=b"short")
    assert not (tmp_path / "new.json").exists()
    for damaged in ("{", "[]", '{"a": 1}', text[:-5], "{" * 100_000, text.replace("{", '{"method": "x",', 1)):
        with pytest.raises((ValueError, FileNotFoundError)):
            ux.report.read_record(damaged)
