"""Random shares, batch sizes and failures: do all ranks end together, with the right numbers or an error?

    python tests/distributed/fuzz.py --runs 500

`test_ranks_fuzz.py` does a few of them. One start of the processes serves many runs.
"""

import argparse
import random
import time

import many
import torch
import torch.distributed as dist
import work

import unlearn_ext as ux


class InjectedError(OSError):
    """What a rank may raise in the middle of its data."""


class Raising:
    """Batches, and a failure before one of them."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if index == self.at:
                raise InjectedError("injected")
            yield batch
        if self.at >= len(self.data):
            raise InjectedError("injected")


def case_of(seed, world):
    """What a run does: the same on every rank, and in the test's own process."""
    draw = random.Random(seed)
    n = draw.randrange(1, 40)
    inputs, labels = work.samples(n, seed=seed)
    shares, start = [[] for _ in range(world)], 0
    while start < n:
        size = draw.randrange(1, 9)
        shares[draw.randrange(world)].append((inputs[start : start + size], labels[start : start + size]))
        start += size
    what = draw.choice(["fisher", "gram", "kfac", "grad", "accuracy", "ascent", "ssd"])
    failing = draw.randrange(world) if draw.random() < 0.4 else None
    at = 0 if failing is None else draw.randrange(len(shares[failing]) + 1)
    return what, shares, failing, at


def call(what, model, data, **group):
    """One function; what it comes to as a dictionary of tensors."""
    if what == "fisher":
        return dict(ux.fisher_diagonal(model, data, **group))
    if what == "gram":
        return dict(ux.activation_gram(model, data, **group))
    if what == "kfac":
        found = ux.kfac_factors(model, data, loss_fn=ux.losses.cross_entropy, **group)
        return {name: pair.outputs for name, pair in found.items()}
    if what == "grad":
        return dict(ux.saliency(model, data, score="grad", **group))
    if what == "accuracy":
        return {"accuracy": torch.tensor([ux.metrics.accuracy(model, data, **group)])}
    if what == "ssd":
        ux.ssd(model, data, data, alpha=0.9, **group)
    else:
        ux.methods.gradient_ascent(model, data, epochs=1, cap=5.0, **group)
    return dict(model.state_dict())


def outcome_of(what, model, data, **group):
    """What a call comes to, or the name of what it raises."""
    try:
        return call(what, model, data, **group)
    except Exception as error:
        return type(error).__name__


def on_rank(rank, world, seeds):
    """The outcome of every run on one rank."""
    found = []
    for seed in seeds:
        what, shares, failing, at = case_of(seed, world)
        model = work.model_of(work.Plain)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        data = Raising(shares[rank], at) if rank == failing else shares[rank]
        found.append(outcome_of(what, model, data, process_group=dist.group.WORLD))
        if isinstance(found[-1], str):
            assert many.same_bits(before, dict(model.state_dict()))
    return found


def together(shares):
    """Steps of all ranks together, for what trains."""
    longest = max(map(len, shares))
    steps = [[share[i] for share in shares if i < len(share)] for i in range(longest)]
    return [tuple(torch.cat(column) for column in zip(*step, strict=True)) for step in steps]


def check(seeds, world):
    """Run them: no number may be wrong, no rank hang. How many failed as they had to."""
    found = many.run(on_rank, world, list(seeds), limit=many.TIMEOUT)
    n_failed = 0
    for place, seed in enumerate(seeds):
        what, shares, failing, _ = case_of(seed, world)
        outcomes = [each[place] for each in found]
        if failing is not None:
            n_failed += 1
            kinds = {"InjectedError", "OSError"}
            assert all(outcome in kinds for outcome in outcomes), (seed, what, outcomes)
            continue
        whole = together(shares) if what == "ascent" else [batch for share in shares for batch in share]
        expected = outcome_of(what, work.model_of(work.Plain), whole)
        if isinstance(expected, str):
            assert set(outcomes) == {expected}, (seed, what, outcomes)
            continue
        assert all(many.same_bits(outcome, outcomes[0]) for outcome in outcomes), (seed, what)
        assert isinstance(outcomes[0], dict), (seed, what, outcomes[0])
        assert many.difference(outcomes[0], expected) <= 2e-6, (seed, what)
    return n_failed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    settings = parser.parse_args()
    started, done, failed = time.monotonic(), 0, 0
    while done < settings.runs:
        n = min(20, settings.runs - done)
        world = 2 + done // 20 % 2
        first = settings.first + done
        failed += check(range(first, first + n), world)
        done += n
        seconds = time.monotonic() - started
        print(f"{done} runs, {failed} with a failing rank: all right ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
