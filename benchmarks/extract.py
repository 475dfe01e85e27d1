"""The stage extract: its ordered COPY against bare DuckDB's, and how fast its files decode.

The stage runs once for real. Where it calls ``write_splits`` the benchmark takes over: it hands the
rows, in the order the stage holds them, to a plain DuckDB connection with the same memory limit and
threads, and then lets both write, in turns: the stage's function with the stage's engine, and the
plain connection with the very same COPY statements. "The COPY alone" is the time of those
statements inside the stage's function, taken around ``Engine.execute``; counting, widths, type
check and identity digest are the rest of that function. Both must write the same bytes.
The other steps of the stage are timed between its progress events.

Peak memory is RssAnon + RssShmem of a process of its own per variant, at two budgets.
Decoding is one thread, strings as dictionary codes, against the same rows written by pyarrow with
zstd and its defaults; so also for the files of the stage reduce, which encode reads. The limits
hold for the synthetic table; the flights are shown beside it.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks._table import write_files
from benchmarks.harness import Row, Timing, arguments, measure, ratio_row, report
from headrace.data.engine import Engine, literal
from headrace.data.write import write_splits
from headrace.memory import format_bytes
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import SPLITS
from headrace.stages import extract as stage
from headrace.stages.raw import RawParams, raw
from headrace.stages.reduce import ReduceParams, reduce

MIB = 1 << 20
BATCH_ROWS = 65_536
PROJECT = Path(__file__).resolve().parents[1]


class Steps(MemoryRecorder):
    """Notes the CPU and wall seconds between the stage's progress events, by what was begun."""

    def __init__(self) -> None:
        super().__init__()
        self.spent: dict[str, tuple[float, float]] = {}
        self._last = ("start", time.process_time(), time.perf_counter())

    def progress(self, *args: Any, **kwargs: Any) -> None:
        super().progress(*args, **kwargs)
        name, cpu, wall = self._last
        self._last = (kwargs["detail"], time.process_time(), time.perf_counter())
        before = self.spent.get(name, (0.0, 0.0))
        self.spent[name] = (before[0] + self._last[1] - cpu, before[1] + self._last[2] - wall)


@contextlib.contextmanager
def copies_noted() -> Iterator[list[tuple[str, float, float]]]:
    """Note each COPY that the engine executes: statement, CPU and wall seconds."""
    noted: list[tuple[str, float, float]] = []
    execute = Engine.execute

    def timed(engine: Engine, sql: str, **kwargs: Any) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        execute(engine, sql, **kwargs)
        if sql.startswith("COPY"):
            noted.append((sql, time.process_time() - cpu, time.perf_counter() - wall))

    with mock.patch.object(Engine, "execute", timed):
        yield noted


class Duel:
    """Stands in for ``write_splits`` inside the stage and lets a plain connection write as well."""

    def __init__(self, bare: Path, resources: Resources, repeats: int) -> None:
        self.bare, self.resources, self.repeats = bare, resources, repeats
        self.timings: dict[str, Timing] = {}
        self.copy: Timing | None = None

    def __call__(self, engine: Engine, relation: str, split: str, contract: Any, out: Path) -> Any:
        handed = out / "handed.parquet"
        engine.execute(f"COPY {relation} TO {literal(str(handed))} (FORMAT parquet)")
        self.bare.mkdir(parents=True)
        connection = duckdb.connect(str(self.bare / "work.duckdb"))
        connection.execute(f"SET memory_limit = '{self.resources.memory_budget // 2}B'")
        connection.execute(f"SET threads = {self.resources.threads}")
        connection.execute(f"CREATE TABLE {relation} AS FROM {literal(str(handed))}")
        handed.unlink()
        with copies_noted() as noted:
            turns: list[tuple[float, float]] = []

            def ours() -> Any:
                clear(out)
                del noted[:]
                written = write_splits(engine, relation, split, contract, out)
                turns.append((sum(n[1] for n in noted), sum(n[2] for n in noted)))
                return written

            def theirs() -> None:
                clear(self.bare)
                for sql, *_ in noted:
                    name = next(n for n in SPLITS if f"/{n}/" in sql.rpartition(" TO ")[2])
                    (self.bare / name).mkdir()
                    connection.execute(sql.replace(str(out), str(self.bare)))

            self.timings = measure({"write_splits": ours, "bare COPY": theirs}, self.repeats)
        connection.close()
        cpu, wall = zip(*turns[1:], strict=True)  # the first turn only warms up
        self.copy = Timing("COPY in the stage", cpu, wall, None)
        print(self.copy)
        for path in sorted(out.rglob("*.parquet")):
            assert path.read_bytes() == (self.bare / path.relative_to(out)).read_bytes(), path
        return self.timings["write_splits"].result


def clear(folder: Path) -> None:
    for name in SPLITS:
        shutil.rmtree(folder / name, ignore_errors=True)


def synthetic_params() -> stage.ExtractParams:
    return stage.ExtractParams.model_validate(
        {"sources": {"table": "source/*.parquet"}, "targets": {"y": {"task": "binary"}}}
    )


def flights_params(root: Path) -> stage.ExtractParams:
    """Params of the flights example, its data and recipe laid out below ``root``."""
    (root / "data").mkdir(parents=True)
    raw(root / "data/raw", RawParams(), resources=Resources(), recorder=MemoryRecorder())
    shutil.copy(PROJECT / "data/flights.sql", root / "data")
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    return stage.ExtractParams.model_validate(content["extract"])


def run_stage(
    root: Path, params: stage.ExtractParams, resources: Resources, recorder: MemoryRecorder
) -> None:
    shutil.rmtree(root / "extract", ignore_errors=True)
    told = {"scratch": root / "scratch", "resources": resources, "recorder": recorder}
    stage.extract(root, root / "extract", params, **told)


def copy_rows(
    name: str, root: Path, params: stage.ExtractParams, repeats: int, *, must: float | None
) -> list[Row]:
    duel = Duel(root / "bare", Resources(), repeats)
    steps = Steps()
    with mock.patch.object(stage, "write_splits", duel):
        run_stage(root, params, Resources(), steps)
    shutil.rmtree(root / "bare")
    whole, bare, copy = duel.timings["write_splits"], duel.timings["bare COPY"], duel.copy
    assert copy is not None
    lower = {"higher_is_better": False}
    rows = [
        ratio_row(f"{name}: COPY alone, CPU of bare", copy, bare, must=must, **lower),
        ratio_row(f"{name}: COPY alone, wall of bare", copy, bare, clock="wall", **lower),
        ratio_row(f"{name}: COPY, counts and digests", whole, bare, **lower),
    ]
    named = {"writing": "", "headrace": ""}
    for step, (cpu, wall) in steps.spent.items():
        if step not in named and cpu >= 0.01:
            label = {"contract": "contract, split and folds"}.get(step, step)
            rows.append(Row(f"{name}: {label}", cpu, "cpu-s", None, None, False, f"{wall:.2f} s"))
    return rows


def decode(path_texts: tuple[Sequence[Path], Sequence[str]]) -> int:
    """Decode all rows with one thread, texts as codes; return how many there are."""
    paths, texts = path_texts
    num_rows = 0
    for path in paths:
        with pq.ParquetFile(path, memory_map=True, read_dictionary=list(texts)) as file:
            for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
                num_rows += batch.num_rows
    return num_rows


def decode_rows(name: str, root: Path, repeats: int, *, is_judged: bool) -> list[Row]:
    shutil.rmtree(root / "reduce", ignore_errors=True)
    told = {"resources": Resources(), "recorder": MemoryRecorder()}
    reduce(root / "extract", root / "reduce", ReduceParams(), **told)
    files = {
        stage_name: sorted((root / stage_name).glob("*/*.parquet"))
        for stage_name in ("extract", "reduce")
    }
    files["pyarrow zstd"] = [rewritten(path, root / "pyarrow") for path in files["extract"]]
    schema = pq.read_schema(files["extract"][0])
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    names = {f"decode {key}, {name}": (paths, texts) for key, paths in files.items()}
    timings = measure({key: lambda v=value: decode(v) for key, value in names.items()}, repeats)
    by_stage = dict(zip(files, timings.values(), strict=True))
    sizes = {key: sum(path.stat().st_size for path in paths) for key, paths in files.items()}
    theirs = by_stage.pop("pyarrow zstd")
    rows = []
    for key, ours in by_stage.items():
        limits = {"must": 1.7, "goal": 1.85} if is_judged else {}
        rows.append(ratio_row(f"{name}: {key}'s files decode", theirs, ours, **limits))
        cpu = sorted(ours.cpu_s)[len(ours.cpu_s) // 2]
        rows.append(Row(f"{name}: {key}'s files decode", ours.result / cpu, "rows/cpu-s"))
        rows.append(
            Row(
                f"{name}: {key}'s files, size", sizes[key] / sizes["pyarrow zstd"], "of pyarrow's",
                1.0 if is_judged else None, None, False,
                f"{format_bytes(sizes[key])} / {format_bytes(sizes['pyarrow zstd'])}",
            )
        )  # fmt: skip
    return rows


def rewritten(path: Path, folder: Path) -> Path:
    """Write the rows of ``path`` as pyarrow does by default, with zstd."""
    out = folder / path.parent.name / path.name
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(path).replace_schema_metadata(), out, compression="zstd")
    return out


_WATCHED = """
import os, sys
from pathlib import Path
from benchmarks.extract import run_bare, run_stage, synthetic_params
from headrace.memory import MemoryWatch, held_bytes
from headrace.params import Resources
from headrace.record import MemoryRecorder
kind, root, budget = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
resources = Resources(memory_budget=budget)
start = held_bytes(os.getpid())
with MemoryWatch(os.getpid(), budget_bytes=1 << 60, on_excess=print, interval_s=0.02) as watch:
    if kind == "stage":
        run_stage(root, synthetic_params(), resources, MemoryRecorder())
    else:
        run_bare(root, resources)
print(start, watch.peak_bytes)
"""


def run_bare(root: Path, resources: Resources) -> None:
    """The ordered COPY of all rows straight from the source, in plain DuckDB."""
    out = root / "bare.parquet"
    with duckdb.connect(str(root / "bare.duckdb")) as connection:
        connection.execute(f"SET memory_limit = '{resources.memory_budget // 2}B'")
        connection.execute(f"SET threads = {resources.threads}")
        connection.execute(
            f"COPY (SELECT hash(filename, file_row_number) AS row_id, * FROM "
            f"read_parquet({literal(str(root / 'source/*.parquet'))}, filename = true, "
            f"file_row_number = true) ORDER BY row_id) TO {literal(str(out))} "
            f"(FORMAT parquet, COMPRESSION lz4_raw, ROW_GROUP_SIZE 75776, "
            f"WRITE_BLOOM_FILTER false)"
        )
    out.unlink()
    (root / "bare.duckdb").unlink()


def memory_rows(root: Path, budgets: Sequence[int]) -> list[Row]:
    rows = []
    for budget in budgets:
        cap = budget // 2
        for kind in ("stage", "bare"):
            command = [sys.executable, "-c", _WATCHED, kind, str(root), str(budget)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=PROJECT)
            start, peak = map(int, told.stdout.split()[-2:])
            rows.append(
                Row(
                    f"{kind}: peak memory over a cap of {format_bytes(cap)}", (peak - cap) / 1e6,
                    "MB", 150 if kind == "stage" else None, None, False,
                    f"peak {format_bytes(peak)}, {format_bytes(start)} after the imports",
                )
            )  # fmt: skip
    return rows


def main() -> int:
    args = arguments(__doc__)
    num_rows, repeats = (200_000, 2) if args.quick else (2_000_000, 5)
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as name:
        root, flights = Path(name) / "synthetic", Path(name) / "flights"
        write_files(root / "source", num_rows)
        params = synthetic_params()
        budgets = [768 * MIB] if args.quick else [768 * MIB, 2048 * MIB]
        rows = memory_rows(root, budgets)
        rows += copy_rows(f"{num_rows:,} rows", root, params, repeats, must=1.05)
        rows += decode_rows("synthetic", root, 11, is_judged=True)
        rows += copy_rows("flights", flights, flights_params(flights), repeats, must=None)
        rows += decode_rows("flights", flights, 11, is_judged=False)
    return report(rows, args)


if __name__ == "__main__":
    sys.exit(main())
