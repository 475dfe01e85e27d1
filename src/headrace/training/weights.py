"""A network's weights as a file keeps them: each tensor once, under the first of its names.

Layers that a network uses in several places stand under several names in its state dict, which
safetensors refuses to write. Read back, every name must find its tensor, and none may be left over.
"""

from collections.abc import Mapping

import torch
from torch import nn


def stored_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights and buffers of ``network`` without further names of the same tensor."""
    state = network.state_dict()
    return {name: state[name] for name, first in _first_names(network).items() if name == first}


def load_weights(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Put what ``stored_weights`` returned into ``network``.

    Raises:
        RuntimeError: if a tensor is missing, left over or of another shape.
    """
    further = {
        name: weights[first] for name, first in _first_names(network).items() if first in weights
    }
    network.load_state_dict({**weights, **further})


def _first_names(network: nn.Module) -> dict[str, str]:
    """Return for each name in the state dict the first name of the same tensor."""
    first: dict[int, str] = {}
    state = network.state_dict(keep_vars=True)  # the tensors themselves, not copies of the handles
    return {name: first.setdefault(id(value), name) for name, value in state.items()}
