"""Random damage to saved files: ``python tests/faults/file_fuzz.py --files 100000``.

Each file is refused as documented, or read as it was written. One whose header was rewritten, digest and all,
may be another whole file: what it is read as can then be saved and read again. Reading writes nothing, starts
nothing, and takes neither long nor much memory.
"""

import argparse
import collections
import contextlib
import copy
import gc
import json
import random
import resource
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import unlearn_ext as ux
from unlearn_ext._internal.checkpoints import load_weights
from unlearn_ext._internal.files import _digest
from unlearn_ext.evaluation import margins
from unlearn_ext.resume.store import Store

with torch.random.fork_rng([]):
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
OWNERS = {"importances": ux.Importance, "factors": ux.KroneckerFactors, "grams": ux.ActivationGram}
ENDINGS = {"weights": ".pt", "named weights": ".safetensors"}
DTYPES = ["F32", "F64", "BF16", "BOOL", "I64", "U16", "F8_E4M3", "F8_E8M0", "F6_E2M3", "F4", "C64"]
VALUES = [
    *[None, True, 0, 1, -1, 7, 2**31, 2**53 + 1, 2**63 - 1, 2**64, 1e999, 0.5, float("nan"), *DTYPES],
    *["", "x", "null", "7", "{}", "[[]]", "[" * 5000, "\0", "é", [], {}, [0], [1, 2], [0, 2**62], [[]]],
    *[[2**40, 0, 2**40], {"a": 1}, {"dtype": "F32"}],
]
MODES = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.dlopen")


def whole_files(folder):
    """Bytes of a whole file of each kind."""
    draws = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 3, generator=draws), torch.tensor([0, 1] * 3))]
    ux.fisher_diagonal(MODEL, data).save(folder / "importances")
    ux.kfac_factors(MODEL, data).save(folder / "factors")
    ux.activation_gram(MODEL, data).save(folder / "grams")
    Store(folder / "pass", "fuzz").write({"total/a": torch.ones(3)}, {"batches": 2, "counts": {"n": 4}})
    arrays = {"margins/forget": np.arange(6.0), "accuracy/forget": np.array(0.5), "reached": np.array(1)}
    np.savez(folder / "margins.npz", **arrays)
    torch.save(MODEL.state_dict(), folder / "weights")
    save_file(MODEL.state_dict(), folder / "named weights")
    names = [*OWNERS, "pass", "margins.npz", *ENDINGS]
    return {name: (folder / name).read_bytes() for name in names}


def bits_of(value):
    """Something equal for equal contents only, also where they are no numbers."""
    if isinstance(value, torch.Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if hasattr(value, "items"):
        return sorted((str(name), bits_of(one)) for name, one in value.items())
    return [bits_of(one) for one in value] if isinstance(value, (list, tuple)) else repr(value)


def read(kind, path):
    """Everything that a file is read as, as `bits_of` gives it."""
    if kind in OWNERS:
        found = OWNERS[kind].load(path)
        facts = {name: getattr(found, name) for name in type(found).__slots__ if name != "_tensors"}
        return [bits_of(found), bits_of(facts)]
    if kind == "pass":
        return bits_of(Store(path, "fuzz").read())
    if kind == "margins.npz":
        row = margins._read(path, {"forget": None})
        return [bits_of(row.margins), bits_of(row.accuracy), row.reached]
    model = copy.deepcopy(MODEL)
    try:
        load_weights(model, path)
    except Exception:
        if bits_of(model.state_dict()) != bits_of(MODEL.state_dict()):
            raise AssertionError("a refused file has changed the model") from None
        raise
    return bits_of(model.state_dict())


def damaged(draw, data, others):
    """Bytes changed in one of many ways."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    b = min(b, a + draw.choice([1, 4, 64, len(data)]))
    match draw.randrange(8):
        case 0:
            return data[:a]
        case 1:
            found = bytearray(data)
            for _ in range(draw.choice([1, 1, 2, 8])):
                found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
            return bytes(found)
        case 2:
            return data[:a] + draw.choice([bytes(b - a), b"\xff" * (b - a), draw.randbytes(b - a)]) + data[b:]
        case 3:
            return data[:a] + data[b:]
        case 4:
            return data[:b] + data[a:]
        case 5:
            other = draw.choice(others)
            return data[:a] + other[min(a, len(other)) :]
        case 6:
            return (
                struct.pack("<Q", draw.choice([0, 1, len(data), 2**31, 2**63, draw.randrange(2**64)]))
                + data[8:]
            )
        case _:
            return data + draw.randbytes(draw.choice([1, 8, 100]))


def rewritten(draw, data):
    """A file whose header says something else; whether it has no digest, or that of what it says now."""
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    facts = header.get("__metadata__", {})
    inner = draw.choice([name for name in facts if name not in ("format", "digest")] or [None])
    is_inside = inner is not None and draw.random() < 0.6
    try:
        tree = json.loads(facts[inner]) if is_inside else header
    except ValueError:
        is_inside, tree = False, header
    tree = changed(draw, {"": tree})[""]
    if is_inside:
        facts[inner] = json.dumps(tree)
        header["__metadata__"] = facts
    else:
        header = tree
    told = header.get("__metadata__") if isinstance(header, dict) else None
    may_differ = not isinstance(told, dict) or "digest" not in told
    if isinstance(told, dict) and draw.random() < 0.5:
        may_differ = True
        told.pop("digest", None)
        if draw.random() < 0.5:
            _reseal(header, rest, told)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest, may_differ


def _reseal(header, rest, told):
    import safetensors.torch

    text = json.dumps(header).encode()
    try:
        tensors = safetensors.torch.load(struct.pack("<Q", len(text)) + text + rest)
        told["digest"] = _digest(tensors, told)
    except Exception:
        return


def changed(draw, tree):
    """A tree of dictionaries and lists with one node replaced, removed, added or moved."""
    places = []

    def visit(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(tree)
    node, key = draw.choice(places)
    match draw.randrange(7):
        case 0 if key != "":
            del node[key]
        case 1 if isinstance(node, dict) and key != "":
            node[draw.choice(["", "a", "0.weight", "__metadata__", "0" * 300])] = node.pop(key)
        case 2:
            other, place = draw.choice(places)
            node[key] = copy.deepcopy(other[place])
        case 3 if isinstance(node, dict) and key != "":
            shape = draw.choice([[0], [0, 2**62, 4], [2**64, 0], [0, 7], []])
            node["added"] = {"dtype": draw.choice(DTYPES), "shape": shape, "data_offsets": [0, 0]}
        case _:
            node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def documented(kind, error):
    """Whether a file may be refused so; rows of margins are made again whatever is wrong with them."""
    if kind in OWNERS or kind == "pass":
        return isinstance(error, ValueError) and "must" in str(error)
    if kind == "weights" and isinstance(error, MemoryError):
        return True  # torch's reader makes room for as many bytes as a damaged length says, before it reads
    return not isinstance(error, (AssertionError, MemoryError, RecursionError))


class Watch:
    """Notes what reading does besides reading; hooks of the interpreter cannot be taken back.

    What other threads do is not reading, nor what is cleaned up or compiled in its time: see ``undisturbed``.
    """

    def __init__(self):
        self.is_on, self.seen, self.thread = False, [], threading.get_ident()
        sys.addaudithook(self._hear)

    def _hear(self, event, arguments):
        if self.is_on and threading.get_ident() == self.thread:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
            if writes or event.startswith(MODES):
                self.seen.append(event)


WATCH = Watch()


@contextlib.contextmanager
def undisturbed():
    """Nobody's garbage is collected, and no module that is imported on first use is written compiled."""
    before = gc.isenabled(), sys.dont_write_bytecode
    WATCH.thread = threading.get_ident()
    gc.collect()
    gc.disable()
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before[1]
        if before[0]:
            gc.enable()


def judge(kind, path, whole, may_differ):
    """``"refused"``, ``"as written"``, ``"another"``, or what is wrong with reading a file."""
    started = time.process_time()
    WATCH.seen.clear()
    WATCH.is_on = True
    try:
        found = read(kind, path)
    except Exception as error:
        answer = "refused" if documented(kind, error) else f"{type(error).__name__}: {error}"[:200]
    else:
        answer = "as written" if found == whole else "another"
    finally:
        WATCH.is_on = False
    if WATCH.seen:
        return f"it did {WATCH.seen}"
    if time.process_time() - started > 5:
        return "it took long"
    if answer != "another" or kind in ENDINGS:  # formats of others, which have no digest
        return answer
    if not may_differ:
        return "read as something else"
    return another(kind, path, found)


def another(kind, path, found):
    """Whether what another whole file is read as can be saved and read again."""
    if kind in OWNERS:
        again = path.with_suffix(".again")
        OWNERS[kind].load(path).save(again)
        if read(kind, again) != found:
            return "read as something that is saved as something else"
    return "another"


def fuzz(n_files, seed, say=None):
    """Read damaged files.

    Args:
        n_files: How many.
        seed: Of the first; every file can be made again by its own.
        say: What to do with what is wrong.

    Returns:
        How often what happened.
    """
    happened = collections.Counter()
    with tempfile.TemporaryDirectory() as name, undisturbed():
        folder = Path(name)
        files = whole_files(folder)
        paths = {kind: folder / f"damaged{ENDINGS.get(kind, Path(kind).suffix)}" for kind in files}
        wholes = {}
        for kind, data in files.items():
            paths[kind].write_bytes(data)
            wholes[kind] = read(kind, paths[kind])
        for number in range(seed, seed + n_files):
            draw = random.Random(number)
            kind = draw.choice(list(files))
            data, may_differ = files[kind], False
            if kind not in ("margins.npz", "weights") and draw.random() < 0.5:
                data, may_differ = rewritten(draw, data)
            else:
                for _ in range(draw.choice([1, 1, 1, 2, 4])):
                    data = damaged(draw, data, list(files.values())) or b"\0"
            paths[kind].write_bytes(data)
            try:
                outcome = judge(kind, paths[kind], wholes[kind], may_differ)
            except Exception as error:
                outcome = f"what was read cannot be used: {type(error).__name__}: {error}"[:200]
            if outcome not in ("refused", "as written", "another"):
                if say is not None:
                    say(f"file {number}, {kind}: {outcome}")
                outcome = "wrong"
            happened[outcome] += 1
    return happened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(200, 0)  # what is loaded on first use, before memory is bounded
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
    found = collections.Counter()
    for first in range(0, options.files, 2500):
        count = min(2500, options.files - first)
        found += fuzz(count, options.seed + first, lambda text: print(text, flush=True))
        print(found.total(), dict(found), flush=True)
    raise SystemExit(bool(found["wrong"]))
