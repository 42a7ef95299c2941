"""Which scalars, neurons or layers answer for given data, and masks of them."""

from unlearn_ext.masks.saliency import Scores, saliency
from unlearn_ext.masks.selection import select_mask

__all__ = ["Scores", "saliency", "select_mask"]
