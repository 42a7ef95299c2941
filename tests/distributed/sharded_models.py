"""Small networks to be sharded, and every rank's share of their data."""

import torch
from torch import nn


def language_model(kind, **settings):
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 32, "use_cache": False}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = {"num_key_value_heads": 2}
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **heads, **settings))
    elif kind == "gpt2":
        own = {
            "vocab_size": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 32,
            "use_cache": False,
        }
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**own, bos_token_id=1, eos_token_id=2, **settings))
    elif kind == "pythia":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, **settings))
    elif kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, **heads, **settings))
    else:
        own = {"num_local_experts": 4, "num_experts_per_tok": 2}
        model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, **heads, **own, **settings))
    return model.eval()


class Small(nn.Module):
    """Convolution, norm and linear layers whose sizes no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(75, 7), nn.Tanh(), nn.LayerNorm(7))
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(7, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x))) * self.scale


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return None


class CutOff(Small):
    """As int8 layers are: there is a graph, and nothing comes back through it."""

    def forward(self, x):
        return self.head(_Cut.apply(self.body(self.stem(x)))) * self.scale


def small(seed=0):
    torch.manual_seed(seed)
    return Small().eval()


def blocks_of(model):
    """The modules that are to be sharded on their own, from the inside out."""
    if isinstance(model, Small):
        return [model.stem, model.body]
    kinds = ("DecoderLayer", "GPT2Block", "GPTNeoXLayer")
    return [module for module in model.modules() if type(module).__name__.endswith(kinds)]


def shard(model, **settings):
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(model):
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


def texts(seed, sizes, length=9):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for n in sizes:
        ids = torch.randint(3, 40, (n, length), generator=generator)
        batches.append({"input_ids": ids, "labels": ids.clone()})
    return batches


def images(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, 1, 5, 5, generator=generator), torch.randint(5, (n,), generator=generator))
        for n in sizes
    ]


# Ragged on purpose: other numbers of batches, other sizes, a batch of one sample.
SHARES = [[4, 1, 3], [2, 2], [5]]


def shares(make, world, sizes=SHARES):
    """Every rank's own batches."""
    return [make(10 + rank, sizes[rank]) for rank in range(world)]


def digits_like(world):
    """A network that tells five kinds of images apart, and shares of one kind to forget and of the others."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(5, 1, 5, 5, generator=generator)

    def draw(labels):
        return kinds[labels] + 0.3 * torch.randn(len(labels), 1, 5, 5, generator=generator), labels

    model = small()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        x, y = draw(torch.randint(5, (50,), generator=generator))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    forget = [[draw(torch.zeros(n, dtype=torch.long)) for n in sizes] for sizes in SHARES[:world]]
    retain = [[draw(torch.arange(12 + rank) % 4 + 1) for _ in range(rank + 1)] for rank in range(world)]
    return model, forget, retain
