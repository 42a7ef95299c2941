"""The Trainer with FSDP2 and masks: bits that are kept, and the steps of one process.

accelerate (1.15) shards for accelerators only: on CPUs it drops its FSDP plugin without a word, which leaves
whole models side by side. What it does elsewhere runs here all the same once the plugin is put in its place:
its own preparation of model and optimizer, on two processes with gloo.
"""

import os

import pytest
import torch
from language_models import make

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from trainer_runs import (
    DATA,
    LR,
    arguments,
    packed,
    random_masks,
    train,
    values_of,
)

pytestmark = pytest.mark.slow
STEPS = 4
SETTINGS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
}


def sharding_trainer(*given, **named):
    import transformers
    from accelerate.utils import DistributedType

    class Sharding(transformers.Trainer):
        def create_accelerator_and_postprocess(self):
            from accelerate import FullyShardedDataParallelPlugin

            super().create_accelerator_and_postprocess()
            assert getattr(self.accelerator.state, "fsdp_plugin", None) is None  # what accelerate has dropped
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True

    return Sharding(*given, **named)


def train_sharded(folder, model, masks, settings):
    import unlearn_ext as ux

    given = {
        "per_device_train_batch_size": 2,
        "max_grad_norm": 0.0,
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        "ddp_backend": "gloo",
        **settings,
    }
    run = sharding_trainer(
        model,
        arguments(folder, STEPS, **given),
        train_dataset=DATA,
        optimizer_cls_and_kwargs=ux.hf.masked_adamw(model, lr=LR, masks=masks, clip_free=0.1),
    )
    run.train()
    return run


def _one_of_two(rank, folder):
    from torch.distributed.fsdp import FSDPModule

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text()}
    for kind, settings in SETTINGS.items():
        model = make("Llama").double()
        before, masks = values_of(model), random_masks(model)
        run = train_sharded(folder / f"{kind}-{rank}", model, masks, settings)
        assert sum(isinstance(module, FSDPModule) for module in run.model_wrapped.modules()) >= 3
        wanted = torch.load(folder / f"{kind}.pt")
        for name, p in model.named_parameters():
            value, mask = p.detach().full_tensor(), masks[name]
            assert torch.equal(value[~mask].view(torch.int64), before[name][~mask].view(torch.int64)), name
            moved = float((wanted[name] - before[name])[mask].abs().max())
            assert moved > LR, name
            assert float((value - wanted[name])[mask].abs().max()) <= 1e-6 * moved, name
    torch.distributed.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return own.getsockname()[1]


@pytest.mark.filterwarnings("ignore")
def test_two_processes_are_one(tmp_path):
    import unlearn_ext as ux

    for kind, settings in SETTINGS.items():
        model = make("Llama").double()
        masks = packed(random_masks(model))
        optimizer = ux.hf.masked_adamw(model, lr=LR, masks=masks, clip_free=0.1)
        trainer = {"optimizer_cls_and_kwargs": optimizer}
        train(tmp_path / kind, model, STEPS, trainer, max_grad_norm=0.0, **settings)
        torch.save(values_of(model), tmp_path / f"{kind}.pt")
    (tmp_path / "port").write_text(str(free_port()))
    torch.multiprocessing.start_processes(_one_of_two, args=(tmp_path,), nprocs=2, start_method="spawn")
