"""Where training runs (cuda, mps, cpu), with how many threads, and whose random numbers it draws.

Weights depend on the number of torch threads, so it is set for the time of a fit and put back.
Layers draw initial weights and dropout masks from torch's global generator and take no other; so
the global one is lent to a named stream while a model is built or trained, then put back as it
was. No global seed is set, and nothing outside sees a draw.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from headrace.errors import DependencyError


def pick_device(wanted: str) -> torch.device:
    """Return the device ``wanted``; ``auto`` is the first present of cuda, mps, cpu.

    Raises:
        DependencyError: if a device is asked for by name and is not there.
    """
    present = [name for name in ("cuda", "mps", "cpu") if _is_present(name)]
    if wanted == "auto":
        return torch.device(present[0])
    if wanted not in present:
        raise DependencyError(
            f"`train.nn.device` is {wanted!r}, but torch finds only {', '.join(present)} on this "
            f"machine; set it to auto"
        )
    return torch.device(wanted)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """Let torch use ``num_threads`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class RandomStream:
    """A named stream of torch random numbers, seeded from ``path``, on the CPU and ``device``.

    Two streams with different paths are independent; the same path gives the same numbers.
    """

    def __init__(self, *path: int, device: torch.device) -> None:
        self._path = path
        self._device = device
        self._module = _random_module(device)
        self._is_lent = False
        self._states = self._seeded(path)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Draw from this stream wherever torch draws, until the block ends."""
        before = self._now()
        self._set(self._states)
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False
            self._states = self._now()
            self._set(before)

    def state(self) -> dict[str, torch.Tensor]:
        """Return where the stream stands, also while it is lent."""
        return self._now() if self._is_lent else dict(self._states)

    def restore(self, states: dict[str, torch.Tensor]) -> None:
        """Go to a position that ``state()`` returned, on the same kind of device."""
        self._states = {name: state.cpu() for name, state in states.items()}
        if self._is_lent:
            self._set(self._states)

    def restart(self, *branch: int) -> None:
        """Go to the start of the stream that ``branch`` names below this one's path."""
        self.restore(self._seeded((*self._path, *branch)))

    def _seeded(self, path: tuple[int, ...]) -> dict[str, torch.Tensor]:
        seed = int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)
        states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if self._module:
            states["device"] = torch.Generator(self._device).manual_seed(seed).get_state()
        return states

    def _now(self) -> dict[str, torch.Tensor]:
        now = {"cpu": torch.get_rng_state()}
        if self._module:
            now["device"] = self._module.get_rng_state()
        return now

    def _set(self, states: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(states["cpu"])
        if self._module and "device" in states:
            self._module.set_rng_state(states["device"])


def _is_present(name: str) -> bool:
    if name == "cuda":
        return torch.cuda.is_available()
    return name == "cpu" or torch.backends.mps.is_available()


def _random_module(device: torch.device) -> Any:
    return {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
