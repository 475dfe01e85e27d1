"""In which numbers a network computes: float32, or half as wide where that is faster.

Weights, optimiser and losses stay float32; autocast narrows products and activations. bfloat16 has
float32's range, so nothing else is needed. float16 has not: small gradients would become 0, so the
loss is multiplied before the backward pass and gradients are divided after it. A gradient that
overflows leaves that update out and halves the factor. Validation and prediction are float32.
"""

from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How forward, backward and update are run on ``device``."""

    def __init__(
        self, wanted: Literal["auto", "float32", "bf16", "fp16"], device: torch.device
    ) -> None:
        self.name = _auto(device) if wanted == "auto" else wanted
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.is_scaled)

    @property
    def is_scaled(self) -> bool:
        """Whether an update may be left out because a gradient overflowed."""
        return self.name == "fp16"

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in this precision until the block ends."""
        return torch.autocast(
            self._device.type, dtype=_DTYPES[self.name], enabled=self.name != "float32"
        )

    def backward(self, total: torch.Tensor) -> None:
        """Add the gradients of ``total`` to those there are, scaled."""
        torch.autograd.backward(self._scaler.scale(total))

    def unscale(self, optimiser: torch.optim.Optimizer) -> None:
        """Make the gradients, now complete, the true ones."""
        self._scaler.unscale_(optimiser)

    def step(self, optimiser: torch.optim.Optimizer) -> None:
        """Update the weights, unless a gradient overflowed."""
        self._scaler.step(optimiser)
        self._scaler.update()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: plain numbers."""
        return self._scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what ``state()`` returned."""
        self._scaler.load_state_dict(state)


def _auto(device: torch.device) -> Literal["float32", "bf16"]:
    computes_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(
        including_emulation=False
    )
    return "bf16" if computes_bf16 else "float32"
