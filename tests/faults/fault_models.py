"""Three small models with much that a call has to put back, and points at which a fault may strike."""

import torch
from torch import nn

import unlearn_ext as ux


class Points:
    """Counts the calls of the user's own code, and raises in one of them."""

    def __init__(self):
        self.watch()

    def watch(self, at=None, error=None):
        self.n, self.at, self.error, self.names, self.has_struck = 0, at, error, [], False

    def __call__(self, name):
        self.n += 1
        if self.at is None:
            self.names.append(name)
        elif self.n == self.at:
            self.has_struck = True
            raise self.error


POINTS = Points()


class _Marked(nn.Module):
    def forward(self, x):
        POINTS("forward")
        out = self.answer(x)
        if out.requires_grad:
            out.register_hook(lambda _: POINTS("backward"))
        POINTS("end of forward")
        return out


class Convolutions(_Marked):
    """BatchNorm with momentum and without, dropout, a part in eval mode, a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.second_norm = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4, momentum=None)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(4, 3)

    def answer(self, x):
        x = torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4))))
        x = torch.relu(self.second_norm(self.second(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Shared(_Marked):
    """One weight used twice, a weight that nothing uses, parametrizations, gradients left by the user."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm(16)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(16, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def answer(self, x):
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


class Checkpointed(_Marked):
    """Attention under activation checkpointing."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)
        self.block = nn.MultiheadAttention(8, 2, batch_first=True)

    def _attend(self, x):
        return x + self.block(x, x, x, need_weights=False)[0]

    def answer(self, x):
        x = self.up(x.view(-1, 4, 4))
        if torch.is_grad_enabled():
            x = torch.utils.checkpoint.checkpoint(self._attend, x, use_reentrant=False)
        else:
            x = self._attend(x)
        return self.down(x.mean(1))


def make(kind):
    """A model that the user has left in a state of their own."""
    POINTS.watch()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = kind()
        x, y = samples()
        optimizer = torch.optim.Adam(model.parameters(), 0.02)
        for _ in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        first, *others = model.parameters()
        first.grad = torch.full_like(first, 0.5)
        for parameter in others:
            parameter.grad = None
        if kind is Convolutions:
            model.conv.bias.requires_grad_(False)
            model.second_norm.eval()
    return model


KINDS = (Convolutions, Shared, Checkpointed)


def samples(n=30):
    draws = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 3
    return torch.randn(n, 16, generator=draws) + 3 * torch.eye(3, 16)[y], y


class Loader:
    """Batches, each of whose readings is a point; sized, so that methods may pair sets."""

    def __init__(self, x, y, size=6):
        self.batches = list(zip(x.split(size), y.split(size), strict=True))

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            POINTS("batch")
            yield batch


def sets():
    x, y = samples()
    return Loader(x[y == 0], y[y == 0]), Loader(x[y > 0], y[y > 0])


class Marked(ux.tasks.Classification):
    """Classification whose loss is a point."""

    def losses(self, outputs, batch):
        POINTS("loss")
        return super().losses(outputs, batch)
