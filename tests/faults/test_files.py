"""Files that are cut short, damaged, of another kind or made to harm: refused, whatever they hold."""

import json
import os
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import unlearn_ext as ux
from unlearn_ext._internal.checkpoints import load_weights
from unlearn_ext.evaluation import margins

MODEL = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
DATA = [(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 3))]
KINDS = {
    "importances": (ux.Importance, lambda: ux.fisher_diagonal(MODEL, DATA)),
    "factors": (ux.KroneckerFactors, lambda: ux.kfac_factors(MODEL, DATA)),
    "grams": (ux.ActivationGram, lambda: ux.activation_gram(MODEL, DATA)),
}


@pytest.fixture(params=KINDS)
def written(request, tmp_path):
    """A class that loads, a whole file of it, and its bytes."""
    owner, make = KINDS[request.param]
    path = tmp_path / "kept.safetensors"
    make().save(path)
    return owner, path, path.read_bytes()


def test_folders_on_the_way_are_made(written, tmp_path):
    owner, path, data = written
    deep = tmp_path / "a" / "b" / "c" / "kept.safetensors"
    owner.load(path).save(deep)
    assert header_of(deep.read_bytes())[0].keys() == header_of(data)[0].keys()
    owner.load(deep)


def header_of(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header, rest):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def bits_of(mapping):
    flat = {}
    for name, value in mapping.items():
        parts = [value] if isinstance(value, torch.Tensor) else [value[0], value[1]]
        flat[name] = [(part.dtype, list(part.shape), part.numpy().tobytes()) for part in parts]
    return flat


def refuses(owner, path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError, match="must"):
        owner.load(path)


def test_every_cut_is_refused(written):
    owner, path, data = written
    for length in {*range(0, len(data), 7), len(data) - 1}:
        refuses(owner, path, data[:length])
    refuses(owner, path, data + b"\0")


def test_every_flipped_bit_is_refused(written):
    # Also those of the tensors, which nothing but the digest tells from others.
    owner, path, data = written
    whole = owner.load(path)
    chosen = random.Random(0).sample(range(8 * len(data)), 600)
    for bit in chosen:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = owner.load(path)
        except ValueError:
            continue
        # In the padding of the header, say, or in the word "digest": what is read is what was written.
        assert found.n_samples == whole.n_samples
        assert bits_of(found) == bits_of(whole), bit


def test_a_digest_under_another_name_is_refused(written):
    # Two flipped bits: one in the digest's name, one in a value that nothing else tells from others.
    owner, path, data = written
    damaged = bytearray(data.replace(b'"digest"', b'"digeSt"'))
    damaged[-3] ^= 1
    refuses(owner, path, bytes(damaged))


def test_facts_of_any_kind_are_refused(written):
    owner, path, data = written
    header, rest = header_of(data)
    told = header["__metadata__"]
    for name in told.keys() - {"format", "digest"}:
        for value in STRANGE:
            facts = {k: v for k, v in told.items() if k != "digest"} | {name: value}
            path.write_bytes(with_header({**header, "__metadata__": facts}, rest))
            try:
                owner.load(path)
            except ValueError:
                continue
            assert (name, value) in MAY_BE
        without = {k: v for k, v in told.items() if k not in (name, "digest")}
        refuses(owner, path, with_header({**header, "__metadata__": without}, rest))


STRANGE = ["", "{", "null", "7", '"x"', "[]", "{}", "[[[]]]", '{"a": 1}', "1e999", "[" * 100_000, "NaN"]
# Free texts, and what could stand in files of earlier versions, which have no digest.
MAY_BE = {("n_samples", "7"), *((name, text) for name in ("gradients", "coverage") for text in STRANGE)}


@pytest.mark.parametrize("kind", KINDS)
def test_other_files_are_refused(kind, tmp_path):
    owner, _ = KINDS[kind]
    path = tmp_path / "other"
    others = [b"", b"\0" * 8, b"\xff" * 8, b"PK\x03\x04", b"\x80\x04.", b"[1, 2]", os.urandom(100)]
    others.append(struct.pack("<Q", 2**63 - 1) + b"{}")  # a header of all memory
    others.append(struct.pack("<Q", 99_000_000) + b"{" * 100)
    huge = b'{"a":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4]}}'
    others.append(with_header(huge, b"\0" * 4))
    others.append(with_header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4))
    others.append(with_header(b'{"__metadata__":{"format":["x"]}}', b""))
    tracemalloc.start()
    for data in others:
        refuses(owner, path, data)
    for other, (_, make) in KINDS.items():
        if other != kind:
            make().save(path)
            refuses(owner, path, path.read_bytes())
    save_file({"weight": torch.ones(2)}, path)
    refuses(owner, path, path.read_bytes())
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0"])
def test_dtypes_that_torch_has_not_are_refused(dtype, written):
    owner, path, data = written
    header, rest = header_of(data)
    header["__metadata__"].pop("digest")
    more = {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}
    refuses(owner, path, with_header({**header, "more": more}, rest))


@pytest.mark.parametrize("shape", [[0, 2**62, 2**62], [0, 2**63]])
def test_shapes_that_torch_has_not_are_refused(shape, written):
    owner, path, data = written
    header, rest = header_of(data)
    header["__metadata__"].pop("digest")
    more = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    refuses(owner, path, with_header({**header, "more": more}, rest))


def test_a_file_without_facts_is_refused(written):
    owner, path, data = written
    header, rest = header_of(data)
    refuses(owner, path, with_header({**header, "__metadata__": None}, rest))


def test_rows_without_an_end_are_refused(tmp_path):
    path = tmp_path / "kept"
    ux.kfac_factors(MODEL, DATA).save(path)
    header, rest = header_of(path.read_bytes())
    told = header["__metadata__"]
    del told["digest"]
    told["n_rows"] = told["n_rows"].replace("6", "1e999")
    refuses(ux.KroneckerFactors, path, with_header(header, rest))


@pytest.mark.parametrize("name", ["n_samples", "n_batches", "batch_size", "power", "estimator", "loss"])
def test_facts_of_importances_that_cannot_be_computed_with_are_refused(name, tmp_path):
    # A digest is no signature, and files of earlier versions have none.
    path = tmp_path / "kept"
    ux.fisher_diagonal(MODEL, DATA).save(path)
    header, rest = header_of(path.read_bytes())
    told = header["__metadata__"]
    del told["digest"]
    facts = json.loads(told["importance"])
    for value in (-1, 0.5, "x", [1], float("nan")):
        if name != "loss" or value != "x":
            changed = {**told, "importance": json.dumps({**facts, name: value})}
            refuses(ux.Importance, path, with_header({**header, "__metadata__": changed}, rest))


def test_names_that_look_like_paths_are_names(tmp_path):
    # A tensor's name never reaches the file system.
    plain = ux.fisher_diagonal(MODEL, DATA)
    names = ["../../evil", "/etc/passwd"]
    facts = {**plain._facts(), "coverage": dict.fromkeys(names, "fused")}
    importance = ux.Importance({name: torch.ones(2) for name in names}, **facts)
    importance.save(tmp_path / "kept")
    assert list(ux.Importance.load(tmp_path / "kept")) == names
    assert os.listdir(tmp_path) == ["kept"]


class Harmful:
    def __reduce__(self):
        return os.mkdir, (Harmful.where,)


def test_no_pickle_is_run(tmp_path):
    Harmful.where = str(tmp_path / "harmed")
    for name in ("kept.pt", "kept.pth", "kept.bin", "kept"):
        torch.save({"0.weight": Harmful()}, tmp_path / name)
        with pytest.raises(Exception, match=r".") as refused:
            load_weights(nn.Linear(2, 2), tmp_path / name)
        assert not isinstance(refused.value, AssertionError)
    arrays = {"margins/forget": np.array([Harmful()], dtype=object), "reached": np.array(1)}
    np.savez(tmp_path / "row.npz", **arrays, **{"accuracy/forget": np.array(1.0)})
    with pytest.raises(ValueError, match=r"allow_pickle|Object arrays"):
        margins._read(tmp_path / "row.npz", {"forget": None})
    assert not (tmp_path / "harmed").exists()


def test_facts_of_a_checkpoint_reach_no_other_attribute():
    importance = ux.fisher_diagonal(MODEL, DATA)
    state = importance.state_dict()
    facts = json.loads(state["facts"])
    for name in ("_tensors", "__class__", "save"):
        with pytest.raises(ValueError, match="facts"):
            importance.load_state_dict({**state, "facts": json.dumps({**facts, name: 1})})
    for name, value in (
        ("n_samples", "many"),
        ("n_batches", -1),
        ("power", 3),
        ("estimator", "of mine"),
        ("loss", 7),
    ):
        with pytest.raises(ValueError, match=f"Importance.load_state_dict: .*{name}"):
            importance.load_state_dict({**state, "facts": json.dumps({**facts, name: value})})
    assert importance.state_dict()["facts"] == state["facts"]
