"""Resuming a killed training run: bits, order and lost work after many kills, and what it costs.

The kills are those of the tests (``tests/resume_case.py``): half strike at random moments, half
while a checkpoint is written. The cost is that of the default network (256-128, 24 numbers, 9
categories): the seconds spent inside ``save`` beside all others of the same run, at one checkpoint
a second, and from them at the default of one a minute. Runs with and without take turns.
"""

import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa

from benchmarks.harness import Row, measure, ratio_row
from headrace.data.table import open_table
from headrace.models.nn import NnParams, fit
from headrace.models.protocol import StopRows, TrainViews
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Role, Target
from headrace.stages.encode import EncodeParams, encode
from headrace.training.checkpoint import Checkpoints
from tests.encode_tables import write_table
from tests.resume_case import INTERVAL, drill

NUM_NUMBERS, NUM_CATEGORIES = 24, 9
NEVER, EVERY_SECOND = 1e6, 1 / 60  # minutes; the end of a run is saved in both
DEFAULT_S = 60 * NnParams().checkpoint_minutes
_TARGET = Target(name="y", task="regression")


def rows(quick: bool) -> list[Row]:
    """Return the figures of resuming."""
    with tempfile.TemporaryDirectory() as folder:
        return [*_kills(Path(folder) / "drill", quick), *_costs(Path(folder) / "cost", quick)]


def _kills(folder: Path, quick: bool) -> list[Row]:
    kills = 10 if quick else 30
    found = drill(folder / "kill", kills=kills, seed=0, kinds=("kill", "save"))
    is_same = found.is_bit_equal and found.has_same_order
    lost = found.lost("kill", "save")
    stopped = drill(folder / "term", kills=kills // 2, seed=1, kinds=("term",))
    return [
        Row(
            "resume: kills with order and weights as undisturbed",
            found.killed("kill", "save") if is_same else 0,
            f"of {kills}",
            must=kills,
            reference="SIGKILL at random moments, half of them while saving",
        ),
        Row(
            "resume: most work lost by a kill",
            max(lost) / INTERVAL,
            "intervals",
            goal=1.0,
            higher_is_better=False,
            reference=f"mean {sum(lost) / len(lost) / INTERVAL:.2f}",
        ),
        Row(
            "resume: most batches lost by SIGTERM or SIGINT",
            max(stopped.lost("term")),
            "batches",
            goal=0,
            higher_is_better=False,
            reference=f"{stopped.killed('term')} stops, bits equal: {stopped.is_bit_equal}",
        ),
    ]


def _costs(folder: Path, quick: bool) -> list[Row]:
    views = _views(folder, 40_000 if quick else 80_000)
    epochs = 3 if quick else 5
    saved: list[tuple[float, float]] = []  # wall and CPU seconds of each save of the last run
    calls = 0

    def train(minutes: float) -> tuple[float, float]:
        nonlocal calls
        calls += 1
        saved.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        with patch.object(Checkpoints, "save", _timed(saved)):
            fit(
                views,
                NnParams(max_epochs=epochs, patience=epochs, checkpoint_minutes=minutes),
                checkpoints=folder / f"checkpoints-{calls}",
                resources=Resources(),
                recorder=MemoryRecorder(),
            )
        return time.perf_counter() - wall, time.process_time() - cpu

    runs: list[tuple[list[tuple[float, float]], tuple[float, float]]] = []

    def with_checkpoints() -> None:
        total = train(EVERY_SECOND)
        runs.append((list(saved), total))

    timings = measure(
        {"no checkpoint": lambda: train(NEVER), "one a second": with_checkpoints},
        2 if quick else 3,
    )
    ratio = ratio_row("", timings["one a second"], timings["no checkpoint"])
    result = []
    for place, clock in enumerate(("wall", "cpu")):
        spent = sum(save[place] for saves, _ in runs for save in saves)
        rest = sum(total[place] for _, total in runs) - spent
        count = sum(len(saves) for saves, _ in runs)
        cost_s = spent / count
        result += [
            Row(
                f"checkpoints: {clock} overhead, one a second",
                100 * spent / rest,
                "%",
                goal=3.0,
                higher_is_better=False,
                reference=f"{1e3 * cost_s:.1f} ms each, {count} in {rest:.0f} s; "
                f"with / without: {ratio.value:.3f} x CPU ({ratio.reference.split('; ')[-1]})",
            ),
            Row(
                f"checkpoints: {clock} overhead, one a minute (default)",
                100 * cost_s / DEFAULT_S,
                "%",
                goal=3.0,
                higher_is_better=False,
                reference="from the cost of each",
            ),
        ]
    return result


def _timed(saved: list[tuple[float, float]]) -> Any:
    save = Checkpoints.save

    def timed(self: Checkpoints, state: dict[str, Any]) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        save(self, state)
        saved.append((time.perf_counter() - wall, time.process_time() - cpu))

    return timed


def _views(folder: Path, num_rows: int) -> TrainViews:
    """Write and encode a table of mixed columns."""
    rng = np.random.default_rng(0)
    numbers = {f"n{i}": rng.normal(size=num_rows) for i in range(NUM_NUMBERS)}
    columns: dict[str, pa.Array] = {name: pa.array(x) for name, x in numbers.items()}
    labels = pa.array([f"label {i}" for i in range(50)])
    for i in range(NUM_CATEGORIES):
        codes = pa.array(rng.integers(0, 50, num_rows), pa.int32())
        columns[f"c{i}"] = pa.DictionaryArray.from_arrays(codes, labels)
    columns["y"] = pa.array(numbers["n0"] * numbers["n1"] + rng.normal(size=num_rows))
    roles: dict[str, Role] = {
        name: "numeric" if name[0] == "n" else "category" for name in columns
    } | {"y": "target"}
    few = {name: values.slice(0, 100) for name, values in columns.items()}
    write_table(
        folder / "reduce",
        {"train": columns, "valid": few, "test": few},
        roles=roles,
        targets=(_TARGET,),
        row_group_rows=20_000,
    )
    resources, recorder = Resources(), MemoryRecorder()
    encode(
        folder / "reduce",
        folder / "encode",
        EncodeParams(),
        resources=resources,
        recorder=recorder,
    )
    contract = open_table(folder / "reduce").contract
    return TrainViews(
        folder / "reduce",
        folder / "encode",
        folder / "cache",
        contract,
        (0, 1, 2, 3, 4),
        StopRows("fold", 4),
    )
