"""What a training step does, counted where torch hands out work: operations, bytes, FLOPs, memory.

Every operation of forward, backward and optimiser passes the dispatcher, so counting there needs no
knowledge of the network. Bytes are those of all tensors an operation reads and writes (views move
none); with caches the memory bus sees fewer. Seconds are those of each operation, waited for on an
accelerator, so a watched step is slower than a free one: shares are taken from it, never rates.
"""

import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from headrace.training.ceilings import clock


@dataclass
class OpCounts:
    """What one watched piece of work did; ``peak_bytes`` is of the tensors it made."""

    num_ops: int = 0  # views left out
    moved_bytes: int = 0
    flops: int = 0
    peak_bytes: int = 0
    # Matrix products, and all else, by operation.
    arithmetic_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    other_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def watch(
    work: Callable[[], object], *, wait: Callable[[], object] = lambda: None
) -> tuple[OpCounts, Any]:
    """Run ``work`` and return what it did, and its result.

    ``wait`` returns when the device has done all it was given (``torch.cuda.synchronize``).
    """
    ops = _Watch(wait)
    with ops:
        result = work()
    with FlopCounterMode(display=False) as flops:
        work()
    ops.counts.flops = flops.get_total_flops()
    return ops.counts, result


class _Watch(TorchDispatchMode):
    def __init__(self, wait: Callable[[], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = OpCounts()
        self._wait = wait
        self._live: dict[int, int] = {}  # bytes by address
        self._live_bytes = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        began = clock()
        result = func(*args, **(kwargs or {}))
        self._wait()
        seconds = clock() - began
        if func.is_view:
            return result
        counts, name = self.counts, func.overloadpacket.__name__
        counts.num_ops += 1
        by_name = counts.arithmetic_s if func.overloadpacket in flop_registry else counts.other_s
        by_name[name] += seconds
        read, made = _tensors((args, kwargs)), _tensors(result)
        counts.moved_bytes += sum(t.numel() * t.element_size() for t in [*read, *made])
        known = {t.untyped_storage().data_ptr() for t in read}
        for tensor in made:
            self._follow(tensor.untyped_storage(), known)
        return result

    def _follow(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        """Count a new storage as held until it is freed."""
        address, num_bytes = storage.data_ptr(), storage.nbytes()
        if not num_bytes or address in known or address in self._live:
            return
        self._live[address] = num_bytes
        self._live_bytes += num_bytes
        self.counts.peak_bytes = max(self.counts.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, address).atexit = False

    def _forget(self, address: int) -> None:
        self._live_bytes -= self._live.pop(address, 0)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
