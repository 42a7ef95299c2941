"""What an exact per-sample diagonal of an FSDP2 model costs beside a training step: memory and bytes sent.

    python -m bench.sharded [--width 512] [--layers 4] [--vocabulary 8000] [--samples 4] [--length 64]

Two gloo ranks on CPUs, a model like Llama in float32. Peaks are the process's resident memory, which the
kernel is asked to measure anew for each part; bytes are what a rank hands to collectives.
"""

import argparse
import ctypes
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

_TRIM, _MMAP = -1, -3  # options of mallopt


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that collectives are given, and the collectives."""

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = {}, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function.overloadpacket.__name__
            if "gather" in name or "reduce" in name:
                tensors = [t for t in _flat((args, result)) if isinstance(t, torch.Tensor)]
                size = max((t.numel() * t.element_size() for t in tensors), default=0)
                self.bytes[name] = self.bytes.get(name, 0) + size
                self.calls[name] = self.calls.get(name, 0) + 1
        return result

    @property
    def megabytes(self):
        return sum(self.bytes.values()) / 2**20


def _flat(value):
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def _peak():
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmHWM"].split()[0]) / 1024, int(lines["VmRSS"].split()[0]) / 1024


def _reset():
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def measured(function):
    """Run a function; returns the megabytes that it held at most, those sent, and the collectives."""
    _reset()
    before = _peak()[1]
    with Traffic() as traffic:
        function()
    return _peak()[0] - before, traffic


def _model(options):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=3 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    return hf.LlamaForCausalLM(config)


def _run(rank, options, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    measure(rank, options)


def measure(rank, options):
    """Measure on one of two ranks, and print on the first."""
    torch.set_num_threads(1)
    # Freed tensors go back to the system at once, so that resident memory says what is held.
    for option in (_TRIM, _MMAP):
        ctypes.CDLL(None).mallopt(option, 65536)
    from torch.distributed.fsdp import fully_shard

    import unlearn_ext as ux

    model = _model(options)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    local = sum(p.to_local().numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(rank)
    batches = []
    for _ in range(3):
        ids = torch.randint(options.vocabulary, (options.samples, options.length), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})

    def step():
        model(**batches[0]).loss.backward()

    def forget_gradients():
        for parameter in model.parameters():
            parameter.grad = None

    task = ux.tasks.CausalLM()
    step()
    forget_gradients()
    training, sent = measured(step)
    forget_gradients()
    found = {}

    def diagonal(n):
        found["importance"] = None
        found["importance"] = ux.fisher_diagonal(model, batches[:n], task=task)

    first, first_sent = measured(lambda: diagonal(1))
    diagonal(2)
    found.clear()
    steady, one = measured(lambda: diagonal(1))
    found.clear()
    _, three = measured(lambda: diagonal(3))
    allowed = 1.25 * training + 4 * local / 2**20
    if rank == 0:
        each = (three.megabytes - one.megabytes) / 2
        shards = 4 * local / 2**20
        print(f"{2 * local / 1e6:.1f} M parameters, {options.samples} x {options.length} tokens a rank")
        print("peak above what was held before, MB:")
        print(f"  training step {training:.0f}; first call (with the check) {first:.0f}; later {steady:.0f}")
        print(f"  accumulators {shards:.0f}; bar (1.25 of a step, and the accumulators) {allowed:.0f}")
        print("MB given to collectives:")
        print(f"  training step {sent.megabytes:.1f}; first call {first_sent.megabytes:.1f}")
        print(f"  each further batch {each:.1f}, {each / sent.megabytes:.2f} of a step (bar 1.5)")
        for name, traffic in (("step", sent), ("call on three batches", three)):
            parts = {
                kind: f"{size / 2**20:.1f} MB in {traffic.calls[kind]}"
                for kind, size in traffic.bytes.items()
            }
            print(f"  {name}: {parts}")
        fused = sum(how == "fused" for how in found["importance"].coverage.values())
        print(f"fused: {fused} of {len(found['importance'].coverage)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("width", 512),
        ("layers", 4),
        ("vocabulary", 8000),
        ("samples", 4),
        ("length", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(options, os.path.join(folder, "store")), nprocs=2)


if __name__ == "__main__":
    main()
