"""The rows of margins of an audit: made by one process, or shared out among ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from unlearn_ext.distributed import Ranks
from unlearn_ext.evaluation.margins import Row, Rows
from unlearn_ext.evaluation.references import References

ORIGINAL = "original"
Jobs: TypeAlias = Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]]
"""Label to method and settings."""


@dataclass(frozen=True, slots=True)
class Trained:
    """Networks trained on one set, a seed each.

    Attributes:
        networks: Trains them, or takes them from the cache.
        data: Fingerprint of the set.
    """

    networks: References
    data: object


def made_rows(
    jobs: Jobs,
    oracles: Trained,
    originals: Trained | nn.Module,
    rows: Rows,
    n_models: int,
    say: Callable[[str], object],
    ranks: Ranks,
) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Make, or take from the cache, the rows of all networks.

    Every network has a seed of its own, so that it does not matter who makes its row. Of many ranks each
    makes every world-th, that of an unlearned network where its original has been trained; they meet once,
    when all are done.

    Args:
        jobs: Label to method and settings.
        oracles: Networks retrained without the forget set.
        originals: What unlearns: networks of the same seeds as the unlearned ones, or the one there is.
        rows: Measures networks.
        n_models: Networks of each kind.
        say: What to do with a line per network.
        ranks: Those that share the work.

    Returns:
        Label to rows, and label to why there are none, the same on every rank.
    """
    mine = range(ranks.rank, n_models, ranks.world)
    own: dict[str, dict[int, Row]] = {"oracles": {}}
    failures: dict[str, tuple[int, str]] = {}
    for i in mine:
        say(f"audit: oracle {i + 1}/{n_models}")
        own["oracles"][i] = rows.of_trained("oracle", oracles.networks, i, oracles.data)
    source: References | nn.Module
    whole: object
    if isinstance(originals, Trained):
        source, whole = originals.networks, originals.data
        own[ORIGINAL] = {}
        for i in mine:
            say(f"audit: original {i + 1}/{n_models}")
            own[ORIGINAL][i] = rows.of_trained("original", originals.networks, n_models + i, originals.data)
    else:
        source, whole = originals, ""
    for label, (function, settings) in jobs.items():
        own[label] = {}
        for i in mine:
            say(f"audit: {label} {i + 1}/{n_models}")
            try:
                own[label][i] = rows.of_unlearned(function, settings, source, n_models + i, whole)
            except Exception as error:  # one method's failure costs its own row only
                failures[label] = i, f"{type(error).__name__}: {error}"
                break
    told = ranks.exchange("rows of all networks", (own, failures))
    failed: dict[str, str] = {}
    known: dict[str, list[Row]] = {}
    for label in own:
        reasons = [other[label] for _, other in told if label in other]
        if reasons:  # what one process would have met first
            failed[label] = min(reasons)[1]
            continue
        joined = {i: row for made, _ in told for i, row in made[label].items()}
        known[label] = [joined[i] for i in range(n_models)]
    return known, failed
