"""A training run that is killed again and again, and what it must still come to.

A life is a process of its own that trains a small network on encoded shards, from the newest
checkpoint to the end. It writes down every batch it learns from before the next; so the order of
rows over all lives can be compared with that of a run nobody disturbed. Most lives end early:

- ``kill``: SIGKILL from outside, at a random moment some steps after the life began;
- ``save``: SIGKILL from within, while a checkpoint is written: at a random call of fsync or rename;
- ``term``: SIGTERM or SIGINT from outside; a checkpoint is written and nothing may be lost.

Checkpoints are due by a clock that counts batches, so lost work is exact whatever else the machine
does. Processes are forked from a server that has loaded torch and has not trained: a life costs a
fraction of a second.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import nn

from headrace.data.stream import Batch, BatchStream
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.stages.encode import EncodeParams, encode
from headrace.storage import digest_file
from headrace.training.checkpoint import Checkpoints
from headrace.training.device import RandomStream, torch_threads
from headrace.training.distributed import ALONE
from headrace.training.learner import Losses, LossMeans, Validation
from headrace.training.loop import train_network
from headrace.training.params import TrainingParams
from tests.encode_tables import write_table

INTERVAL = 7  # batches between checkpoints
BATCH_ROWS = 32
NUM_ROWS = 1500
_WEIGHTS = "weights.safetensors"
_LIFE_S = 120.0
_MOST_BATCHES = 12 * INTERVAL  # that a life which is to end learns from
_CPU = torch.device("cpu")
Mark = tuple[int, tuple[int, ...]]  # a step, and the ids of the rows it learnt from


@dataclass(frozen=True)
class End:
    """How a life is to end: its kind, after how many batches, and a random number for the rest."""

    kind: str = "live"  # live, kill, save, term
    batches: int = 0
    seed: int = 0


@dataclass
class Drill:
    """What many lives came to, beside one undisturbed run."""

    undisturbed: list[Mark]
    lives: list[list[Mark]] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    is_bit_equal: bool = False

    @property
    def has_same_order(self) -> bool:
        """Whether every life learnt from the rows of the undisturbed order, without a gap."""
        done = 0
        for life in self.lives:
            if life and (life[0][0] > done or life != self.undisturbed[life[0][0] :][: len(life)]):
                return False
            done = max([done, *(step + 1 for step, _ in life)])
        return done == len(self.undisturbed)

    def lost(self, *kinds: str) -> list[int]:
        """Return the batches that the life after each end of ``kinds`` had to learn again."""
        found, reached = [], 0
        for number, (life, end) in enumerate(zip(self.lives, self.ends, strict=True)):
            reached = max([reached, *(step + 1 for step, _ in life)])
            later = [after[0][0] for after in self.lives[number + 1 :] if after]
            if end.kind in kinds and later:
                found.append(reached - later[0])
        return found

    def killed(self, *kinds: str) -> int:
        """How many lives ended before their time, by ``kinds``."""
        return sum(end.kind in kinds for end in self.ends)


def drill(folder: Path, *, kills: int, seed: int, kinds: tuple[str, ...]) -> Drill:
    """Train once in peace and once with ``kills`` ends of ``kinds`` in turn; compare."""
    rng = random.Random(seed)
    _encode(folder)
    epochs = 1 + kills * _MOST_BATCHES // (NUM_ROWS // BATCH_ROWS)
    calm = _live(folder, "calm", 0, epochs, End())
    found = Drill(_marks(folder, "calm", 0))
    assert calm == 0, "the undisturbed run failed"
    while True:
        life = len(found.lives)
        kind = kinds[life % len(kinds)] if life < kills else "live"
        end = End(kind, rng.randint(0, 8 * INTERVAL), rng.randrange(1 << 30))
        exit_code = _live(folder, "hunted", life, epochs, end)
        found.lives.append(_marks(folder, "hunted", life))
        found.ends.append(end)
        if kind == "live":
            assert exit_code == 0, f"the last life failed with {exit_code}"
            break
        assert exit_code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT), (end, exit_code)
    weights = [digest_file(folder / name / _WEIGHTS).digest for name in ("calm", "hunted")]
    found.is_bit_equal = weights[0] == weights[1]
    return found


class StepClock:
    """A clock that moves by one second a batch."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Learner:
    """A network with dropout and batch norm over encoded rows; notes every batch it learns from."""

    def __init__(self, encoded: Path, log: Path, clock: StepClock, end: End) -> None:
        self._stream = BatchStream(encoded, batch_size=BATCH_ROWS, seed=5)
        self._held_back = BatchStream(
            encoded, batch_size=BATCH_ROWS, order="sequential", rows=range(BATCH_ROWS)
        )
        with RandomStream(3, device=_CPU).lent():
            self.network: nn.Module = nn.Sequential(
                nn.Linear(2, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 1)
            )
        self.num_batches = len(self._stream)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._clock = clock
        self._end = end
        self._num_used = 0

    def batches(self, epoch: int, *, used: int) -> Iterator[Batch]:
        if used < self.num_batches:
            self._stream.set_position(epoch, used)
            for place, batch in enumerate(self._stream, start=used):
                self._note(epoch * self.num_batches + place, batch)
                yield batch

    def weights(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"y": torch.tensor(float(len(batch)))}

    def losses(self, batch: Batch) -> Losses:
        z_B = self.network(batch.numeric.nan_to_num())[:, 0]
        y_B = batch.targets[:, 0].float()
        return Losses(
            {"y": nn.functional.mse_loss(z_B, y_B, reduction="sum")},
            {"y": torch.tensor(float(len(batch)))},
            {"y": 1.0},
        )

    def validate(self) -> Validation:
        means = LossMeans({"y": 1.0})
        self._held_back.set_position(0)
        for batch in self._held_back:
            means.add(self.losses(batch))
        return Validation(means)

    def _note(self, step: int, batch: Batch) -> None:
        os.write(self._log, (json.dumps([step, batch.row_id.tolist()]) + "\n").encode())
        self._clock.now += 1.0
        if self._num_used == self._end.batches and self._end.kind == "save":
            _die_while_saving(self._end.seed)
        if self._num_used > self._end.batches and self._end.kind in ("kill", "term"):
            # Longer than a checkpoint, so that the signal seldom strikes in one; longer yet where
            # it is late, so that it still strikes.
            time.sleep(0.02 if self._num_used < _MOST_BATCHES else 0.2)
        self._num_used += 1


def _encode(folder: Path) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=NUM_ROWS), rng.normal(size=NUM_ROWS)
    write_table(
        folder / "reduce",
        {
            split: {"a": pa.array(a[:n]), "b": pa.array(b[:n]), "y": pa.array((a * b)[:n])}
            for split, n in {"train": NUM_ROWS, "valid": 20, "test": 20}.items()
        },
        roles={"a": "numeric", "b": "numeric", "y": "target"},
        targets=(Target(name="y", task="regression"),),
    )
    encode(
        folder / "reduce",
        folder / "encode",
        EncodeParams(shard_bytes=8000),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )


def _live(folder: Path, run: str, life: int, epochs: int, end: End) -> int:
    """Start a life, end it as ``end`` says, and return its exit code."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimiser loads it
    process = server.Process(target=_train, args=(folder, run, life, epochs, end))
    process.start()
    log = _log(folder, run, life)
    if end.kind in ("kill", "term"):
        rng = random.Random(end.seed)
        _wait_for(log, end.batches, process)
        time.sleep(rng.uniform(0, 0.04))
        number = signal.SIGKILL if end.kind == "kill" else rng.choice(_POLITE)
        os.kill(process.pid or 0, number)
    process.join(_LIFE_S)
    exit_code = process.exitcode
    if exit_code is None:
        process.kill()
        process.join()
        raise AssertionError(f"a life of kind {end.kind} did not end in {_LIFE_S:g} s")
    process.close()
    return exit_code


_POLITE = (signal.SIGTERM, signal.SIGINT)


def _train(folder: Path, run: str, life: int, epochs: int, end: End) -> None:
    """Be one life: train to the end, or until something ends it."""
    for number in _POLITE:
        signal.signal(number, signal.SIG_DFL)  # a forked process inherits those of its server
    home = folder / run
    home.mkdir(exist_ok=True)
    recorder, clock = MemoryRecorder(), StepClock()
    learner = Learner(folder / "encode", _log(folder, run, life), clock, end)
    with torch_threads(1):
        train_network(
            learner,
            TrainingParams(
                max_epochs=epochs,
                patience=epochs,
                warmup_steps=0,
                learning_rate=1e-3,
                checkpoint_minutes=INTERVAL / 60,
            ),
            stop_on="loss",
            stream=RandomStream(4, device=_CPU),
            checkpoints=Checkpoints(home / "checkpoints", signature="drill", recorder=recorder),
            recorder=recorder,
            ranks=ALONE,
            clock=clock,
        )
    save_file(dict(learner.network.state_dict()), home / _WEIGHTS)


def _die_while_saving(seed: int) -> None:
    """Let this process kill itself at one of the next calls that make a checkpoint durable."""
    calls_left = random.Random(seed).randrange(5)  # a save makes two fsyncs and two renames
    fsync, replace = os.fsync, Path.replace

    def die(*_: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def counted(call: Any) -> Any:
        def do(*args: Any) -> Any:
            nonlocal calls_left
            calls_left -= 1
            return die() if calls_left < 0 else call(*args)

        return do

    os.fsync = counted(fsync)
    Path.replace = counted(replace)  # type: ignore[method-assign]


def _log(folder: Path, run: str, life: int) -> Path:
    return folder / f"{run}-{life}.log"


def _marks(folder: Path, run: str, life: int) -> list[Mark]:
    path = _log(folder, run, life)
    lines = path.read_text().splitlines() if path.exists() else []
    return [(step, tuple(ids)) for step, ids in map(json.loads, lines)]


def _wait_for(log: Path, batches: int, process: Any) -> None:
    """Return when ``log`` has so many lines, or the life has ended."""
    until = time.monotonic() + _LIFE_S
    while process.is_alive() and time.monotonic() < until:
        if log.exists() and log.read_bytes().count(b"\n") > batches:
            return
        time.sleep(0.001)
