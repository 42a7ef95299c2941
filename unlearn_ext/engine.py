"""``unlearn_ext.engine``: what rules for layers of one's own are written with."""

from unlearn_ext.fisher.engine import (
    Channels,
    Convolution,
    Gradients,
    Lookup,
    Product,
    Use,
    register_layer,
)

__all__ = ["Channels", "Convolution", "Gradients", "Lookup", "Product", "Use", "register_layer"]
