"""What a rank holds and sends for a sharded model, by formula; hours for a Llama of 8 B, by datasheet.

    python -m bench.sharded_costs [--world 1 8] [--texts 10000] [--length 1024]

``tests/distributed/test_sharded_costs.py`` checks the formulas against what runs hold and send. The hours are
estimates: nothing here has been timed on such cards.
"""

import argparse
import math
from dataclasses import dataclass

Shape = tuple[int, ...]

# NVIDIA's datasheet of the H100 SXM: dense bfloat16, memory, NVLink in one direction.
FLOPS, MEMORY, LINK = 989e12, 3.35e12, 450e9
UTILISATION = 0.4  # of the arithmetic; assumed
GIB = 2**30


@dataclass(frozen=True)
class Sharded:
    """Parameters of a model as they are gathered together.

    Attributes:
        blocks: Shapes of each group of its own: what a call of ``fully_shard`` takes.
        rest: Shapes of the root's group, which stays gathered from the forward to the backward pass.
        world: Ranks.
        width: Bytes of a weight.
    """

    blocks: tuple[tuple[Shape, ...], ...]
    rest: tuple[Shape, ...]
    world: int
    width: int = 4

    @property
    def shapes(self) -> list[Shape]:
        """All parameters."""
        return [*self.rest, *(shape for block in self.blocks for shape in block)]

    @property
    def scalars(self) -> int:
        """Of the whole model."""
        return sum(map(math.prod, self.shapes))

    @property
    def shard(self) -> int:
        """Scalars of the rank that holds most: rows are dealt out as torch.chunk does."""
        return sum(map(self._own, self.shapes))

    @property
    def largest_group(self) -> int:
        """Scalars that are gathered at once: the root's and the largest block's."""
        return sum(map(math.prod, self.rest)) + max(sum(map(math.prod, block)) for block in self.blocks)

    def _own(self, shape: Shape) -> int:
        return -(-shape[0] // self.world) * math.prod(shape[1:])

    def gathered(self) -> int:
        """Bytes of all-gathers in a forward and a backward pass: blocks twice, the root's group once."""
        twice = sum(self._own(shape) for block in self.blocks for shape in block)
        return self.width * self.world * (2 * twice + sum(map(self._own, self.rest)))

    def scattered(self) -> int:
        """Bytes of reduce-scatters where every parameter's gradients are added up, in float32."""
        return 4 * self.world * sum(map(self._own, self.shapes))

    def accumulators(self) -> int:
        """Bytes of the totals of ``fisher_diagonal``, which are its result."""
        return 4 * self.shard

    def diagonal(self) -> int:
        """Bytes of ``fisher_diagonal`` without activations: shards, totals, one group and its powers."""
        return self.width * (self.shard + self.largest_group) + self.accumulators() + 4 * self.largest_group

    def dampening(self) -> int:
        """Bytes of ``plan_ssd`` without activations: two sets of importances instead of one."""
        return self.diagonal() + self.accumulators()

    def momentum(self) -> int:
        """Bytes of ``MaskedSGD``'s state with momentum."""
        return self.width * self.shard

    def masking(self) -> int:
        """Bytes of ``gradient_masking`` with momentum, without activations, where all may change.

        Shards, their values from before, gradients, momentum; sums in float32; masks as bool and packed; one
        group gathered, and its gradients in float32.
        """
        trained = (4 * self.width + 4 + 1) * self.shard + sum(-(-self._own(s) // 8) for s in self.shapes)
        return trained + (self.width + 4) * self.largest_group


def factors(layers: dict[str, tuple[int, int]]) -> int:
    """Bytes of Kronecker factors, which every rank holds whole: float64.

    Args:
        layers: Name to outputs and inputs, a bias counting as one more input.

    Returns:
        Bytes.
    """
    return 8 * sum(outputs**2 + inputs**2 for outputs, inputs in layers.values())


def llama(world, width=2, *, hidden=4096, inner=14336, layers=32, key_values=1024, vocabulary=128256):
    """The shapes of a Llama without biases, a block per layer."""
    block = ((hidden, hidden), (key_values, hidden), (key_values, hidden), (hidden, hidden))
    block += ((inner, hidden), (inner, hidden), (hidden, inner), (hidden,), (hidden,))
    rest = ((vocabulary, hidden), (hidden,), (vocabulary, hidden))
    return Sharded((block,) * layers, rest, world, width)


def llama_factors(*, hidden=4096, inner=14336, layers=32, key_values=1024):
    """Layers with factors of such a model, but for the embedding and the head."""
    found = {}
    for i in range(layers):
        for name, pair in {
            "q": (hidden, hidden),
            "k": (key_values, hidden),
            "v": (key_values, hidden),
            "o": (hidden, hidden),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }.items():
            found[f"{i}.{name}"] = pair
    return found


def hours(model: Sharded, texts: int, length: int, *, a_rank: int = 4) -> float:
    """Estimate a pass of ``fisher_diagonal``.

    Args:
        model: The model.
        texts: Samples.
        length: Tokens of each.
        a_rank: Samples of a batch of a rank.

    Returns:
        Hours: arithmetic of a training step (6 operations a weight and token), a read and a write of every
        sample's gradient and of the totals, and what is sent, one after the other.
    """
    own = texts / model.world
    arithmetic = 6 * model.scalars * length * own / (FLOPS * UTILISATION)
    powers = 16 * model.scalars * own / MEMORY
    sent = (model.gathered() + model.scattered()) * (1 - 1 / model.world) * own / a_rank / LINK
    return (arithmetic + powers + sent) / 3600


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    for world in options.world:
        model = llama(world)
        print(
            f"Llama of {model.scalars / 1e9:.2f} B in bfloat16 on {world} ranks, GiB a rank, no activations:"
        )
        for name in ("diagonal", "dampening", "masking"):
            print(f"  {name} {getattr(model, name)() / GIB:.0f}")
        sent = (1 - 1 / world) * (model.gathered() + model.scattered()) / GIB
        print(f"  sent by a rank per batch: {sent:.0f} GiB")
        found = hours(model, options.texts, options.length)
        print(f"  {options.texts} texts of {options.length} tokens, by datasheet: {found:.2f} h")
    print(f"Kronecker factors of all layers but embedding and head: {factors(llama_factors()) / GIB:.0f} GiB")
    one = factors(llama_factors(layers=1))
    print(f"of one layer: {one / GIB:.1f} GiB")


if __name__ == "__main__":
    main()
