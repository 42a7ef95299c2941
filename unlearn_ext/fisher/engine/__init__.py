"""The per-sample engine: exact powers of every sample's gradients at the price of a training step.

One forward pass, one backward pass that computes no parameter's gradient, and ops that turn what every layer
saw into the sum over the samples of |gradient|^power. ``PerSample`` is the face; README.md says what is
assumed, and what is proven when. Inside:

    graph          the nodes that take a parameter, read off autograd's graph
    rules          what a node of that graph saves, and what gradients it implies
    layers         the same for layers that autograd cannot look into
    gradients      per-sample gradients of a parameter at one node; ``combine`` and ``tied`` add up several
    totals         the accumulators; ``settled`` those of a sharded model
    passes         forward and backward passes; ``environment`` and ``checkpoints`` prepare them
    layout         where the samples are in a tensor; ``proof`` finds out, ``selections`` says for how long
    verification   single samples by plain autograd
    coupling       whether a few single samples suffice; ``axis_rules``, ``axis_indexing`` and ``sample_axis``
                   follow the samples through the operators of a pass
    trust          what has been found out about a model
    sample_losses  losses, and batches of some samples
    fallback       vmap or a loop over single samples, for what remains
    lockstep       what the ranks of a sharded model decide together
"""

from unlearn_ext.fisher.engine.environment import prepared, unwritten
from unlearn_ext.fisher.engine.gradients import (
    Channels,
    Convolution,
    Gradients,
    Lookup,
    PerSampleGradients,
    Product,
)
from unlearn_ext.fisher.engine.layers import register_layer
from unlearn_ext.fisher.engine.per_sample import PerSample, check_parameters
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, add_gradient
from unlearn_ext.fisher.engine.trust import forget

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
    "check_parameters",
    "forget",
    "prepared",
    "register_layer",
    "unwritten",
]
