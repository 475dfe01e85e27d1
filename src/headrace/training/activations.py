"""The activations a network may have, by name: one list for every kind.

They stand between layers, never after a head: losses are computed on logits.
"""

from collections.abc import Callable, Mapping

from torch import nn

from headrace.training.params import Activation

_LAYERS: Mapping[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,  # slope 0.01 below 0
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


def activation(name: Activation) -> nn.Module:
    """Return a new layer of the activation called ``name``."""
    return _LAYERS[name]()
