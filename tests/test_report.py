import copy
import functools
import hashlib
import hmac
import json
import math
import os
import re
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import unlearn_ext
from unlearn_ext import UnlearnResult, report, ssd
from unlearn_ext._internal.files import replacing
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext._internal.names import plain_name
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.tasks import losses


def result(**changes):
    fields = {
        "method": "ssd",
        "hyperparameters": {"alpha": 2.0},
        "seconds": {"importance": 1.25, "dampening": 0.25},
        "changed": 0.125,
        "changed_per_parameter": {"weight": 0.25, "bias": 0.0},
        "history": ({"phase": "dampening", "selected": 3},),
    }
    return UnlearnResult(**{**fields, **changes})


def test_the_record_is_frozen_and_prints_as_a_line():
    record = result()
    assert str(record) == "ssd: 12.5% of the parameters changed in 1.50 s"
    with pytest.raises(AttributeError):
        record.changed = 0.0


def test_json_holds_every_field():
    parsed = json.loads(result().to_json())
    assert parsed.pop("notice") == report.NOTICE
    assert parsed == {
        "method": "ssd",
        "hyperparameters": {"alpha": 2.0},
        "seconds": {"importance": 1.25, "dampening": 0.25},
        "changed": 0.125,
        "changed_per_parameter": {"weight": 0.25, "bias": 0.0},
        "history": [{"phase": "dampening", "selected": 3}],
        "coverage": {},
        "reached": None,
        "before": {},
        "after": {},
        "passes": 0.0,
    }


def test_json_is_strict_whatever_the_hyperparameters():
    odd = {
        "nan": math.nan,
        "inf": -math.inf,
        "tensor": torch.tensor([1.0, math.inf]),
        "number": np.float32(0.5),
        "function": losses.cross_entropy,
        "partial": functools.partial(losses.cross_entropy, shift=False),
        "set": {3},
        "device": torch.device("cpu"),
        7: None,
    }
    parsed = json.loads(result(hyperparameters=odd).to_json(), parse_constant=pytest.fail)["hyperparameters"]
    assert parsed == {
        "nan": "nan",
        "inf": "-inf",
        "tensor": [1.0, "inf"],
        "number": 0.5,
        "function": "unlearn_ext.losses.cross_entropy",
        "partial": "unlearn_ext.losses.cross_entropy(shift=False)",
        "set": [3],
        "device": "cpu",
        "7": None,
    }


def test_callables_are_named_without_their_address():
    class Loss:
        def __call__(self):
            return None

    assert callable_name(Loss()).endswith("Loss")
    assert "0x" not in callable_name(functools.partial(Loss(), 1, shift=True))


def test_the_wording_promises_no_erasure():
    assert "do not prove" in report.NOTICE


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_digests_know_every_bit_and_nothing_else():
    model = small_model()
    digest = report.weights_digest(model)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert report.weights_digest(copy.deepcopy(model).train().requires_grad_(False)) == digest
    assert report.weights_digest(torch.compile(model)) == digest
    assert report.weights_digest(nn.DataParallel(model)) == digest
    for change in (
        lambda m: m[0].weight.data[0, 0].add_(1e-7),
        lambda m: m[1].running_mean.add_(1e-7),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.double(),
        lambda m: m.append(nn.Linear(1, 1)),
    ):
        other = copy.deepcopy(model)
        change(other)
        assert report.weights_digest(other) != digest


@pytest.mark.parametrize(
    "moved", [torch.Tensor.to_mkldnn, torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr]
)
def test_digests_of_other_layouts_are_those_of_the_values(moved):
    model = nn.Linear(4, 3, bias=False)
    told = [report.weights_digest(model), weights_fingerprint(model)]
    model.weight = nn.Parameter(moved(model.weight.detach()), requires_grad=False)
    assert [report.weights_digest(model), weights_fingerprint(model)] == told
    value = model.weight.to_dense()
    value[0, 0] += 1
    model.weight = nn.Parameter(moved(value), requires_grad=False)
    assert not {report.weights_digest(model), weights_fingerprint(model)} & set(told)


def test_digests_do_not_depend_on_the_memory_layout():
    conv = nn.Conv2d(3, 4, 3)
    digest = report.weights_digest(conv)
    assert report.weights_digest(copy.deepcopy(conv).to(memory_format=torch.channels_last)) == digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_digests_of_other_dtypes(dtype):
    model = small_model().to(dtype)
    assert report.weights_digest(model) == report.weights_digest(copy.deepcopy(model))


def test_ids_are_hashed_with_their_salt():
    salt, other = bytes(16), bytes([1]) * 16
    digest = report.forget_digest(["a", "b"], salt)
    assert digest == report.forget_digest(["b", "a"], salt)
    assert digest != report.forget_digest(["a", "b"], other)
    assert digest != report.forget_digest(["ab"], salt)
    assert report.forget_digest(torch.tensor([1, 2]), salt) == report.forget_digest([1, 2], salt)
    assert report.forget_digest([1], salt) != report.forget_digest(["1"], salt)
    # As anyone can work it out from the description.
    codes = sorted(hmac.new(salt, b"s" + name, "sha256").digest() for name in (b"a", b"b"))
    assert digest == hashlib.sha256(b"".join(codes)).hexdigest()


@pytest.mark.parametrize(
    "ids, salt, error, message",
    [
        ([1, 1], bytes(16), ValueError, "ids must be distinct, got 1 repeated"),
        ([1.5], bytes(16), TypeError, "ids must be strings, bytes or integers, got float"),
        ([True], bytes(16), TypeError, "got bool"),
        ([1], b"short", ValueError, "salt must have at least 16 bytes, got 5"),
    ],
)
def test_ids_that_cannot_be_hashed(ids, salt, error, message):
    with pytest.raises(error, match=message):
        report.forget_digest(ids, salt)


def recorded(**settings):
    model = small_model()
    before = report.weights_digest(model)
    forget = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.long))]
    retain = [(torch.randn(12, 3), torch.ones(12, dtype=torch.long))]
    done = ssd(model, forget, retain, alpha=0.5)
    given = {"forget_ids": ["anna", "bo"], "seeds": [3], "metrics": {"forget": 0.25}, **settings}
    return report.evidence(done, model=model, before=before, **given), model, before, done


def test_the_evidence_holds_what_is_needed_to_judge_it():
    record, model, before, done = recorded(reference="a retrained model")
    parsed = json.loads(record.to_json(), parse_constant=pytest.fail)
    assert parsed["method"] == "ssd"
    assert parsed["hyperparameters"]["alpha"] == 0.5
    assert parsed["weights_before"] == before
    assert parsed["weights_after"] == report.weights_digest(model) != before
    assert parsed["environment"]["torch"] == torch.__version__
    assert parsed["environment"]["unlearn_ext"] == unlearn_ext.__version__
    assert parsed["environment"]["device"] == "cpu"
    assert parsed["environment"]["dtype"] == "float32"
    assert parsed["seeds"] == [3]
    assert parsed["forget_count"] == 2
    assert parsed["forget_digest"] == report.forget_digest(["bo", "anna"], record.salt)
    assert parsed["metrics"] == {"forget": 0.25}
    assert parsed["reference"] == "a retrained model"
    assert set(parsed["changed_per_layer"]) == {"0", "1", "2"}
    assert parsed["changed_per_parameter"] == dict(done.changed_per_parameter)
    assert any("journal" in entry["what"] for entry in parsed["derived"])
    assert any("backups" in entry["what"] for entry in parsed["derived"])


def test_the_salt_and_the_ids_are_not_in_the_record():
    record, *_ = recorded()
    text = record.to_json()
    assert record.salt.hex() not in text
    assert "anna" not in text
    assert "salt" not in json.loads(text)
    other, *_ = recorded()
    assert other.forget_digest != record.forget_digest  # a fresh salt each time


def test_layers_are_weighed_by_their_size():
    model = small_model()
    record = result(changed_per_parameter={"0.weight": 0.5, "0.bias": 1.0, "2.weight": 0.0, "2.bias": 0.0})
    assert report.changed_per_layer(record, model) == {"0": (6 + 4) / 16, "1": 0.0, "2": 0.0}


def test_what_was_not_measured_is_listed():
    alone = recorded(metrics={})[0]
    assert alone.not_tested == tuple(report.EXAMINATIONS)
    failed = {"mia_auc": {"value": None, "why": "scikit-learn is missing"}, "js": 0.1}
    record = recorded(metrics=failed)[0]
    assert "membership inference by the loss" in record.not_tested
    assert not any("distance of the predictions" in what for what in record.not_tested)
    assert any("shadow models" in what for what in record.not_tested)
    for nothing in (math.nan, torch.tensor(math.nan), np.float32(math.nan)):
        assert "membership inference by the loss" in recorded(metrics={"mia_auc": nothing})[0].not_tested
    assert "membership inference by the loss" not in recorded(metrics={"mia_auc": 0.5})[0].not_tested
    assert recorded(not_tested=["all of it"])[0].not_tested == ("all of it",)


def test_a_reference_model_is_recorded_by_its_digest():
    reference = small_model()
    assert report.weights_digest(reference) in recorded(reference=reference)[0].reference
    assert "none" in recorded()[0].reference


def test_purge_destroys_what_derives_from_the_forget_data(tmp_path):
    class Plan:
        purged = False

        def purge(self):
            self.purged = True

    mask, scores, plan = torch.ones(3), {"a": [torch.ones(2)]}, Plan()
    path = tmp_path / "importances.safetensors"
    path.write_text("x")
    record, *_ = recorded(derived={"mask": mask, "scores": scores, "plan": plan, "file": path})
    told = {entry["what"]: entry["purged_here"] for entry in json.loads(record.to_json())["derived"]}
    assert not any(told.values())
    record.purge()
    record.purge()
    assert float(mask.sum() + scores["a"][0].sum()) == 0
    assert plan.purged
    assert not path.exists()
    told = {entry["what"]: entry["purged_here"] for entry in json.loads(record.to_json())["derived"]}
    assert {what for what, purged in told.items() if purged} == {"mask", "scores", "plan", "file"}


def test_purge_follows_links_as_writing_does(tmp_path):
    real, link = tmp_path / "store" / "importances.json", tmp_path / "link.json"
    real.parent.mkdir()
    link.symlink_to(real)
    report.write_text(link, "x")
    real.with_name("importances.json.old").write_text("x")
    assert real.exists()
    report.purge(link)
    assert not list(real.parent.iterdir())
    assert not link.is_symlink()
    report.purge(link)  # a second time does nothing


def test_purge_overwrites_tensors_of_any_layout_and_mode():
    with torch.inference_mode():
        frozen = torch.ones(3)
    coo, csr = torch.eye(3).to_sparse_coo(), torch.eye(3).to_sparse_csr()
    values = [coo._values(), csr.values()]
    leaf = nn.Parameter(torch.ones(2))
    report.purge(torch.ones(2), frozen, coo, csr, leaf)
    assert all(float(part.abs().sum()) == 0 for part in (frozen, *values, leaf))
    (leaf * 2).sum().backward()  # still a parameter to train


def test_a_purge_that_stops_half_way_says_how_far_it_came():
    class Stuck:
        def purge(self):
            raise OSError("read-only")

    mask = torch.ones(2)
    record, *_ = recorded(derived={"mask": mask, "stuck": Stuck(), "later": torch.ones(1)})
    with pytest.raises(OSError, match="read-only"):
        record.purge()
    assert record.derived["mask"]
    assert not record.derived["stuck"]
    assert not record.derived["later"]


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"before": "abc"}, ValueError, "before must be a digest of weights_digest"),
        ({"derived": {"it": 3}}, TypeError, r"derived\['it'\] must be a tensor, a Path"),
        ({"derived": {"it": [3]}}, TypeError, r"derived\['it'\]"),
        ({"forget_ids": "anna"}, TypeError, r"forget_ids must be a sequence, got 'anna'; pass \['anna'\]"),
        ({"forget_ids": b"anna"}, TypeError, "forget_ids must be a sequence"),
        ({"not_tested": "all of it"}, TypeError, "not_tested must be a sequence"),
        ({"seeds": "12"}, TypeError, "seeds must be a sequence"),
        ({"model": nn.Linear(3, 2)}, ValueError, "model must be the one of the run, got one without its"),
    ],
)
def test_wrong_evidence_is_refused(settings, error, message):
    done = result(changed_per_parameter={"0.weight": 0.25})
    with pytest.raises(error, match=message):
        report.evidence(done, **{"model": small_model(), "before": "0" * 64, **settings})


def test_a_digest_from_after_the_run_is_none_from_before():
    *_, model, _, done = recorded()
    after = report.weights_digest(model)
    with pytest.raises(ValueError, match=r"before must be from before the run, .* of them have changed"):
        report.evidence(done, model=model, before=after)
    unchanged = replace(done, changed=0.0)  # as of a run that did not reach its goal
    assert report.evidence(unchanged, model=model, before=after).weights_after == after


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "x.json"
    record, *_ = recorded()
    assert record.to_json(target) + "\n" == target.read_text(encoding="utf-8")

    def failing(draft, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk full"):
        report.write_text(target, "new")
    assert target.read_text(encoding="utf-8") == record.to_json() + "\n"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_keeps_its_permissions_and_a_link_stays_one(tmp_path):
    target, link = tmp_path / "x.txt", tmp_path / "link"
    report.write_text(target, "old")
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    target.chmod(0o640)
    link.symlink_to(target)
    report.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_writer_that_fails_leaves_the_old_file_and_no_draft(tmp_path):
    target = tmp_path / "x.pt"
    torch.save({"a": 1}, target)
    before = target.read_bytes()

    def write_half(path):
        with replacing(path) as draft:
            draft.write_bytes(before[:10])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half(target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    "name, plain",
    [
        ("weight", "weight"),
        ("_orig_mod.0.weight", "0.weight"),
        ("module._orig_mod.block._fsdp_wrapped_module.0.bias", "block.0.bias"),
        ("my_module.weight", "my_module.weight"),
        ("block.module", "block.module"),  # a parameter that is called so
    ],
)
def test_names_without_what_wrappers_put_in(name, plain):
    assert plain_name(name) == plain


def test_names_of_wrapped_models_are_those_of_the_model():
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        found = [name for name, _ in wrapped.named_parameters()]
        assert found != names
        assert [plain_name(name) for name in found] == names
