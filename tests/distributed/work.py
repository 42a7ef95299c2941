"""Models and data of the tests on many ranks; the same on every rank, and in the test's own process."""

import torch
from torch import nn

CLASSES = 3


class Net(nn.Module):
    """Convolution, normalisation, embedding, linear: what each has a rule of its own for."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(5, 6)
        self.hidden = nn.Linear(4 * 16 + 6, 10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, inputs):
        images, words = inputs[:, :16], inputs[:, 16].long()
        x = torch.relu(self.norm(self.conv(images.reshape(-1, 1, 4, 4)))).flatten(1)
        x = torch.tanh(self.hidden(torch.cat([x, self.table(words)], 1)))
        return self.head(x)


class Plain(nn.Module):
    """Without normalisation."""

    def __init__(self, width=12):
        super().__init__()
        self.hidden = nn.Linear(17, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, inputs):
        return self.head(torch.tanh(self.hidden(inputs)))


def model_of(kind=Net, seed=0, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().to(dtype).eval()


def samples(n=37, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, 17, generator=generator)
    inputs[:, 16] = torch.randint(5, (n,), generator=generator).float()
    return inputs.to(dtype), torch.randint(CLASSES, (n,), generator=generator)


def batches(inputs, labels, size):
    return list(zip(inputs.split(size), labels.split(size), strict=True))


def shares(whole, world, form):
    """The batches of each rank: one after the other in turn, ragged, or all on the last rank."""
    if form == "even":
        return [whole[rank::world] for rank in range(world)]
    if form == "ragged":
        return [whole[:1] if rank else whole[1:] for rank in range(world)][:2] + [[]] * (world - 2)
    return [whole if rank == world - 1 else [] for rank in range(world)]
