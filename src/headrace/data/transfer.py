"""From the stream to the device: how batches travel, chosen by what there is, said in one line.

- ``plain``: each batch's packed rows in one copy. On the CPU there is nothing to copy.
- ``prefetch``: packed rows go into page-locked buffers, used in turn, and from there on a CUDA
  stream of their own, so that the next batch travels while the device works on this one. A buffer
  is filled again when its copy is over; device memory is given back when the consumer's stream is.
- ``resident``: all rows are copied to the device once, as they are packed, and each batch is
  gathered there. Only row numbers travel.

The batches are the same in each mode, and the position counts those handed out, not those on
their way.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from headrace.data.order import Position
from headrace.data.stream import Batch, BatchLoader, BatchStream, Transfer
from headrace.errors import ConfigError, ResourceError

Mode: TypeAlias = Literal["auto", "plain", "prefetch", "resident"]
MODES: tuple[Mode, ...] = ("auto", "plain", "prefetch", "resident")

_RING = 2  # batches on their way or being used: one each
_RESIDENT_SHARE = 0.5  # of free device memory a set may take: the network needs the rest
_INDEX_BYTES = 8
_CHUNK_BYTES = 16 << 20  # that a resident set is loaded in
_PINNED_CAP_BYTES = 256 << 20


class Choice(NamedTuple):
    """How batches travel, and why."""

    mode: Literal["plain", "prefetch", "resident"]
    reason: str


def choose(
    mode: Mode,
    *,
    device_type: str,
    set_bytes: int,
    batch_bytes: int,
    free_bytes: int,
    pinned_cap_bytes: int,
) -> Choice:
    """Return how batches of ``batch_bytes`` from a set of ``set_bytes`` should travel.

    ``free_bytes`` of the device matter for CUDA only; any ``mode`` but auto is taken as it is.

    Raises:
        ConfigError: if there is no such mode, or not on this device.
        ResourceError: if the mode asked for needs more memory than there is.
    """
    ring_bytes = _pinned_bytes(batch_bytes)
    if mode not in MODES:
        raise ConfigError(f"transfer is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "prefetch" and device_type != "cuda":
        raise ConfigError(
            f"transfer is 'prefetch', but the device is {device_type}: only CUDA copies beside its "
            f"work; set it to auto"
        )
    if mode == "prefetch" and ring_bytes > pinned_cap_bytes:
        raise ResourceError(
            f"transfer is 'prefetch', but its page-locked buffers take {_mb(ring_bytes)} and "
            f"{_mb(pinned_cap_bytes)} are allowed; raise `resources.memory_budget` or lower "
            f"`batch_rows`"
        )
    if mode == "resident" and device_type == "mps":
        raise ConfigError("transfer is 'resident', but the device is mps; set it to auto")
    if mode == "resident" and device_type == "cuda" and set_bytes > free_bytes:
        raise ResourceError(
            f"transfer is 'resident', but the set takes {_mb(set_bytes)} and {_mb(free_bytes)} of "
            f"the device are free; set it to auto"
        )
    if mode != "auto":
        return Choice(mode, "as set")
    if device_type == "cpu":
        return Choice("plain", "they are read into the memory that the network works in")
    if device_type != "cuda":
        return Choice("plain", f"{device_type} does not copy beside its work")
    if set_bytes <= _RESIDENT_SHARE * free_bytes:
        return Choice(
            "resident", f"the set takes {_mb(set_bytes)}, {_mb(free_bytes)} of the device are free"
        )
    if ring_bytes <= pinned_cap_bytes:
        return Choice(
            "prefetch",
            f"the set takes {_mb(set_bytes)}, over half of the {_mb(free_bytes)} that are free on "
            f"the device; {_mb(ring_bytes)} are page-locked",
        )
    return Choice(
        "plain",
        f"page-locked buffers would take {_mb(ring_bytes)}, {_mb(pinned_cap_bytes)} are allowed",
    )


def to_device(
    batches: BatchStream | BatchLoader,
    device: torch.device | str,
    *,
    mode: Mode = "auto",
    pinned_cap_bytes: int = _PINNED_CAP_BYTES,
    log: Callable[[str], None] | None = None,
) -> "DeviceBatches":
    """Return the same batches on ``device``; see the head of this module for the modes.

    Args:
        batches: A stream, or a loader that reads ahead of it.
        device: Where the batches are wanted.
        mode: How they travel; ``auto`` chooses by the device and its free memory.
        pinned_cap_bytes: Most host memory to page-lock.
        log: Hears once what was chosen and why.

    Raises:
        ConfigError: if the mode does not exist or not on this device.
        ResourceError: if the mode asked for needs more memory than there is.
    """
    device = torch.device(device)
    stream = batches.stream if isinstance(batches, BatchLoader) else batches
    row_bytes = stream.schema.rows.row_bytes
    choice = choose(
        mode,
        device_type=device.type,
        set_bytes=_set_rows(stream) * row_bytes,
        batch_bytes=stream.max_rows * row_bytes,
        free_bytes=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0,
        pinned_cap_bytes=pinned_cap_bytes,
    )
    if log is not None:
        log(f"batches to {device.type}: {choice.mode} ({choice.reason})")
    return DeviceBatches(batches, device, choice)


class DeviceBatches:
    """The batches of a stream or loader, on a device: the same contract, the same batches.

    MPS has no float64, so there ``targets`` stay on the CPU.
    """

    def __init__(
        self, batches: BatchStream | BatchLoader, device: torch.device, choice: Choice
    ) -> None:
        self.stream = batches.stream if isinstance(batches, BatchLoader) else batches
        self.choice = choice
        self._batches = batches
        self._device = device
        self._transfer: Transfer = self._moved
        if device.type == "cuda" and choice.mode != "plain":
            self._transfer = Ring(CudaLane(device), _RING)
        self._resident: _Resident | None = None

    @property
    def pinned_bytes(self) -> int:
        """Host memory that is page-locked when all buffers are in use."""
        if not isinstance(self._transfer, Ring):
            return 0
        is_resident = self.choice.mode == "resident"
        row_bytes = _INDEX_BYTES if is_resident else self.stream.schema.rows.row_bytes
        return _pinned_bytes(self.stream.max_rows * row_bytes)

    @property
    def position(self) -> Position:
        """The epoch, and how many of its batches were handed out."""
        return self.stream.position

    def set_position(self, epoch: int, batches: int = 0) -> None:
        """Continue at batch ``batches`` of ``epoch``; see ``BatchStream.set_position``."""
        self.stream.set_position(epoch, batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the stream; see ``BatchStream.state_dict``."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another stream was; see ``BatchStream.load_state_dict``."""
        self.stream.load_state_dict(state)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self.stream)

    def __iter__(self) -> Iterator[Batch]:
        """Yield what is left of the current epoch, on the device."""
        if self.choice.mode == "resident":
            if self._resident is None:
                self._resident = _Resident(self.stream, self._device)
            packed = self._resident.packed(self.stream.position, self._transfer)
            yield from self.stream.counted(self.stream.unpacked(packed))
        elif self._device.type == "mps":
            for batch in self._batches:
                there = replace(batch, targets=batch.targets.float()).to(self._device)
                yield replace(there, targets=batch.targets)
        elif self._device.type == "cpu":
            yield from self._batches
        else:
            yield from self._batches.through(self._transfer)

    def _moved(self, packed: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        for packed_BR in packed:
            yield packed_BR.to(self._device)


class Event(Protocol):
    """Something that will have happened on the device."""

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class Lane(Protocol):
    """How packed rows get from host to device beside its work."""

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Return host memory (num_bytes,) uint8 that can be copied from asynchronously."""
        ...

    def start(self, host_BR: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Begin to copy to the device; return the rows there and the event that ends it."""
        ...

    def hand_over(self, packed_BR: torch.Tensor, event: Event) -> None:
        """Let the consumer's stream wait for the copy, and the memory for that stream."""
        ...


class CudaLane:
    """Copies on a CUDA stream of their own, from page-locked memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        """Return page-locked memory."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def start(self, host_BR: torch.Tensor) -> tuple[torch.Tensor, Event]:
        """Copy to memory that belongs to the stream of copies."""
        with torch.cuda.stream(self._stream):
            packed_BR = host_BR.to(self._device, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return packed_BR, event

    def hand_over(self, packed_BR: torch.Tensor, event: Event) -> None:
        """Nothing waits on the host; the memory is free again when the consumer is done with it."""
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(event)  # type: ignore[arg-type]
        packed_BR.record_stream(consumer)


@dataclass
class _Slot:
    """A host buffer and the copy that last read it."""

    buffer: torch.Tensor
    event: Event | None = None


class Ring:
    """Copies packed rows to the device through ``size`` host buffers, that many batches ahead.

    A buffer is filled again only after the copy that reads it. What the source raises comes after
    the batches before it; when the consumer stops, the copies under way are waited for.
    """

    def __init__(self, lane: Lane, size: int) -> None:
        self._lane = lane
        self._size = size
        self._slots: deque[_Slot] = deque()

    def __call__(self, packed: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the rows on the device, in their order."""
        under_way: deque[tuple[torch.Tensor, Event]] = deque()
        source = iter(packed)
        failure: Exception | None = None
        is_over = False
        try:
            while under_way or not is_over:
                while not is_over and len(under_way) < self._size:
                    try:
                        under_way.append(self._start(next(source)))
                    except StopIteration:
                        is_over = True
                    except Exception as error:  # noqa: BLE001 - raised below, in its place
                        failure, is_over = error, True
                if under_way:
                    packed_BR, event = under_way.popleft()
                    self._lane.hand_over(packed_BR, event)
                    yield packed_BR
                    del packed_BR
            if failure is not None:
                raise failure
        finally:
            for slot in self._slots:
                if slot.event is not None:
                    slot.event.synchronize()

    def _start(self, packed_BR: torch.Tensor) -> tuple[torch.Tensor, Event]:
        slot = self._free_slot(packed_BR.numel())
        host_BR = slot.buffer[: packed_BR.numel()].view(packed_BR.shape)
        host_BR.copy_(packed_BR)
        on_device_BR, slot.event = self._lane.start(host_BR)
        return on_device_BR, slot.event

    def _free_slot(self, num_bytes: int) -> _Slot:
        """Return the slot whose copy is the oldest, when that is over."""
        if len(self._slots) < self._size:
            slot = _Slot(self._lane.host_buffer(num_bytes))
        else:
            slot = self._slots.popleft()
            if slot.event is not None:
                slot.event.synchronize()
            if slot.buffer.numel() < num_bytes:
                slot.buffer = self._lane.host_buffer(num_bytes)
        self._slots.append(slot)
        return slot


class _Resident:
    """All rows of a stream on the device, packed; batches are gathered there."""

    def __init__(self, stream: BatchStream, device: torch.device) -> None:
        self._stream = stream
        self._chosen = stream.chosen
        row_bytes = stream.schema.rows.row_bytes
        num_rows = _set_rows(stream)
        self._packed_SR = torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=device)
        chunk_rows = max(1, _CHUNK_BYTES // row_bytes)
        for first in range(0, num_rows, chunk_rows):
            rows = np.arange(first, min(num_rows, first + chunk_rows))
            rows = rows if self._chosen is None else self._chosen.rows(rows)
            chunk_BR = np.empty((len(rows), row_bytes), np.uint8)
            stream.source.gather(rows, chunk_BR)
            self._packed_SR[first : first + len(rows)].copy_(torch.from_numpy(chunk_BR))

    def packed(self, position: Position, transfer: Transfer) -> Iterator[torch.Tensor]:
        """Yield the packed rows of the batches from ``position`` on.

        Row numbers go to the device through ``transfer``: a plain copy would wait for all that the
        device has still to do.
        """
        words = self._packed_SR.view(torch.int64)  # rows are whole words: eight bytes at a time
        for index_B in transfer(self._places(position)):
            yield words.index_select(0, index_B.view(torch.int64)).view(torch.uint8)

    def _places(self, position: Position) -> Iterator[torch.Tensor]:
        for rows in self._stream.row_batches(position):
            places = rows if self._chosen is None else self._chosen.places(rows)
            yield torch.from_numpy(places).view(torch.uint8)


def _set_rows(stream: BatchStream) -> int:
    return stream.source.num_rows if stream.chosen is None else len(stream.chosen)


def _pinned_bytes(num_bytes: int) -> int:
    return _RING * (1 << max(0, num_bytes - 1).bit_length())  # as PyTorch rounds each of them


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f} MB"
