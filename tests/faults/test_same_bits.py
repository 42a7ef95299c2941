"""The same seed gives the same bits from run to run, and of some methods on any number of threads."""

import pytest
import torch
from subjects import QUICK
from torch import nn

import unlearn_ext as ux

# What trains by torch's own kernels, which split sums among the threads: across numbers of threads these
# agree to rounding only.
ROUNDED = {
    "gradient_masking",
    "salun",
    "unsir",
    "finetune",
    "neg_grad_plus",
    "random_label",
    "bad_teacher",
    "scrub",
    "msg",
    "gradient_difference",
    "npo",
    "simnpo",
}


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(16 * 100, 96),
            nn.ReLU(),
            nn.Linear(96, 3),
        )


def sets():
    draws = torch.Generator().manual_seed(1)
    y = torch.arange(96) % 3
    x = torch.randn(96, 3, 12, 12, generator=draws) + 0.5 * torch.eye(3)[y][:, :, None, None]
    data = torch.utils.data.TensorDataset(x, y)
    parts = [torch.utils.data.Subset(data, (y == 0).nonzero().flatten().tolist())]
    parts.append(torch.utils.data.Subset(data, (y > 0).nonzero().flatten().tolist()))
    return [torch.utils.data.DataLoader(part, batch_size=16, shuffle=True) for part in parts]


def outcome(name, n_threads):
    torch.set_num_threads(n_threads)
    try:
        model, (forget, retain) = network(), sets()
        with torch.no_grad():  # answers that the data decide, so that there is something to forget
            model[-1].weight.mul_(0.1)
        settings = dict(QUICK[name])
        if settings.pop("validated", False):
            settings["validation"] = retain
        seed = torch.Generator().manual_seed(5)
        ux.unlearn(name, model, forget, retain, generator=seed, **settings)
        return {key: tensor.clone() for key, tensor in model.state_dict().items()}
    finally:
        torch.set_num_threads(1)


def same_bits(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_a_method_gives_the_same_bits(name):
    first = outcome(name, 1)
    assert same_bits(first, outcome(name, 1))
    two = outcome(name, 2)
    assert same_bits(two, outcome(name, 2))
    if name not in ROUNDED:
        assert same_bits(first, two)
