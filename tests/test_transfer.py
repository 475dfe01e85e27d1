"""How batches reach a device: the choice, the ring of buffers, the same batches in each mode."""

import gc
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.data.order import KINDS, Position
from headrace.data.stream import BatchStream, loader
from headrace.data.transfer import CudaLane, Ring, choose, to_device
from headrace.errors import ConfigError, ResourceError
from tests.encode_tables import encode_example

MB = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    encoded, _, _ = encode_example(tmp_path_factory.mktemp("transfer"), num_train=500)
    return encoded


def same(a, b):
    return all(
        torch.equal(torch.nan_to_num(getattr(a, name)), torch.nan_to_num(getattr(b, name)))
        for name in ("row_id", "numeric", "codes", "targets", "weight", "fold")
    )


def equal(first, second):
    return len(first) == len(second) and all(map(same, first, second))


def chosen(mode="auto", *, device="cuda", rows=100, batch=1, free=1000, cap=64):
    return choose(
        mode,
        device_type=device,
        set_bytes=rows * MB,
        batch_bytes=batch * MB,
        free_bytes=free * MB,
        pinned_cap_bytes=cap * MB,
    )


@pytest.mark.parametrize(
    ("case", "mode", "reason"),
    [
        ({"device": "cpu"}, "plain", "read into the memory"),
        ({"device": "mps"}, "plain", "mps does not copy beside"),
        ({}, "resident", "the set takes 100 MB, 1,000 MB of the device are free"),
        ({"rows": 500}, "resident", "500 MB"),
        ({"rows": 501}, "prefetch", "over half of the 1,000 MB .* 2 MB are page-locked"),
        ({"rows": 501, "batch": 40}, "plain", "would take 134 MB, 64 MB are allowed"),
        ({"mode": "plain"}, "plain", "as set"),
        ({"mode": "prefetch"}, "prefetch", "as set"),
        ({"mode": "resident", "device": "cpu"}, "resident", "as set"),
        ({"mode": "resident", "rows": 900}, "resident", "as set"),
    ],
)
def test_the_choice_follows_from_what_there_is(case, mode, reason):
    choice = chosen(**case)

    assert choice.mode == mode
    assert re.search(reason, choice.reason), choice.reason


@pytest.mark.parametrize(
    ("case", "error", "match"),
    [
        ({"mode": "fast"}, ConfigError, "'fast'; it must be one of auto, plain"),
        ({"mode": "prefetch", "device": "cpu"}, ConfigError, "'prefetch', but the device is cpu"),
        ({"mode": "resident", "device": "mps"}, ConfigError, "'resident', but the device is mps"),
        ({"mode": "prefetch", "batch": 40}, ResourceError, "134 MB and 64 MB are allowed"),
        ({"mode": "resident", "rows": 1001}, ResourceError, "1,001 MB and 1,000 MB of the device"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(case, error, match):
    with pytest.raises(error, match=match):
        chosen(**case)


@pytest.mark.parametrize("order", KINDS)
@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize(("rank", "num_ranks"), [(0, 1), (1, 3)])
def test_a_resident_set_gives_the_batches_of_the_stream(folder, order, part, rank, num_ranks):
    """Two epochs, of all rows and of some, for a rank among several."""
    rows = np.arange(500) % 5 != 2 if part else None
    streams = [
        BatchStream(
            folder, batch_size=33, order=order, rows=rows, rank=rank, num_ranks=num_ranks, seed=4
        )
        for _ in range(2)
    ]
    resident = to_device(streams[0], "cpu", mode="resident")

    for _ in range(2):
        assert equal(list(resident), list(streams[1]))
    assert resident.position == Position(2, 0)


@pytest.mark.parametrize("sampling", ["weighted", "balanced:late"])
def test_a_resident_set_gives_sampled_batches(folder, sampling):
    """Rows come more than once, others never."""
    rows = np.arange(500) % 5 != 2
    streams = [
        BatchStream(folder, batch_size=33, sampling=sampling, rows=rows, seed=4) for _ in range(2)
    ]

    assert equal(list(to_device(streams[0], "cpu", mode="resident")), list(streams[1]))


def test_a_resident_set_continues_where_another_stream_was(folder):
    stream = BatchStream(folder, batch_size=33)
    resident = to_device(BatchStream(folder, batch_size=33), "cpu", mode="resident")
    for _, batch in zip(range(4), stream, strict=False):
        assert len(batch) == 33
    resident.load_state_dict(stream.state_dict())

    assert resident.position == Position(0, 4)
    assert equal(list(resident), list(stream))
    resident.set_position(3, 2)
    stream.set_position(3, 2)
    assert equal(list(resident), list(stream))
    assert resident.state_dict() == stream.state_dict()
    assert len(resident) == len(stream)


def test_on_the_cpu_nothing_is_copied(folder):
    """The tensors are those of the stream, and so is what is counted."""
    said = []
    stream = BatchStream(folder, batch_size=33)
    seen = []
    moved = to_device(stream, "cpu", log=said.append)
    original = stream.unpacked
    stream.unpacked = lambda packed: original(seen.append(p.data_ptr()) or p for p in packed)

    first = next(iter(moved))

    assert said == [
        "batches to cpu: plain (they are read into the memory that the network works in)"
    ]
    assert moved.pinned_bytes == 0
    assert first.row_id.data_ptr() == seen[0]
    assert moved.position == Position(0, 1)


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_a_loader_can_stand_before_the_device(folder, read_ahead):
    batches = loader(BatchStream(folder, batch_size=33), read_ahead=read_ahead)

    assert equal(list(to_device(batches, "cpu")), list(BatchStream(folder, batch_size=33)))


class SlowLane:
    """A device whose copies happen only when somebody waits for them: the latest they may be.

    A copy reads its host buffer at that time, so a buffer filled too early shows in the rows.
    """

    def __init__(self):
        self.allocated = []
        self.unfinished = []
        self.most_unfinished = 0

    def host_buffer(self, num_bytes):
        self.allocated.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def start(self, host_BR):
        event = SlowCopy(self, host_BR, torch.full_like(host_BR, 255))
        self.unfinished.append(event)
        self.most_unfinished = max(self.most_unfinished, len(self.unfinished))
        return event.there, event

    def hand_over(self, packed_BR, event):
        assert event.there is packed_BR
        event.synchronize()


class SlowCopy:
    def __init__(self, lane, host, there):
        self.lane, self.host, self.there = lane, host, there

    def synchronize(self):
        if self in self.lane.unfinished:
            self.there.copy_(self.host)
            self.lane.unfinished.remove(self)


def batch_of(number, rows):
    return torch.full((rows, 8), number % 251, dtype=torch.uint8)


@given(sizes=st.lists(st.integers(0, 9), max_size=12), size=st.integers(1, 4))
def test_the_ring_hands_on_every_batch_as_it_was(sizes, size):
    """All held until the end: nothing is overwritten, and the order stays."""
    lane = SlowLane()

    out = list(Ring(lane, size)(batch_of(i, rows) for i, rows in enumerate(sizes)))

    assert len(out) == len(sizes)
    for i, (rows, packed) in enumerate(zip(sizes, out, strict=True)):
        assert torch.equal(packed, batch_of(i, rows))
    assert not lane.unfinished
    assert lane.most_unfinished <= size


def test_the_ring_keeps_to_its_buffers_over_passes():
    lane = SlowLane()
    ring = Ring(lane, 2)
    for _ in range(3):
        assert len(list(ring(batch_of(i, 5) for i in range(7)))) == 7

    assert lane.allocated == [40, 40]


def test_the_next_batch_is_under_way_while_one_is_used():
    lane = SlowLane()
    read = []
    batches = Ring(lane, 2)(read.append(i) or batch_of(i, 5) for i in range(5))

    next(batches)

    assert read == [0, 1]
    assert len(lane.unfinished) == 1
    batches.close()


def test_a_buffer_is_not_filled_before_its_copy_is_over():
    """The consumer's stream waits on the device, not here: the ring itself must wait."""

    class DeviceWaits(SlowLane):
        def hand_over(self, packed_BR, event):
            pass  # as on a GPU: the copy may still be under way

    lane = DeviceWaits()
    out = list(Ring(lane, 2)(batch_of(i, 5) for i in range(6)))

    assert [int(packed[0, 0]) for packed in out] == list(range(6))


def test_what_the_source_raises_comes_after_the_batches_before_it():
    def source():
        yield batch_of(0, 5)
        yield batch_of(1, 5)
        raise ConfigError("no more")

    lane = SlowLane()
    batches = Ring(lane, 2)(source())

    assert [int(next(batches)[0, 0]) for _ in range(2)] == [0, 1]
    with pytest.raises(ConfigError, match="no more"):
        next(batches)
    assert not lane.unfinished


def test_a_consumer_that_stops_leaves_nothing_running(folder):
    """No copy under way, no reading thread."""
    lane = SlowLane()
    batches = loader(BatchStream(folder, batch_size=33), read_ahead=2)
    for _ in batches.through(Ring(lane, 2)):
        assert lane.unfinished
        break
    gc.collect()

    assert not lane.unfinished
    assert not [t for t in threading.enumerate() if t.name == "read-ahead"]
    assert batches.stream.position == Position(0, 1)


def test_the_ring_gives_the_batches_of_the_stream_and_counts_those_handed_out(folder):
    stream, plain = BatchStream(folder, batch_size=33), BatchStream(folder, batch_size=33)
    for number, (a, b) in enumerate(
        zip(loader(stream).through(Ring(SlowLane(), 2)), plain, strict=True), start=1
    ):
        assert same(a, b)
        assert stream.position == (Position(0, number) if number < len(plain) else Position(1, 0))


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("mode", ["plain", "prefetch", "resident"])
def test_batches_on_a_gpu_are_those_of_the_stream(folder, mode):
    """Two epochs, each batch used while later ones travel, and held to the end."""
    moved = to_device(loader(BatchStream(folder, batch_size=33)), "cuda", mode=mode)
    plain = BatchStream(folder, batch_size=33)
    for _ in range(2):
        there = list(moved)
        assert all(batch.numeric.is_cuda and batch.targets.is_cuda for batch in there)
        assert equal([batch.to("cpu") for batch in there], list(plain))


@pytest.mark.gpu
@cuda
def test_copies_run_beside_kernels_on_a_gpu():
    """In a profiler's trace most of the time of copies lies within that of kernels."""
    packed = [torch.randint(0, 255, (16_384, 2048), dtype=torch.uint8) for _ in range(4)]
    ring = Ring(CudaLane(torch.device("cuda")), 2)
    weights = torch.randn(4096, 4096, device="cuda")

    def work():
        for packed_BR in ring(packed[i % 4] for i in range(24)):
            x = packed_BR.float().mean()
            for _ in range(8):
                x = (weights @ weights).mean() + x

    work()  # allocates and warms up
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = {
        is_copy: [
            (e.time_range.start, e.time_range.end)
            for e in events
            if ("Memcpy HtoD" in e.name) == is_copy and e.time_range.end > e.time_range.start
        ]
        for is_copy in (True, False)
    }
    copied = sum(end - start for start, end in spans[True])
    beside = sum(
        max(0, min(end, stop) - max(start, begin))
        for start, end in spans[True]
        for begin, stop in spans[False]
    )

    assert len(spans[True]) >= 24
    assert beside > 0.7 * copied
