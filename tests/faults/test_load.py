"""Many requests in a row, many threads at once, processes made after use."""

import copy
import gc
import os
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux


def network(seed=0):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def samples(n, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=draws), torch.arange(n) % 3


def batches(x, y, size=250):
    return list(zip(x.split(size), y.split(size), strict=True))


def resident():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def requests_in_a_row(n_requests, n):
    """Subtract one sample after another, and compare with what the rest gives.

    Returns:
        The largest error of a parameter as a share of its largest value, and bytes gained after a tenth.
    """
    x, y = samples(n)
    model = network()
    full = ux.fisher_diagonal(model, batches(x, y))
    held = 0
    for number in range(n_requests):
        part = ux.fisher_diagonal(model, [(x[number : number + 1], y[number : number + 1])])
        full = full - part
        if number == n_requests // 10:
            gc.collect()
            held = resident()
    gc.collect()
    gained = resident() - held
    rest = ux.fisher_diagonal(copy.deepcopy(model).double(), batches(x[n_requests:].double(), y[n_requests:]))
    assert full.n_samples == rest.n_samples
    errors = [(full[name] - rest[name]).abs().max() / rest[name].max() for name in rest]
    return float(max(errors)), gained


def test_requests_in_a_row_do_not_drift():
    error, _ = requests_in_a_row(200, 400)
    assert error < 2e-5


@pytest.mark.slow
def test_ten_thousand_requests_in_a_row():
    error, gained = requests_in_a_row(10_000, 20_000)
    print(f"10,000 requests: relative error {error:.1e}, memory gained {gained / 2**20:.1f} MiB")
    assert error < 1e-3
    assert gained < 0.01 * resident()


def test_a_part_of_something_else_is_told():
    model = network()
    full = ux.fisher_diagonal(model, batches(*samples(40)))
    other = ux.fisher_diagonal(model, batches(10 * samples(30, seed=5)[0], samples(30)[1]))
    with pytest.warns(UserWarning, match=r"values came out below 0 and were set to 0.*not of this whole"):
        rest = full - other
    assert all(bool((tensor >= 0).all()) for tensor in rest.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full - ux.fisher_diagonal(model, batches(*(tensor[:30] for tensor in samples(40))))


def test_threads_with_models_of_their_own():
    x, y = samples(32)
    expected = {seed: ux.fisher_diagonal(network(seed), batches(x, y, 8)) for seed in range(4)}
    wrong = []

    def work(number):
        try:
            seed = number % 4
            model = network_of[number]
            found = ux.fisher_diagonal(model, batches(x, y, 8))
            if any(not torch.allclose(found[name], expected[seed][name], 1e-5, 1e-9) for name in found):
                wrong.append(f"{number}: another answer")
            mask = ux.ops.topk_mask([found["0.weight"]], k=10)
            if int(ux.ops.unpack_mask(mask[0], [16, 6]).sum()) != 10:
                wrong.append(f"{number}: another mask")
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}")

    network_of = [network(number % 4) for number in range(64)]
    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Scored(TensorDataset):
    """Calls the ops in a worker."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        mask = ux.ops.topk_mask([x], k=3)[0]
        return x * ux.ops.unpack_mask(mask, list(x.shape)), y


def test_processes_forked_after_use():
    data = Scored(*samples(24))
    model = network()
    plain = ux.fisher_diagonal(model, DataLoader(data, batch_size=8))
    forked = ux.fisher_diagonal(
        model, DataLoader(data, batch_size=8, num_workers=2, multiprocessing_context="fork")
    )
    assert all(torch.equal(plain[name], forked[name]) for name in plain)
