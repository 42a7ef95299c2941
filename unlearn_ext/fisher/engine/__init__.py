"""The per-sample engine: exact powers of every sample's gradients at the price of a training step.

One forward pass, one backward pass that computes no parameter's gradient, and ops that turn what every layer
saw into the sum over the samples of |gradient|^power. ``PerSample`` is the face. Inside:

    graph      the nodes that take a parameter, read off autograd's graph
    rules      what a node of that graph saves, and what gradient it implies
    layers     the same for layers that autograd cannot look into
    totals     the accumulators
    gradients  per-sample gradients of a parameter at one node; ``combine`` and ``tied`` add up several
    passes     the backward pass; ``layout`` finds the samples, ``environment`` and ``checkpoints`` prepare
    verification  nothing is trusted that plain autograd has not agreed with; ``trust`` remembers
    sample_losses  losses, and plain autograd on some samples
    fallback   vmap or a loop over single samples, for what remains
"""

from unlearn_ext.fisher.engine.environment import prepared
from unlearn_ext.fisher.engine.gradients import (
    Channels,
    Convolution,
    Gradients,
    Lookup,
    PerSampleGradients,
    Product,
)
from unlearn_ext.fisher.engine.layers import register_layer
from unlearn_ext.fisher.engine.per_sample import PerSample
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, add_gradient

# The name under which rules for layers of one's own know it.
Use = PerSampleGradients

__all__ = [
    "Channels",
    "Convolution",
    "Gradients",
    "Lookup",
    "PerSample",
    "PerSampleGradients",
    "PerSampleLoss",
    "Product",
    "Use",
    "add_gradient",
    "prepared",
    "register_layer",
]
