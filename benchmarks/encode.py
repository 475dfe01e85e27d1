"""Parquet to encoded shards, and category codes alone, beside pandas and Arrow.

The stage runs whole, and its time is cut where it opens the first writer and where it has told
that the last split is done: fit, transform and write, digests and fsync. The encode rows count the
transform and write alone. The pandas way runs on one file of the foreign table, is scaled per row,
and writes nothing. "foreign" is pyarrow's zstd default, "ours" what the stage ``reduce`` writes.

Before the category codes are timed, all ways must give equal codes, nulls and unknowns included.
"""

import itertools
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._folders import (
    Folders,
    contract_of,
    flights,
    synthetic,
    with_identity,
)
from benchmarks._peers import (
    PandasLoader,
    decode,
    drain,
    index_codes,
    value_sets,
)
from benchmarks._rates import rate_row, share_row, times_row
from benchmarks._table import TARGET, TEXTS, make_rows
from benchmarks.harness import Row, Timing, arguments, measure, report
from headrace.data.encoder import MISSING, UNKNOWN, Encoder, fit_encoder
from headrace.data.shards import SHARD_SPLITS, ShardWriter
from headrace.data.table import Table, open_table
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages import encode as stage
from headrace.storage import folder_digest, new_folder, write_file

CODE_ROWS = 4000
PHASES = ("fit", "transform and write", "digests and fsync")


@dataclass
class PhaseClock(MemoryRecorder):
    """Cuts the stage's time where it tells its progress."""

    marks: list[tuple[str, float, float]] = field(default_factory=list)

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        super().progress(done, total, unit=unit, detail=detail)
        self.mark(detail)

    def mark(self, name: str) -> None:
        self.marks.append((name, time.process_time(), time.perf_counter()))

    def phases(self) -> list[tuple[float, float]]:
        """Return CPU and wall seconds of each of ``PHASES``."""
        names = [name for name, *_ in self.marks]
        splits = [i for i, name in enumerate(names) if name in SHARD_SPLITS]
        cuts = [self.marks[i] for i in (0, names.index("write"), splits[-1], -1)]
        return [(b[1] - a[1], b[2] - a[2]) for a, b in itertools.pairwise(cuts)]


class EncodeRuns:
    """Runs the stage on one table again and again and keeps the seconds of its phases.

    Each turn runs it twice and keeps the second: what the first wrote is removed, and its memory
    taken again. On a virtual machine the first use of a page costs more than writing it, and what
    ran in between may have taken the pages.
    """

    def __init__(self, table: Table, out: Path, *, threads: int) -> None:
        self.table = table
        self.out = out
        self.threads = threads
        self.num_rows = table.num_rows("train")
        self.runs: list[list[tuple[float, float]]] = []
        self.digest = ""

    def __call__(self) -> int:
        self._run()
        self.runs.append(self._run().phases())
        self.digest = folder_digest(self.out)
        return self.num_rows

    def _run(self) -> PhaseClock:
        shutil.rmtree(self.out, ignore_errors=True)
        clock = PhaseClock()
        clock.mark("start")
        writer = partial(_marked, stage.ShardWriter, clock)
        with mock.patch.object(stage, "ShardWriter", writer):
            stage.encode(
                self.table.folder, self.out, stage.EncodeParams(),
                resources=Resources(threads=self.threads), recorder=clock,
            )  # fmt: skip
        clock.mark("end")
        return clock

    def timing(self, phase: str, name: str) -> Timing:
        """Return the seconds of one phase, or of all; the first run was to warm up."""
        phases = range(len(PHASES)) if phase == "whole stage" else [PHASES.index(phase)]
        parts = [
            (sum(run[i][0] for i in phases), sum(run[i][1] for i in phases))
            for run in self.runs[1:]
        ]
        cpu, wall = zip(*parts, strict=True)
        timing = Timing(f"{name}: {phase}", cpu, wall, self.num_rows)
        print(timing)
        return timing


def _marked(kind: type[ShardWriter], clock: PhaseClock, *args: Any, **settings: Any) -> ShardWriter:
    """Make the writer of a split, which is where fitting has ended."""
    clock.mark("write")
    return kind(*args, **settings)


def encode_rows(folders: Folders, repeats: int) -> list[Row]:
    """The stage on foreign and on our files, against pandas and the bare decode."""
    foreign, ours, encoder = folders.foreign, folders.ours, folders.encoder
    pandas = PandasLoader(encoder)
    columns, texts = encoder.columns, TEXTS
    with tempfile.TemporaryDirectory(dir=folders.root) as name:
        out = Path(name) / "out"
        stages = {
            "foreign": EncodeRuns(foreign, out, threads=1),
            "ours": EncodeRuns(ours, out, threads=1),
            "foreign, 2 threads": EncodeRuns(foreign, out, threads=2),
            "ours, 2 threads": EncodeRuns(ours, out, threads=2),
        }
        timings = measure(
            {
                "pandas": lambda: drain(pandas.epoch(foreign.files("train")[:1])),
                "decode, foreign": lambda: decode(foreign.files("train"), columns, texts),
                "decode, ours": lambda: decode(ours.files("train"), columns, texts),
                **stages,
            },
            repeats,
        )
        for name in ("foreign", "ours"):
            assert stages[name].digest == stages[f"{name}, 2 threads"].digest
    write = {name: run.timing("transform and write", name) for name, run in stages.items()}
    fit, end = (stages["ours"].timing(phase, "ours") for phase in (PHASES[0], PHASES[2]))
    slow = timings["pandas"]
    return [
        times_row("encode, foreign zstd files", slow, write["foreign"], must=8.0),
        times_row("encode, our files", slow, write["ours"], must=14.0),
        times_row("encode, our files, 2 threads", slow, write["ours, 2 threads"], clock="wall",
                  goal=20.0),
        times_row("encode, foreign files, 2 threads", slow, write["foreign, 2 threads"],
                  clock="wall"),
        share_row("encode, foreign: of the decode", write["foreign"], timings["decode, foreign"]),
        share_row("encode, ours: of the decode", write["ours"], timings["decode, ours"]),
        rate_row("pandas way", slow),
        rate_row("decode, foreign", timings["decode, foreign"]),
        rate_row("decode, ours", timings["decode, ours"]),
        rate_row("encode, foreign", write["foreign"]),
        rate_row("encode, ours", write["ours"]),
        rate_row("fit, ours (source verified)", fit),
        rate_row("digests and fsync of the shards", end),
        rate_row("whole stage, ours", stages["ours"].timing("whole stage", "ours")),
        rate_row(
            "whole stage, ours, 2 threads",
            stages["ours, 2 threads"].timing("whole stage", "ours, 2 threads"),
            clock="wall",
        ),
    ]  # fmt: skip


def flights_rows(repeats: int) -> list[Row]:
    """The example's own table: 213,000 rows, all splits written."""
    with flights() as folders, tempfile.TemporaryDirectory(dir=folders.root) as name:
        run = EncodeRuns(folders.ours, Path(name) / "encode", threads=1)
        table = folders.ours
        run.num_rows = sum(table.num_rows(split) for split in ("train", "valid", "test"))
        for _ in range(repeats + 1):
            run()
        write = run.timing("transform and write", "flights")
    return [rate_row("encode, flights", write)]


class CodeCase:
    """15 categories alone: the same batches as Arrow texts, as dictionaries and as frames."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        self.num_rows = num_rows
        train = self._write(folder / "train", seed=0)
        other = self._write(folder / "other", seed=1)  # has labels that train rows had not
        self.encoder: Encoder = fit_encoder(
            train, max_categories=50_000, min_count=2, num_quantiles=2, quantile_rows=100, seed=0
        )
        self.pandas = PandasLoader(self.encoder)
        self.value_sets = value_sets(self.encoder)
        path = other.files("train")[0]
        self.coded = self._batches(path, TEXTS)
        self.fresh = [pa.RecordBatch.from_pylist(b.to_pylist(), b.schema) for b in self.coded]
        self.texts = self._batches(path, ())
        self.frames = [batch.to_pandas() for batch in self.texts]

    def _write(self, folder: Path, *, seed: int) -> Table:
        rows = make_rows(np.random.default_rng(seed), self.num_rows).select([*TEXTS, TARGET])
        rows = with_identity(rows, first_id=0)
        with new_folder(folder) as private:
            (private / "train").mkdir()
            pq.write_table(rows, private / "train" / "part-00000.parquet")
            write_file(private / "contract.json", contract_of(rows).to_json())
        return open_table(folder)

    def _batches(self, path: Path, dictionaries: Iterable[str]) -> list[pa.RecordBatch]:
        with pq.ParquetFile(path, read_dictionary=list(dictionaries)) as file:
            rows = file.read_row_group(0, columns=list(TEXTS))
        return rows.combine_chunks().to_batches(max_chunksize=CODE_ROWS)  # one dictionary each

    def headrace(self) -> list[np.ndarray]:
        return [self.encoder.transform(batch).codes for batch in self.coded]

    def fresh_dictionaries(self) -> list[np.ndarray]:
        """The same where every batch brings other dictionaries, as no Parquet file does."""
        return [self.encoder.transform(batch).codes for batch in self.fresh]

    def series_map(self) -> list[np.ndarray]:
        return [self.pandas.mapped(frame) for frame in self.frames]

    def index_in(self) -> list[np.ndarray]:
        return [
            np.column_stack([index_codes(batch.column(n), known) for n, known in sets.items()])
            for sets in [self.value_sets]
            for batch in self.texts
        ]

    def get_indexer(self) -> list[np.ndarray]:
        """pandas without ``map``: one index per category, ``-1`` where it has no such label."""
        indexes = {name: pd.Index(known.to_pandas()) for name, known in self.value_sets.items()}
        return [
            np.column_stack([i.get_indexer(frame[name]) + MISSING for name, i in indexes.items()])
            for frame in self.frames
        ]

    def check(self) -> None:
        """All ways give equal codes, and there is something to get wrong."""
        expected = np.concatenate(self.series_map())
        assert (expected == UNKNOWN).any()
        assert (expected == MISSING).any()
        for way in (self.headrace, self.fresh_dictionaries, self.index_in, self.get_indexer):
            assert np.array_equal(np.concatenate(way()), expected), way.__name__


def code_rows(repeats: int) -> list[Row]:
    """Category codes of 4000-row batches, 15 categories, what is decoded as it comes.

    The batches of a row group share its dictionaries, as they do in a file, so their look-up tables
    are made once; one row says what it costs to make them for every batch.
    """
    with tempfile.TemporaryDirectory() as name:
        case = CodeCase(Path(name), 60_000)
    case.check()
    ways = {
        "series.map": case.series_map,
        "pandas get_indexer": case.get_indexer,
        "pyarrow index_in": case.index_in,
        "headrace codes": lambda: [case.headrace() for _ in range(10)],  # too quick for the clock
        "headrace codes, fresh dictionaries": case.fresh_dictionaries,
    }
    timings = measure(ways, repeats)
    scaled = {
        name: Timing(
            name, t.cpu_s, t.wall_s, case.num_rows * (10 if name == "headrace codes" else 1)
        )
        for name, t in timings.items()
    }
    ours = scaled["headrace codes"]
    return [
        times_row("category codes, 4000 x 15", scaled["series.map"], ours, must=100.0),
        times_row("category codes, 4000 x 15", scaled["pyarrow index_in"], ours, goal=10.0),
        times_row("category codes, 4000 x 15", scaled["pandas get_indexer"], ours),
        times_row(
            "category codes, other dictionaries in each batch",
            scaled["series.map"],
            scaled["headrace codes, fresh dictionaries"],
        ),
        rate_row("category codes", ours),
    ]


def main() -> int:
    args = arguments(__doc__)
    num_rows, repeats = (200_000, 3) if args.quick else (2_000_000, 5)
    with synthetic(num_rows) as folders:
        rows = encode_rows(folders, repeats)
    return report([*rows, *code_rows(repeats), *flights_rows(repeats)], args)


if __name__ == "__main__":
    sys.exit(main())
