"""``ux.losses``: losses with one value per sample."""

from unlearn_ext.tasks.losses import cross_entropy, log_odds, logit_norm

__all__ = ["cross_entropy", "log_odds", "logit_norm"]
