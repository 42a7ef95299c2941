"""How far unlearned networks are from retrained ones, sample by sample: scores of two sets of margins.

A margin is the log-odds of a sample's truth, ``log p - log(1 - p)``. Every function takes two matrices
``[models, samples]``: margins of unlearned networks, and of ones retrained without the forget set.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Margins: TypeAlias = npt.NDArray[np.float64]

_CLIP, _BINS, _LEAST = 100.0, 20, 1e-5
_DELTA, _MOST_EPSILON = 1e-5, 50.0


def klom(unlearned: Margins, oracles: Margins) -> Margins:
    """Return the KL divergence of binned margins, unlearned against retrained, per sample.

    Margins are clipped at +-100 and put into 20 equal bins over the range that both sets span; a bin that
    only unlearned networks reach counts as holding 1e-5 of the retrained ones. 0 for equal histograms, at
    most ``log(1e5) = 11.5``.

    Args:
        unlearned: ``[models, samples]``.
        oracles: ``[models, samples]``.

    Returns:
        ``[samples]``, in nats.

    Source:
        Georgiev, Rinberg, Park et al., "Attribute-to-Delete: Machine Unlearning via Datamodel Matching",
        2024.

    Example:
        >>> a = np.array([[0.0], [1.0]])
        >>> klom(a, a).tolist(), klom(a, a + 50).round(1).tolist()
        ([0.0], [11.5])
    """
    sides = [np.clip(side, -_CLIP, _CLIP) for side in (unlearned, oracles)]
    low = np.minimum(*(side.min(0) for side in sides))
    width = np.maximum(*(side.max(0) for side in sides)) - low
    scale = np.divide(_BINS, width, out=np.zeros_like(width), where=width > 0)
    n = low.shape[0]
    shares = []
    for side in sides:
        bins = np.minimum(((side - low) * scale).astype(np.int64), _BINS - 1)
        counts = np.bincount((bins + np.arange(n) * _BINS).ravel(), minlength=n * _BINS)
        shares.append(counts.reshape(n, _BINS) / len(side))
    p, q = shares[0], np.maximum(shares[1], _LEAST)
    logs = np.log(np.divide(p, q, out=np.ones_like(p), where=p > 0))
    return np.asarray((p * logs).sum(1))


def epsilons(unlearned: Margins, oracles: Margins) -> Margins:
    """Return how well the best threshold tells unlearned from retrained networks, per sample.

    Over all single and double thresholds on the margin: ``max(log(1 - d - FPR) - log FNR, log(1 - d - FNR) -
    log FPR)`` with ``d = 1e-5``, in [0, 50]. A threshold that errs on neither side is worth 50; one that errs
    on one side alone is left out, as no finite number of networks can tell what it is worth.

    Args:
        unlearned: ``[models, samples]``.
        oracles: ``[models, samples]``.

    Returns:
        ``[samples]``.

    Source:
        Triantafillou, Kairouz, Pedregosa et al., "Are we making progress in unlearning? Findings from the
        first NeurIPS unlearning competition", 2024.

    Example:
        >>> a = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> epsilons(a, a + 10).tolist(), epsilons(a, a + 1.5).round(2).tolist()
        ([50.0], [1.1])
    """
    return np.array([_epsilon(*columns) for columns in zip(unlearned.T, oracles.T, strict=True)])


def forgetting_score(epsilon: Margins, n_models: int) -> float:
    """Return the mean over samples of ``2^-floor(2 epsilon)``, 0 for a sample beyond what can be measured.

    Args:
        epsilon: ``[samples]``.
        n_models: Networks on either side.

    Returns:
        A number in [0, 1]; 1 where unlearned and retrained networks cannot be told apart.

    Source:
        As ``epsilons``; there it is doubled in the first bin and multiplied by two ratios of accuracies.

    Example:
        >>> forgetting_score(np.array([0.0, 0.6, 50.0]), 16)
        0.5
    """
    points = np.exp2(-np.floor(2 * epsilon))
    return float(np.where(epsilon <= math.ceil(math.log(max(n_models - 1, 1))), points, 0.0).mean())


def likelihood_ratios(unlearned: Margins, oracles: Margins) -> tuple[Margins, Margins]:
    """Return how much likelier every margin is among unlearned than among retrained networks.

    Gaussians are fitted per sample to both sets; a network's own margin is left out of the fit that judges
    it.

    Args:
        unlearned: ``[models, samples]``, at least 3 models.
        oracles: ``[models, samples]``, at least 3 models.

    Returns:
        Log-likelihood ratios of the unlearned and of the retrained networks' margins, of their shapes.

    Source:
        U-LiRA of Hayes, Shumailov, Triantafillou, Khalifa & Papernot, "Inexact Unlearning Needs More Careful
        Evaluations to Avoid a False Sense of Privacy", 2024.
    """
    sides = [np.clip(side, -_CLIP, _CLIP) for side in (unlearned, oracles)]
    fits = [(side.mean(0), side.std(0)) for side in sides]
    found = []
    for own, side in enumerate(sides):
        left_out = _gaussians_without_each(side)
        densities = [_log_density(side, *(left_out if other == own else fits[other])) for other in (0, 1)]
        found.append(densities[0] - densities[1])
    return found[0], found[1]


def area_and_recall(members: Margins, others: Margins, fpr: float = 0.01) -> tuple[float, float]:
    """Return the area under the ROC curve, and the share of members above all but a share of the others.

    Args:
        members: Scores, high for members.
        others: Scores of the others.
        fpr: Share of the others that may pass.

    Returns:
        AUC, ties counting half, and TPR.

    Example:
        >>> area_and_recall(np.array([1.0, 2.0]), np.array([0.0, 1.5]))
        (0.75, 0.5)
    """
    ordered = np.sort(others.ravel())
    below, upto = (np.searchsorted(ordered, members.ravel(), side=side) for side in ("left", "right"))
    allowed = math.floor(fpr * len(ordered) + 1e-9)
    recall = float((members.ravel() > ordered[::-1][allowed]).mean())
    return float((below + upto).mean() / (2 * len(ordered))), recall


def _epsilon(unlearned: Margins, oracles: Margins) -> float:
    # Cuts lie between distinct values; as cumulative counts every single and double threshold is a
    # difference.
    values = np.unique(np.concatenate([unlearned, oracles]))
    below = [
        np.concatenate([[0], np.searchsorted(np.sort(side), values, side="right")]) / len(side)
        for side in (unlearned, oracles)
    ]
    inside = [cut[None, :] - cut[:, None] for cut in below]
    upper = np.triu(np.ones(inside[0].shape, dtype=bool), 1)
    # Told as unlearned: what lies between two cuts, or what does not.
    tpr = np.concatenate([inside[0][upper], 1 - inside[0][upper]])
    fpr = np.concatenate([inside[1][upper], 1 - inside[1][upper]])
    fnr = 1 - tpr
    tiny = 1e-12  # of rounding: shares are multiples of 1 / models
    if bool(((fpr < tiny) & (fnr < tiny)).any()):
        return _MOST_EPSILON
    both = (fpr >= tiny) & (fnr >= tiny)
    fpr, fnr = fpr[both], fnr[both]
    best = 0.0
    for a, b in ((fpr, fnr), (fnr, fpr)):
        possible = 1 - _DELTA - a > 0
        if possible.any():
            best = max(best, float((np.log(1 - _DELTA - a[possible]) - np.log(b[possible])).max()))
    return min(best, _MOST_EPSILON)


def _gaussians_without_each(side: Margins) -> tuple[Margins, Margins]:
    n = len(side)
    mean = (side.sum(0) - side) / (n - 1)
    variance = np.maximum((np.square(side).sum(0) - np.square(side)) / (n - 1) - np.square(mean), 0.0)
    return mean, np.sqrt(variance)


def _log_density(values: Margins, mean: Margins, deviation: Margins) -> Margins:
    # A method without randomness of its own gives one value: it is told by that, as far as can be measured.
    deviation = np.maximum(deviation, 1e-3)
    return np.asarray(-np.square((values - mean) / deviation) / 2 - np.log(deviation))
