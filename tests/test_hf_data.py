"""Batches of two sets in the Trainer, and records beside saved models."""

import json

import pytest
import torch
from language_models import decoder_batch, make, tokens
from torch import nn

import unlearn_ext as ux

transformers = pytest.importorskip("transformers")

FORGET = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(3, 8)]
RETAIN = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(5, 8, seed=2)]


@pytest.mark.parametrize("anchor, count", [("forget", 3), ("retain", 5)])
def test_pairs(anchor, count):
    pairs = ux.hf.ForgetRetainDataset(FORGET, RETAIN, anchor)
    assert len(pairs) == count
    sets = {"forget": FORGET, "retain": RETAIN}
    torch.manual_seed(0)
    drawn = [pairs[i] for i in range(count)]
    other = "retain" if anchor == "forget" else "forget"
    assert all(pair[anchor] is sets[anchor][i] for i, pair in enumerate(drawn))
    assert all(any(pair[other] is sample for sample in sets[other]) for pair in drawn)
    torch.manual_seed(0)
    assert [id(pairs[i][other]) for i in range(count)] == [id(pair[other]) for pair in drawn]
    companions = {id(pairs[0][other]) for _ in range(50)}
    assert len(companions) == len(sets[other])


def test_collator():
    samples = [ux.hf.ForgetRetainDataset(FORGET, RETAIN)[i] for i in range(2)]
    batch = ux.hf.ForgetRetainCollator()(samples)
    assert list(batch) == ["forget", "retain"]
    assert torch.equal(batch["forget"]["input_ids"], torch.stack([s["input_ids"] for s in FORGET[:2]]))
    assert batch["retain"]["labels"].shape == (2, 8)
    # Every part is a batch of its own for everything else of the package.
    assert ux.fisher_diagonal(make("Llama"), [batch["forget"]]).n_samples == 2


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_trainer_of_two_sets(tmp_path):
    pytest.importorskip("accelerate")
    task, seen = ux.tasks.CausalLM(), []

    class Difference(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            seen.append({name: len(part["labels"]) for name, part in inputs.items()})
            forget, retain = (task.loss(model, inputs[name]).mean() for name in ("forget", "retain"))
            return retain - forget

    def run(**settings):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
            save_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        pairs = ux.hf.ForgetRetainDataset(FORGET, RETAIN)
        collator = ux.hf.ForgetRetainCollator()
        Difference(make("Llama"), arguments, train_dataset=pairs, data_collator=collator).train()

    run(remove_unused_columns=False)
    assert seen == [{"forget": 2, "retain": 2}, {"forget": 1, "retain": 1}]
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        run()


@pytest.mark.parametrize(
    "forget, retain, anchor, message",
    [
        ([], RETAIN, "forget", "forget must hold at least one sample"),
        (FORGET, [], "forget", "retain must hold at least one sample"),
        (FORGET, RETAIN, "both", "anchor must be"),
    ],
)
def test_bad_sets(forget, retain, anchor, message):
    with pytest.raises(ValueError, match=message):
        ux.hf.ForgetRetainDataset(forget, retain, anchor)


def record_of(model):
    before = ux.report.weights_digest(model)
    result = ux.ssd(
        model, [decoder_batch()], [{k: tokens(6, 8, seed=4) for k in ("input_ids", "labels")}], alpha=1.0
    )
    return ux.report.evidence(result, model=model, before=before, forget_ids=["a", "b"])


def test_a_record_beside_the_weights(tmp_path):
    model = make("Llama")
    record = record_of(model)
    path = ux.hf.save_pretrained(model, tmp_path / "model", record)
    assert path == tmp_path / "model" / "unlearning_evidence.json"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    read = ux.hf.read_evidence(tmp_path / "model", loaded)
    assert read == json.loads(record.to_json())
    assert record.salt is not None
    assert record.salt.hex() not in path.read_text()
    with torch.no_grad():
        loaded.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="must have the weights of the record"):
        ux.hf.read_evidence(tmp_path / "model", loaded)


def test_a_record_of_other_weights_is_refused(tmp_path):
    model = make("Llama")
    record = record_of(model)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the model has changed since"):
        ux.hf.save_pretrained(model, tmp_path / "model", record)
    assert not (tmp_path / "model").exists()
    with pytest.raises(TypeError, match="must have save_pretrained, got Linear"):
        ux.hf.save_pretrained(nn.Linear(1, 1), tmp_path / "model", record)
    with pytest.raises(FileNotFoundError):
        ux.hf.read_evidence(tmp_path)
