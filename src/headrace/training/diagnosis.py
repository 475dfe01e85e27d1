"""Which part of a training step binds: disk, decode, gather, copy, launch, arithmetic or memory.

A step waits for its batch, copies it to the device, and computes. The first two are timed as they
are. What computing is made of shows in how it grows: the loop's own update is timed at several
batch sizes and a line ``fixed + per_row · rows`` is laid through them.

- *fixed* is what a step costs however few rows it has. Part of it is the traffic of weights and
  optimiser (bytes counted, over the measured copy bandwidth): memory bandwidth. The rest is launch
  overhead: Python, the dispatcher, tiny operations.
- *per row* is work. It is split between arithmetic (matrix products) and memory bandwidth (all
  else) as the operations' own seconds grow between the smallest and the largest batch.

**The rule**: the stage with the most seconds of a step binds; of equal ones, the first in the order
of ``STAGES``. Its ceiling says whether the stage itself could be faster, not whether it binds.

**Proposals** come from the same lines, one setting changed at a time, and are checked by running
the changed loop beside the present one. Below a gain of 5 % nothing is proposed.
"""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from headrace.data.transfer import Mode
from headrace.errors import DataError, ResourceError
from headrace.memory import held_bytes
from headrace.training.ceilings import (
    Disk,
    clock,
    copy_bytes_per_s,
    fast_end,
    gemm_flops_per_s,
    read_disk,
    smallest_op_s,
    take_s,
    time_of,
    upload_bytes_per_s,
    waiter,
)
from headrace.training.device import RandomStream, torch_threads
from headrace.training.learner import Learner
from headrace.training.loop import training_update
from headrace.training.opwatch import OpCounts, watch
from headrace.training.params import TrainingParams

STAGES = (
    "disk",
    "decode",
    "host gather",
    "copy to device",
    "launch overhead",
    "arithmetic",
    "memory bandwidth",
)
MIN_GAIN = 1.05
_LEAST_BATCHES = 4
_MAX_BATCHES = 32  # read and read again, so that the second time nothing comes from the drive
_HELD_BATCHES = 4  # of each size, for the step
_ROUNDS = 9
_WATCHED = 7
_TURNS = 5
_STEPS = 6  # of a turn
_INDEX_BYTES = 8  # of a row number, which is all that travels to a resident set
_STREAM = 99  # name of the random stream; a training run has its own

Field = Literal["batch_rows", "threads", "workers", "transfer"]
HARMLESS: tuple[Field, ...] = ("workers", "transfer")  # they leave the weights as they are


class Diagnosable(Learner, Protocol):
    """A learner that says how large its batches and its table are, and lets go of its readers."""

    batch_rows: int
    num_rows: int

    def close(self) -> None:
        """End the processes that read."""


@dataclass(frozen=True)
class Setting:
    """The settings of the loop that set its speed."""

    batch_rows: int | None
    threads: int
    workers: int
    transfer: Mode = "auto"


OpenLearner = Callable[[Setting], Diagnosable]


@dataclass(frozen=True)
class Line:
    """Something that costs ``fixed + per_row · rows``."""

    fixed: float
    per_row: float

    def at(self, num_rows: float) -> float:
        """Return the cost of ``num_rows``."""
        return self.fixed + self.per_row * num_rows

    def times(self, factor: float) -> "Line":
        """Return a line ``factor`` times as high."""
        return Line(self.fixed * factor, self.per_row * factor)


@dataclass(frozen=True)
class Stage:
    """One part of a step: its seconds, and those at the measured ceiling, if it has one."""

    name: str
    seconds: float
    ceiling_s: float | None = None
    ceiling: str = ""  # the ceiling itself, with its unit
    note: str = ""

    @property
    def reach(self) -> float | None:
        """Share of its ceiling that the stage reaches."""
        if self.ceiling_s is None or self.seconds <= 0:
            return None
        return self.ceiling_s / self.seconds


@dataclass(frozen=True)
class Costs:
    """Seconds per batch that the loop waits for data, copies to the device, and computes."""

    wait: Line
    copy: Line
    step: Line

    def seconds(self, num_rows: float) -> float:
        """Return the seconds of a step of ``num_rows``."""
        return self.wait.at(num_rows) + self.copy.at(num_rows) + self.step.at(num_rows)

    def rate(self, num_rows: float) -> float:
        """Return rows per second."""
        return num_rows / self.seconds(num_rows)


@dataclass(frozen=True)
class Proposal:
    """One setting to change, and by what factor the rows per second should rise."""

    field: Field
    setting: Setting
    gain: float


@dataclass(frozen=True)
class Check:
    """A proposal after it was run beside the present setting; rates in rows per second."""

    proposal: Proposal
    rate_now: float
    rate_then: float

    @property
    def predicted(self) -> float:
        """The rate that was foretold."""
        return self.rate_now * self.proposal.gain

    @property
    def error(self) -> float:
        """How much the prediction was too high (or, below 0, too low), relative to the run."""
        return self.predicted / self.rate_then - 1


@dataclass(frozen=True)
class Peak:
    """The peak of a step over rows: ``line``, but ``floor`` at least (the optimiser's share)."""

    floor: float
    line: Line

    def at(self, num_rows: float) -> float:
        """Return the peak bytes of ``num_rows``."""
        return max(self.floor, self.line.at(num_rows))


@dataclass(frozen=True)
class Memory:
    """What a step holds, foretold from small batches (the smallest-subset method).

    ``peak_bytes``: of the tensors that a step makes, at the present batch. ``step``: that peak over
    rows, fitted on the smaller batches; ``tried_rows`` is the largest batch that was tried, and
    ``tried_bytes`` what was measured there. ``held_bytes``: this process with the learner and its
    optimiser, on the host. Device figures are those of torch's allocator.
    """

    peak_bytes: int
    step: Peak
    tried_rows: int
    tried_bytes: int
    row_bytes: int
    state_bytes: int  # weights, gradients, optimiser
    held_bytes: int
    around_bytes: int  # of other processes of a run
    budget_bytes: int
    device_peak_bytes: int | None = None
    device_reserved_bytes: int | None = None
    device_total_bytes: int | None = None

    @property
    def error(self) -> float:
        """How much the foretold peak was too high at ``tried_rows``, relative to the measured."""
        return self.step.at(self.tried_rows) / max(1, self.tried_bytes) - 1

    @property
    def most_rows(self) -> int:
        """The largest batch that fits the budget (or the device, if that is tighter)."""
        room = self.budget_bytes - self.around_bytes - self.held_bytes
        if self.device_total_bytes is not None and self.device_peak_bytes is not None:
            room = int(0.9 * self.device_total_bytes) - self.state_bytes
        # A batch is held twice while the next one is read.
        line = self.step.line
        return max(0, int((room - line.fixed) / max(1.0, line.per_row + 2 * self.row_bytes)))


@dataclass(frozen=True)
class Diagnosis:
    """Where the time of a training step goes, and what to change."""

    setting: Setting
    device: str
    num_rows: int
    stages: tuple[Stage, ...]
    costs: Costs
    double: float  # seconds of a step with twice the rows, over those of this one
    num_ops: int  # per step
    num_kernels: int | None  # launched per step, on CUDA
    proposals: tuple[Proposal, ...]  # best first
    memory: Memory
    check: Check | None = None

    @property
    def seconds(self) -> float:
        """Seconds of one step."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def binding(self) -> Stage:
        """The stage that binds."""
        return binding(self.stages)


def diagnose(
    open_learner: OpenLearner,
    setting: Setting,
    params: TrainingParams,
    *,
    device: torch.device,
    files: Sequence[Path] = (),
    budget_bytes: int,
    around_bytes: int = 0,
    cores: int,
    check: bool = True,
    seconds: float = 0.3,
    disk: Disk | None = None,
    copy: Callable[[Any], Any] | None = None,
    arrives: bool = False,
    travels: Callable[[Any], Mode] | None = None,
) -> Diagnosis:
    """Measure the loop at ``setting``; say what binds, what to change, and what that brings.

    Args:
        open_learner: makes a learner of other settings; its batches come in a fixed order.
        setting: the present settings.
        params: of the loop's update.
        device: where the network computes.
        files: what the batches are read from, to look at the drive.
        budget_bytes: of the whole run.
        around_bytes: what the other processes of a run hold.
        cores: that this process may use.
        check: run the best proposal beside the present setting.
        seconds: for one measurement; there are about twenty.
        disk: what is known of the drive, instead of measuring it.
        copy: brings a batch to the device; None where the batch is used where it is.
        arrives: the learner's batches are on the device already, so waiting includes the copy.
        travels: says how the batches of a learner reach the device; None where they do not travel.

    Raises:
        DataError: if the table has fewer than four rows to learn from.
    """
    disk = disk or read_disk(files)
    stream = RandomStream(params.seed, _STREAM, device=device)
    with torch_threads(setting.threads), stream.lent(), closing(open_learner(setting)) as learner:
        if learner.num_rows < 4:
            raise DataError(f"{learner.num_rows} rows to learn from are too few to measure a step")
        setting = replace(setting, batch_rows=learner.batch_rows)
        lab = _Lab(open_learner, setting, params, device, learner, copy, arrives, travels, seconds)
        lab.measure()
        found = lab.diagnosis(
            disk, budget_bytes, around_bytes, sum(f.stat().st_size for f in files)
        )
        found = replace(found, proposals=proposals(lab.alternatives(found, cores), found))
        if check and found.proposals:
            found = replace(found, check=lab.check(found.proposals[0], is_cold=disk.fits < 1))
    return found


def fit_line(points: Mapping[int, float]) -> Line:
    """Return the line through (rows, cost) with the least squared relative errors.

    Neither part is below 0: a line that falls is level, one that begins below 0 begins at 0.

    >>> fit_line({100: 3.0, 200: 4.0, 400: 6.0})
    Line(fixed=2.0, per_row=0.01)
    """
    weight = {rows: 1 / max(cost, 1e-12) ** 2 for rows, cost in points.items()}
    total = sum(weight.values())
    mean_x = sum(weight[x] * x for x in points) / total
    mean_y = sum(weight[x] * y for x, y in points.items()) / total
    spread = sum(weight[x] * (x - mean_x) ** 2 for x in points)
    if not spread:
        return Line(0.0, mean_y / mean_x)
    slope = sum(weight[x] * (x - mean_x) * (y - mean_y) for x, y in points.items()) / spread
    if slope <= 0:
        return Line(mean_y, 0.0)
    if slope * mean_x > mean_y:
        squares = sum(weight[x] * x * x for x in points)
        return Line(0.0, sum(weight[x] * x * y for x, y in points.items()) / squares)
    return Line(_tidy(mean_y - slope * mean_x), _tidy(slope))


def fit_peak(points: Mapping[int, float]) -> Peak:
    """Return how the peak bytes of a step grow, from (rows, bytes) of small batches.

    Either a line, or level where the optimiser needs most and then in proportion to the rows;
    whichever is nearer, and of equals the second, which foretells more.

    >>> fit_peak({16: 500.0, 32: 500.0, 64: 640.0}).at(128)
    1280.0
    """
    most = max(points)
    level = Peak(min(points.values()), Line(0.0, points[most] / most))
    sloped = Peak(0.0, fit_line(points))

    def error(peak: Peak) -> float:
        return sum((peak.at(rows) / max(1.0, seen) - 1) ** 2 for rows, seen in points.items())

    return sloped if error(sloped) < error(level) - 1e-9 else level


def binding(stages: Sequence[Stage]) -> Stage:
    """Return the stage with the most seconds; of equal ones the first."""
    return max(stages, key=lambda stage: stage.seconds)


def split_step(
    seconds: float,
    step: Line,
    *,
    least_s: float,
    fixed_memory_s: float,
    arithmetic_share: float,
    least_arithmetic_s: float,
) -> tuple[float, float, float]:
    """Return the seconds of launch overhead, arithmetic and memory bandwidth in one update.

    ``seconds`` is the update as measured, ``step`` its line over rows; ``least_s`` what its
    operations take if they do nothing, below which no overhead is believed; ``fixed_memory_s`` what
    the weights' traffic takes; ``arithmetic_share`` that of matrix products in the work per row,
    which take ``least_arithmetic_s`` at the measured peak.
    """
    fixed = min(max(step.fixed, least_s), seconds)
    traffic = min(fixed_memory_s, max(0.0, fixed - least_s))
    work = seconds - fixed
    arithmetic = min(max(work * arithmetic_share, least_arithmetic_s), work)
    return fixed - traffic, arithmetic, traffic + work - arithmetic


def with_transfer(
    mode: Mode,
    costs: Costs,
    *,
    num_rows: int,
    row_bytes: int,
    upload_bytes_per_s: float,
    host_bytes_per_s: float,
    device_bytes_per_s: float,
) -> Costs:
    """Return what is left of ``costs``, those of plain copies, when batches travel as ``mode``.

    ``prefetch``: rows are copied once more on the host, into page-locked memory, and then travel
    beside the step; what takes longer than the step is waited for. ``resident``: row numbers
    travel, and the device gathers; nothing is read on the host. Rates of copies within a memory
    count bytes read and written.
    """
    if mode == "prefetch":
        staged = 2 * row_bytes / host_bytes_per_s
        beyond = num_rows * row_bytes / upload_bytes_per_s - costs.step.at(num_rows)
        wait = Line(costs.wait.fixed, costs.wait.per_row + staged)
        return replace(costs, wait=wait, copy=Line(0.0, max(0.0, beyond) / num_rows))
    gathered = _INDEX_BYTES / upload_bytes_per_s + 2 * row_bytes / device_bytes_per_s
    return replace(costs, wait=Line(0.0, 0.0), copy=Line(0.0, gathered))


def proposals(
    alternatives: Iterable[tuple[Field, Setting, Costs]], found: Diagnosis
) -> tuple[Proposal, ...]:
    """Return what is worth a change, best first; what leaves the weights alone goes first if near.

    A batch size is taken as it is in ``Setting``. Of two batch sizes the larger one must gain
    another 5 %, for it takes more memory and fewer updates.
    """
    now = found.costs.rate(found.setting.batch_rows or 0)
    best: dict[Field, Proposal] = {}
    for field, setting, costs in alternatives:
        gain = costs.rate(setting.batch_rows or 0) / now
        if gain >= MIN_GAIN * (best[field].gain if field in best else 1.0):
            best[field] = Proposal(field, setting, gain)
    order = sorted(best.values(), key=lambda one: one.gain, reverse=True)
    harmless = [one for one in order if one.field in HARMLESS]
    if harmless and harmless[0].gain * MIN_GAIN >= order[0].gain:
        order.remove(harmless[0])
        order.insert(0, harmless[0])
    return tuple(order)


def batch_sizes(batch_rows: int, num_rows: int) -> tuple[int, ...]:
    """Return the sizes at which a step is timed: a quarter, half, one and two batches.

    >>> batch_sizes(256, 10_000), batch_sizes(256, 300)
    ((64, 128, 256, 512), (64, 128, 256, 300))
    """
    rows = min(batch_rows, num_rows)
    wanted = {max(2, rows // 4), max(2, rows // 2), rows, min(2 * rows, num_rows)}
    return tuple(sorted(wanted))


class _Lab:
    """The learner on the bench: what was measured of it, and how."""

    def __init__(
        self,
        open_learner: OpenLearner,
        setting: Setting,
        params: TrainingParams,
        device: torch.device,
        learner: Diagnosable,
        copy: Callable[[Any], Any] | None,
        arrives: bool,
        travels: Callable[[Any], Mode] | None,
        seconds: float,
    ) -> None:
        self._open = open_learner
        self._setting = setting
        self._params = params
        self._device = device
        self._learner = learner
        self._copy = copy
        self._arrives = arrives
        self._travels = travels
        self._seconds = seconds
        self._wait = waiter(device)
        learner.network.train()
        self._update = training_update(learner, params)
        self.rows = min(learner.batch_rows, learner.num_rows)
        self.sizes = batch_sizes(learner.batch_rows, learner.num_rows)
        self._touched = 0  # rows at the start of the order that were read
        self._held: dict[int, list[Any]] = {}

    def measure(self) -> None:
        """Time reading, copying and computing at every size, and watch one step."""
        read = {size: self._read(size) for size in self.sizes}
        self.read = fit_line(read)
        self.row_bytes = sum(
            t.numel() * t.element_size() for t in _tensors(self._held[self.rows][0])
        )
        self.row_bytes //= self.rows
        self.copy_seconds = self._copies()
        if self._copy is not None and not self._arrives:
            copy = self._copy
            self._held = {
                size: [copy(batch) for batch in batches] for size, batches in self._held.items()
            }
        self.updates = self._time_updates(self._held)
        self.step = fit_line(self.updates)
        self.wait_s = self._waiting(
            self._loop(self._learner, self._update, self._setting, is_cold=False)
        )
        if self._arrives:  # what it waits for is first the copy, then the reading behind it
            self.copy_seconds = min(self.copy_seconds, self.wait_s)
            self.wait_s -= self.copy_seconds
        self.counts = {size: self._watched(size) for size in self.sizes}
        self.tried = min(4 * self.rows, self._learner.num_rows)
        self.tried_bytes = self._peak_of(self.tried)

    def diagnosis(
        self, disk: Disk, budget_bytes: int, around_bytes: int, set_bytes: int
    ) -> Diagnosis:
        """Put the figures together; proposals and check come later."""
        rows = self.rows
        disk_s = _disk_s(disk, self.row_bytes) * rows
        stages = (
            self._disk_stage(disk, disk_s),
            Stage("decode", 0.0, note="none: shards are decoded"),
            self._gather_stage(set_bytes),
            self._copy_stage(),
            *self._step_stages(),
        )
        waiting = self.read.times(self.wait_s / max(1e-12, self.read.at(rows)))
        waiting = Line(waiting.fixed, waiting.per_row + disk_s / rows)
        copying = Line(0.0, self.copy_seconds / rows)
        top = self.sizes[-1]
        return Diagnosis(
            setting=self._setting,
            device=self._device.type,
            num_rows=self._learner.num_rows,
            stages=stages,
            costs=Costs(waiting, copying, self.step),
            double=self.step.at(2 * rows) / self.step.at(rows)
            if top < 2 * rows
            else self.updates[top] / self.updates[rows],
            num_ops=self.counts[rows].num_ops,
            num_kernels=self._kernels(),
            proposals=(),
            memory=self._memory(budget_bytes, around_bytes),
        )

    def alternatives(self, found: Diagnosis, cores: int) -> Iterator[tuple[Field, Setting, Costs]]:
        """Yield the settings that could be changed, with what a step would cost."""
        now, costs, rows = self._setting, found.costs, self.rows
        most = min(self._learner.num_rows // 2, found.memory.most_rows)
        for factor in (2, 4):
            if factor * rows <= most:
                yield "batch_rows", replace(now, batch_rows=factor * rows), costs
        if self._device.type == "cpu":
            for threads in (2 * now.threads, 4 * now.threads, now.threads // 2):
                if 1 <= threads <= cores:
                    yield (
                        "threads",
                        replace(now, threads=threads),
                        self._with_threads(threads, costs),
                    )
        step_s, wait_s, copy_s = costs.seconds(rows), costs.wait.at(rows), costs.copy.at(rows)
        if now.workers == 0 and _could_gain(wait_s, step_s) and cores > now.threads:
            with suppress(ResourceError):  # where none can start here, none is proposed
                yield "workers", replace(now, workers=1), self._with_worker(costs)
        if self._travels and copy_s and _could_gain(wait_s + copy_s, step_s):
            mode = self._quicker_transfer(self._travels)
            if mode is not None:
                yield "transfer", replace(now, transfer=mode), self._with_transfer(mode, costs)

    def check(self, proposal: Proposal, *, is_cold: bool) -> Check:
        """Run the loop with the present and with the proposed setting, in turns."""
        with closing(self._open(proposal.setting)) as learner:
            learner.network.train()
            now = self._loop(self._learner, self._update, self._setting, is_cold)
            then = self._loop(
                learner, training_update(learner, self._params), proposal.setting, is_cold
            )
            rates: tuple[list[float], list[float]] = ([], [])
            began, turn = time.perf_counter(), 0
            while turn < _TURNS or time.perf_counter() - began < 10 * self._seconds:
                for side, loop in enumerate((now, then)):
                    rates[side].append(loop.turn().seconds_per_row)
                turn += 1
        return Check(proposal, 1 / fast_end(rates[0]), 1 / fast_end(rates[1]))

    def _read(self, size: int) -> float:
        """Seconds of the stream alone per batch of ``size``, once its rows were touched."""
        with closing(self._open(replace(self._setting, batch_rows=size, workers=0))) as learner:
            limit, began = 0, time.perf_counter()
            self._held[size] = held = []
            for batch in itertools.islice(learner.batches(0, used=0), learner.num_rows // size):
                limit += 1
                if limit <= _HELD_BATCHES:
                    held.append(batch)
                spent = time.perf_counter() - began
                if limit == _MAX_BATCHES or (limit >= _LEAST_BATCHES and spent > self._seconds):
                    break
            self._touched = max(self._touched, limit * size)
            seconds: list[float] = []
            began = time.perf_counter()
            while not seconds or time.perf_counter() - began < self._seconds:
                seconds += _gaps(itertools.islice(learner.batches(0, used=0), limit))
        return fast_end(seconds)

    def _copies(self) -> float:
        if self._copy is None:
            return 0.0
        copy, batch = self._copy, self._held[self.rows][0]
        if self._arrives:
            batch = batch.to("cpu")
        return time_of(lambda: copy(batch), budget_s=self._seconds, wait=self._wait)

    def _time_updates(self, held: Mapping[int, Sequence[Any]]) -> dict[int, float]:
        """Seconds of an update at every size, undisturbed; the sizes take turns."""
        seconds: dict[int, list[float]] = {size: [] for size in held}
        began, turn = time.perf_counter(), 0
        while turn <= _ROUNDS or time.perf_counter() - began < self._seconds * len(held):
            for size, batches in held.items():
                start = clock()
                self._update(batches[turn % len(batches)])
                self._wait()
                if turn:  # the first one makes the optimiser's state
                    seconds[size].append(clock() - start)
            turn += 1
        return {size: fast_end(values) for size, values in seconds.items()}

    def _loop(
        self,
        learner: Diagnosable,
        update: Callable[[Any], object],
        setting: Setting,
        is_cold: bool = True,
    ) -> "_Loop":
        """The loop over rows that were read before, unless ``is_cold`` or workers read ahead."""
        rows = min(learner.batch_rows, learner.num_rows)
        limit = None if setting.workers or is_cold else max(1, self._touched // rows)
        return _Loop(learner, update, setting, limit, self._wait)

    def _waiting(self, loop: "_Loop") -> float:
        """Seconds that a loop waits for a batch, on average over its quiet turns."""
        waits: list[float] = []
        began = time.perf_counter()
        while len(waits) < _TURNS or time.perf_counter() - began < 3 * self._seconds:
            waits.append(loop.turn().wait_s)
        return fast_end(waits)

    def _watched(self, size: int) -> OpCounts:
        """Operations of one update; of each, the seconds of the quickest of some tries."""
        batch = self._held[size][0]
        tries = [watch(lambda: self._update(batch), wait=self._wait)[0] for _ in range(_WATCHED)]
        return replace(
            tries[0],
            arithmetic_s=_least([one.arithmetic_s for one in tries]),
            other_s=_least([one.other_s for one in tries]),
        )

    def _peak_of(self, size: int) -> int:
        """Peak bytes of one update with ``size`` rows."""
        with closing(self._open(replace(self._setting, batch_rows=size, workers=0))) as learner:
            batch = next(iter(learner.batches(0, used=0)))
        if self._copy is not None and not self._arrives:
            batch = self._copy(batch)
        return watch(lambda: self._update(batch), wait=self._wait)[0].peak_bytes

    def _kernels(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return kernel_launches(lambda: self._update(self._held[self.rows][0]))

    def _disk_stage(self, disk: Disk, seconds: float) -> Stage:
        if disk.bytes_per_s is None:
            return Stage("disk", seconds, note="not measured on this system")
        if disk.fits < 1:
            note = f"memory can keep {disk.fits:.0%}"
        elif disk.cached is None or disk.cached == 1:
            note = "all in memory"
        else:
            note = f"{disk.cached:.0%} in memory, all after an epoch"
        return Stage(
            "disk",
            seconds,
            ceiling_s=(1 - disk.fits) * self.row_bytes * self.rows / disk.bytes_per_s,
            ceiling=_rate_text(disk.bytes_per_s),
            note=note,
        )

    def _gather_stage(self, set_bytes: int) -> Stage:
        best = take_s(
            self.rows,
            self.row_bytes,
            of_bytes=set_bytes or self._learner.num_rows * self.row_bytes,
            budget_s=self._seconds,
        )
        workers = self._setting.workers
        return Stage(
            "host gather",
            self.wait_s,
            ceiling_s=None if workers else best,
            ceiling=_rate_text(self.rows * self.row_bytes / best),
            note="behind workers" if workers else "ceiling: np.take",
        )

    def _copy_stage(self) -> Stage:
        if self._copy is None:
            told = "none on cpu" if self._device.type == "cpu" else "not told from the step here"
            return Stage("copy to device", 0.0, note=told)
        rate = upload_bytes_per_s(self._device, budget_s=self._seconds)
        return Stage(
            "copy to device",
            self.copy_seconds,
            ceiling_s=self.rows * self.row_bytes / rate,
            ceiling=_rate_text(rate),
            note=self._travels(self._learner) if self._travels else "",
        )

    def _step_stages(self) -> tuple[Stage, Stage, Stage]:
        device, budget_s = self._device, self._seconds
        bandwidth = copy_bytes_per_s(device, budget_s=budget_s)
        peak = gemm_flops_per_s(device, budget_s=budget_s)
        least_s = smallest_op_s(device, budget_s=budget_s)
        counts, low, high = (
            self.counts[size] for size in (self.rows, self.sizes[0], self.sizes[-1])
        )
        moved = fit_line({size: float(one.moved_bytes) for size, one in self.counts.items()})
        overhead, arithmetic, memory = split_step(
            self.updates[self.rows],
            self.step,
            least_s=counts.num_ops * least_s,
            fixed_memory_s=moved.fixed / bandwidth,
            arithmetic_share=arithmetic_share(low, high),
            least_arithmetic_s=counts.flops / peak,
        )
        return (
            Stage(
                "launch overhead",
                overhead,
                ceiling_s=counts.num_ops * least_s,
                ceiling=f"{1e6 * least_s:.2g} µs each",
                note=f"{counts.num_ops} operations",
            ),
            Stage(
                "arithmetic",
                arithmetic,
                ceiling_s=counts.flops / peak,
                ceiling=f"{peak / 1e9:.3g} GFLOP/s",
                note=f"{counts.flops / 1e6:.3g} MFLOP",
            ),
            Stage(
                "memory bandwidth",
                memory,
                ceiling_s=counts.moved_bytes / bandwidth,
                ceiling=_rate_text(bandwidth),
                note=_heaviest(counts.other_s),
            ),
        )

    def _with_threads(self, threads: int, costs: Costs) -> Costs:
        """The step timed with other threads, at two sizes."""
        ends = {size: self._held[size] for size in (self.sizes[0], self.rows)}
        with torch_threads(threads):
            others = self._time_updates(ends)
        here = self._time_updates(ends)  # beside it, for the machine may have become busier
        return replace(costs, step=costs.step.times(others[self.rows] / here[self.rows]))

    def _with_worker(self, costs: Costs) -> Costs:
        """What is left to wait for when a worker reads while the loop is busy for a step."""
        rest = costs.copy.at(self.rows) + costs.step.at(self.rows)
        setting = replace(self._setting, workers=1)
        with closing(self._open(setting)) as learner:
            wait = self._waiting(self._loop(learner, lambda _: time.sleep(rest), setting))
        return replace(costs, wait=Line(0.0, wait / self.rows))

    def _quicker_transfer(self, travels: Callable[[Any], Mode]) -> Mode | None:
        """What ``auto`` would choose here, if batches travel plainly and it would not."""
        if travels(self._learner) != "plain":
            return None
        with closing(self._open(replace(self._setting, transfer="auto"))) as learner:
            mode = travels(learner)
        return None if mode == "plain" else mode

    def _with_transfer(self, mode: Mode, costs: Costs) -> Costs:
        budget_s = self._seconds
        return with_transfer(
            mode,
            costs,
            num_rows=self.rows,
            row_bytes=self.row_bytes,
            upload_bytes_per_s=upload_bytes_per_s(self._device, budget_s=budget_s),
            host_bytes_per_s=copy_bytes_per_s(torch.device("cpu"), budget_s=budget_s),
            device_bytes_per_s=copy_bytes_per_s(self._device, budget_s=budget_s),
        )

    def _memory(self, budget_bytes: int, around_bytes: int) -> Memory:
        small = [size for size in self.sizes if size < self.tried] or [self.tried]
        device: dict[str, int] = {}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._update(self._held[self.rows][0])
            self._wait()
            device = {
                "device_peak_bytes": torch.cuda.max_memory_allocated(self._device),
                "device_reserved_bytes": torch.cuda.max_memory_reserved(self._device),
                "device_total_bytes": torch.cuda.get_device_properties(self._device).total_memory,
            }
        weights = sum(p.numel() * p.element_size() for p in self._learner.network.parameters())
        return Memory(
            peak_bytes=self.counts[self.rows].peak_bytes,
            step=fit_peak({size: float(self.counts[size].peak_bytes) for size in small}),
            tried_rows=self.tried,
            tried_bytes=self.tried_bytes,
            row_bytes=self.row_bytes,
            state_bytes=4 * weights,  # weights, gradients, two moments of AdamW
            held_bytes=held_bytes(os.getpid()),
            around_bytes=around_bytes,
            budget_bytes=budget_bytes,
            **device,
        )


@dataclass(frozen=True)
class _Turn:
    """A few steps of the loop: seconds per row, and of them per batch those of waiting for it."""

    seconds_per_row: float
    wait_s: float


class _Loop:
    """The training loop without what comes around it, some steps at a time."""

    def __init__(
        self,
        learner: Diagnosable,
        update: Callable[[Any], object],
        setting: Setting,
        limit: int | None,
        wait: Callable[[], object],
    ) -> None:
        self._update = update
        self._setting = setting
        self._wait = wait
        passes = (itertools.islice(learner.batches(0, used=0), limit) for _ in itertools.count())
        self._batches = itertools.chain.from_iterable(passes)

    def turn(self) -> _Turn:
        """Take a few steps and time them; what was read ahead in between does not count."""
        workers = self._setting.workers
        num_steps = max(_STEPS, 4 * workers)
        num_rows, waited = 0, 0.0
        with torch_threads(self._setting.threads):
            for _ in range(1 + 2 * workers):
                self._update(next(self._batches))
            self._wait()
            began = clock()
            for _ in range(num_steps):
                start = clock()
                batch = next(self._batches)
                waited += clock() - start
                self._update(batch)
                num_rows += len(batch.row_id)
            self._wait()
            spent = clock() - began
        return _Turn(spent / num_rows, waited / num_steps)


def arithmetic_share(small: OpCounts, large: OpCounts) -> float:
    """Return the share of matrix products in what a step takes longer with more rows."""
    arithmetic = max(0.0, _total(large.arithmetic_s) - _total(small.arithmetic_s))
    other = max(0.0, _total(large.other_s) - _total(small.other_s))
    if arithmetic + other <= 0:  # no more work with more rows
        arithmetic, other = _total(large.arithmetic_s), _total(large.other_s)
    return arithmetic / max(1e-12, arithmetic + other)


def kernel_launches(work: Callable[[], object]) -> int:
    """Return how many kernels ``work`` launches on CUDA, a replayed graph being one launch."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        work()
        torch.cuda.synchronize()
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaGraphLaunch")
    return sum(event.count for event in trace.key_averages() if event.key.startswith(names))


def _could_gain(spared_s: float, step_s: float) -> bool:
    """Whether a step without ``spared_s`` would bring what a proposal must."""
    return spared_s * MIN_GAIN > step_s * (MIN_GAIN - 1)


def _disk_s(disk: Disk, row_bytes: int) -> float:
    """Seconds per row until its pages have come from the drive; exact order reads row by row."""
    if disk.page_s is None:
        return 0.0
    return (1 - disk.fits) * disk.page_s * (1 + row_bytes // 4096)


def _gaps(batches: Iterable[Any]) -> list[float]:
    """Seconds between batches; the first, which opens the pass, counts only if it is alone."""
    seconds: list[float] = []
    start = clock()
    for _ in batches:
        now = clock()
        seconds.append(now - start)
        start = clock()
    return seconds[1:] or seconds


def _tensors(batch: Any) -> list[torch.Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


def _least(tries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: min(one.get(name, math.inf) for one in tries) for name in tries[0]}


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _heaviest(seconds: Mapping[str, float]) -> str:
    if not seconds:
        return ""
    name = max(seconds, key=lambda one: seconds[one])
    return f"{seconds[name] / _total(seconds):.0%} {name.strip('_')}"


def _rate_text(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.3g} GB/s"


def _tidy(value: float) -> float:
    """Without the last digits, which are those of the sums."""
    return float(f"{value:.12g}")
