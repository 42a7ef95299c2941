"""The per-sample engine: exact powers of every sample's gradients at the price of a training step.

One forward pass, one backward pass that computes no parameter's gradient, and ops that turn what every layer
saw into the sum over the samples of |gradient|^power. ``PerSample`` is the face. Inside:

    graph      who uses a parameter, read off autograd's graph
    rules      how a node of that graph uses it
    layers     the same for layers that autograd cannot look into
    totals     the accumulators
    uses       what a use adds to the importances; ``combine`` and ``tied`` join several
    passes     the backward pass; ``layout`` finds the samples, ``surroundings`` and ``checkpoints`` prepare
    check      nothing is trusted that plain autograd has not agreed with; ``verdicts`` remembers
    samples    losses, and plain autograd on some samples
    fallback   vmap or a loop over single samples, for what remains
"""

from unlearn_ext.fisher.engine.layers import register_layer
from unlearn_ext.fisher.engine.per_sample import PerSample
from unlearn_ext.fisher.engine.samples import Objective, add_gradient
from unlearn_ext.fisher.engine.surroundings import prepared
from unlearn_ext.fisher.engine.uses import Channels, Convolution, Gradients, Lookup, Product, Use

__all__ = [
    "Channels",
    "Convolution",
    "Gradients",
    "Lookup",
    "Objective",
    "PerSample",
    "Product",
    "Use",
    "add_gradient",
    "prepared",
    "register_layer",
]
