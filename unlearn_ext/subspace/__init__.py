"""Which directions a data set uses of every layer's inputs, and which are free."""

from unlearn_ext.subspace.basis import Protected, protected
from unlearn_ext.subspace.gram import ActivationGram, activation_gram
from unlearn_ext.subspace.layers import Layer, layer_of

__all__ = ["ActivationGram", "Layer", "Protected", "activation_gram", "layer_of", "protected"]
