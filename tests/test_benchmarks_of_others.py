"""Methods of this package inside SUPREME and OpenUnlearning."""

import copy
import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from language_models import make, tokens
from torch import nn
from torch.utils.data import DataLoader, Dataset

import unlearn_ext as ux
from unlearn_ext.integrations import supreme as adapters
from unlearn_ext.integrations.open_unlearning import unlearn_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*")

NAMES = ("ux_ssd", "ux_gradient_masking", "ux_salun", "ux_pgu", "ux_unsir")


class Images(Dataset):
    """As SUPREME's data sets: image, nothing or a coarse label, label."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        return self.x[index], torch.tensor([]), int(self.y[index])


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    y = torch.randint(4, (160,))
    x = torch.randn(160, 8) + 3 * torch.eye(4, 8)[y]
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, {"forget": Images(x[y == 1], y[y == 1]), "retain": Images(x[y != 1], y[y != 1])}


def given_by_supreme(fabric, model, data, strategy="fullclass"):
    """What its unlearn_main passes to methods that were registered from outside, as of version 0.1.5."""
    loaders = {name: fabric.setup_dataloaders(DataLoader(part, 32)) for name, part in data.items()}
    unused = ("retain_test_dataloader", "forget_test_dataloader", "train_dataloader", "test_dataloader")
    unused += ("full_train_dataloader", "retain_train_augmented_dataloader", "unlearning_teacher")
    return {
        **dict.fromkeys(unused),
        "fabric": fabric,
        "wandb_logging_flag": False,
        "type_of_unlearning_strategy": strategy,
        "model": fabric.setup(model),
        "model_name": "Net",
        "dataset_name": "Data",
        "num_gpus": 0,
        "distributed_strategy_name": "ddp",
        "num_labels": 4,
        "forget_label_id": 1,
        "forget_train_dataloader": loaders["forget"],
        "retain_train_dataloader": loaders["retain"],
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_method_in_supreme(trained, name):
    supreme = pytest.importorskip("supreme")
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, data = copy.deepcopy(trained[0]), trained[1]
    supreme.register_unlearning_method(name, getattr(adapters, name))
    assert name in supreme.project_config.unlearning_methods
    module, attribute = supreme.registry.resolve_method_location(name)
    method = getattr(importlib.import_module(module), attribute)
    torch.manual_seed(1)
    given = given_by_supreme(fabric, model, data)
    returned = method(**given)
    assert returned is model
    # The same as a call of ours.
    other, task = copy.deepcopy(trained[0]), ux.tasks.Classification(inputs=0, labels=2)
    own = {"forget_classes": [1]} if name == "ux_unsir" else {}
    forget, retain = (DataLoader(data[part], 32) for part in ("forget", "retain"))
    torch.manual_seed(1)
    ux.unlearn(name.removeprefix("ux_"), other, None if own else forget, retain, task=task, **own)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    pairs = zip(model.parameters(), trained[0].parameters(), strict=True)
    is_changed = any(not torch.equal(p, q) for p, q in pairs)
    assert is_changed or name == "ux_pgu"  # which refuses so small a network, and says so
    with torch.no_grad():
        kept = (given["model"](data["retain"].x).argmax(1) == data["retain"].y).float().mean()
    assert kept >= 0.9


def test_unsir_forgets_classes_only(trained):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    given = given_by_supreme(fabric, copy.deepcopy(trained[0]), trained[1], "random_")
    with pytest.raises(ValueError, match="the strategy must be fullclass, got 'random_'"):
        adapters.ux_unsir(**given)


def test_entry_points_name_what_there_is():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    _, _, section = text.partition('[project.entry-points."supreme.unlearning_methods"]\n')
    lines = section.partition("\n\n")[0].splitlines()
    assert lines == [f'{name} = "unlearn_ext.integrations.supreme:{name}"' for name in NAMES]
    assert all(callable(getattr(adapters, name)) for name in NAMES)


# OpenUnlearning is no package. What stands in for it here was written from its documented interface: trainers
# are constructed as its load_trainer does, and read train_dataset.forget and .retain.


class Pairs(Dataset):
    def __init__(self, forget, retain):
        self.forget, self.retain = forget, retain

    def __len__(self):
        return len(self.forget)


def open_unlearning(folder, model, data, **method_args):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class UnlearnTrainer(transformers.Trainer):
        def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
            self.evaluators, self.template_args = evaluators, template_args
            super().__init__(*args, **kwargs)

    handler = unlearn_trainer(UnlearnTrainer)
    assert handler.__name__ == "UnlearnExt"
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, remove_unused_columns=False
    )
    return handler(
        model=model,
        train_dataset=data,
        eval_dataset=None,
        data_collator=transformers.default_data_collator,
        args=arguments,
        evaluators=None,
        template_args={},
        **method_args,
    )


def texts(n, seed):
    return [
        {"input_ids": ids, "labels": ids.clone(), "index": i} for i, ids in enumerate(tokens(n, 8, seed=seed))
    ]


@pytest.mark.parametrize("method", ["npo", "gradient_difference", "ssd"])
def test_a_method_in_open_unlearning(tmp_path, method):
    model = make("Llama")
    settings = {"alpha": 1.0} if method == "ssd" else {"epochs": 2}
    data = Pairs(texts(4, 1), texts(6, 2))
    trainer = open_unlearning(tmp_path, model, data, method=method, settings=settings)
    before, task = copy.deepcopy(model), ux.tasks.CausalLM()
    batch = {k: torch.stack([sample[k] for sample in data.forget]) for k in ("input_ids", "labels")}
    output = trainer.train()
    trainer.save_state()
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert task.loss(model, batch).mean() > task.loss(before, batch).mean()
    record = json.loads((tmp_path / "unlearning_result.json").read_text(encoding="utf-8"))
    assert record["method"] == method
    assert output.metrics["changed"] == record["changed"] > 0
    assert (tmp_path / "saved" / "config.json").exists()


def test_what_open_unlearning_may_not_ask(tmp_path):
    data = Pairs(texts(4, 1), texts(6, 2))
    with pytest.raises(ValueError, match=r"method must be one of .*, got 'magic'"):
        open_unlearning(tmp_path, make("Llama"), data, method="magic")
    model = make("Llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="without retain"):
        open_unlearning(tmp_path, model, Pairs(texts(4, 1), None)).train()
    pairs = [{"original": sample, "alternate": sample} for sample in texts(4, 1)]
    trainer = open_unlearning(tmp_path, model, Pairs(pairs, texts(6, 2)))
    trainer.data_collator = lambda samples: {"original": samples, "alternate": samples}
    with pytest.raises(ValueError, match="must have input_ids and labels, got original, alternate"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
