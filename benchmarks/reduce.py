"""Narrowing a frame's dtypes: reduce_frame against the usual loop over columns, and its limits.

60 columns: 40 float64 (a third noise that needs all its bits, a third that float32 holds, a third
whole numbers with missing values) and 20 int64 of all ranges. The usual loop takes min and max of
each column and the narrowest type whose range holds them, float16 included, which changes values;
what it changes is counted. Then the stage on Parquet, and what the frame cache saves.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Row, arguments, measure, ratio_row, report
from headrace.data.cache import cached_frame
from headrace.data.frames import read_frame, reduce_frame
from headrace.data.table import open_table
from headrace.memory import format_bytes
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Column, Contract, Target
from headrace.stages.reduce import ReduceParams, reduce
from headrace.storage import new_folder, write_file

NUM_FLOATS = 40
NUM_INTEGERS = 20


def make_frame(num_rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {}
    for i in range(NUM_FLOATS):
        if i % 3 == 0:
            values = rng.normal(size=num_rows)
        elif i % 3 == 1:
            values = rng.normal(size=num_rows).astype(np.float32).astype(np.float64)
        else:
            values = rng.integers(0, 2000, num_rows).astype(np.float64)
            values[rng.random(num_rows) < 0.05] = np.nan
        columns[f"float{i}"] = values
    for i in range(NUM_INTEGERS):
        columns[f"integer{i}"] = rng.integers(-(10 ** (i % 10)), 10 ** (i % 10) + 1, num_rows)
    return pd.DataFrame(columns)


def usual_loop(frame: pd.DataFrame) -> pd.DataFrame:
    """The loop found in many notebooks, on a shallow copy so that runs do not build on another."""
    frame = frame.copy(deep=False)
    for name in frame.columns:
        low, high = frame[name].min(), frame[name].max()
        if frame[name].dtype.kind == "i":
            kinds, limits = (np.int8, np.int16, np.int32, np.int64), np.iinfo
        else:
            kinds, limits = (np.float16, np.float32, np.float64), np.finfo
        for kind in kinds:
            if low > limits(kind).min and high < limits(kind).max:
                frame[name] = frame[name].astype(kind)
                break
    return frame


def downcast(frame: pd.DataFrame) -> pd.DataFrame:
    kinds = {"i": "integer", "f": "float"}
    return pd.DataFrame(
        {c: pd.to_numeric(frame[c], downcast=kinds[frame[c].dtype.kind]) for c in frame}
    )


def bare_cast(frame: pd.DataFrame) -> pd.DataFrame:
    cast = {c: frame[c].to_numpy().astype(np.float32) for c in frame}
    return pd.DataFrame(cast, copy=False)


def count_changed(before: pd.DataFrame, after: pd.DataFrame) -> int:
    """Values that are another number than before, or missing where they were not."""
    total = 0
    for name in before:
        old = before[name].to_numpy()
        new = after[name].to_numpy(dtype=old.dtype, na_value=np.nan) if old.dtype.kind == "f" else (
            after[name].to_numpy().astype(np.int64)
        )  # fmt: skip
        both_missing = (old != old) & (new != new)
        total += int(((old != new) & ~both_missing).sum())
    return total


def write_extract(folder: Path, frame: pd.DataFrame) -> None:
    """The frame as the stage ``extract`` leaves it."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata()
    names = table.column_names
    num_rows = table.num_rows
    table = table.add_column(0, "row_id", pa.array(np.arange(num_rows)))
    table = table.add_column(1, "fold", pa.array(np.arange(num_rows) % 5, pa.int8()))
    columns = tuple(
        Column(
            name=name,
            role="target" if name == names[-1] else "numeric",
            dtype=str(table.schema.field(name).type),
        )
        for name in names
    )
    contract = Contract(columns=columns, targets=(Target(name=names[-1], task="regression"),))
    with new_folder(folder) as private:
        (private / "train").mkdir()
        path = private / "train" / "part-00000.parquet"
        pq.write_table(table, path, compression="lz4", row_group_size=65_536, use_dictionary=False)
        write_file(private / "contract.json", contract.to_json())


def frame_rows(num_rows: int, repeats: int) -> list[Row]:
    frame = make_frame(num_rows)
    print(
        f"{num_rows:,} rows x {frame.shape[1]} columns, {format_bytes(frame.memory_usage().sum())}"
    )
    timings = measure(
        {
            "usual loop": lambda: usual_loop(frame),
            "reduce_frame": lambda: reduce_frame(frame),
            "reduce_frame, error 1e-6": lambda: reduce_frame(frame, max_rel_error=1e-6),
            "reduce_frame, 2 threads": lambda: reduce_frame(frame, threads=2),
            "to_numeric(downcast)": lambda: downcast(frame),
            "bare cast to float32": lambda: bare_cast(frame),
        },
        repeats,
    )
    loop, ours = timings["usual loop"], timings["reduce_frame"]
    lossy, threads = timings["reduce_frame, error 1e-6"], timings["reduce_frame, 2 threads"]
    before = int(frame.memory_usage(deep=True).sum())
    sizes = {name: int(t.result.memory_usage(deep=True).sum()) for name, t in timings.items()}
    return [
        ratio_row("faster than the usual loop", loop, ours, must=1.5, goal=2.0),
        Row("values changed, lossless", count_changed(frame, ours.result), "values", 0, 0, False),
        Row(
            "values the usual loop changes", count_changed(frame, loop.result), "values",
            higher_is_better=False, reference=f"of {frame.size:,}",
        ),
        ratio_row("faster than the usual loop, error 1e-6", loop, lossy, goal=1.5),
        ratio_row("faster on two threads", loop, threads, clock="wall", goal=2.0),
        ratio_row("faster than to_numeric", timings["to_numeric(downcast)"], ours, goal=3.5),
        ratio_row(
            "times a bare cast", ours, timings["bare cast to float32"], goal=2.6,
            higher_is_better=False,
        ),
        Row("memory after, lossless", sizes[ours.name] / before, "of before", None, None, False),
        Row("memory after, error 1e-6", sizes[lossy.name] / before, "of before", None, None, False),
    ]  # fmt: skip


def stage_rows(num_rows: int, repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_extract(root / "extract", make_frame(num_rows))
        told = {"resources": Resources(), "recorder": MemoryRecorder()}
        stage = measure(
            {"stage": lambda: reduce(root / "extract", root / "reduce", ReduceParams(), **told)},
            max(1, repeats // 2),
        )["stage"]
        table = open_table(root / "reduce")
        cached = {"cache": root / "cache", "recorder": MemoryRecorder()}
        cache = measure(
            {
                "frame from Parquet": lambda: read_frame(table, "train"),
                "frame from the cache": lambda: cached_frame(table, "train", None, **cached),
            },
            repeats,
        )
    per_second = [num_rows / seconds for seconds in stage.cpu_s]
    reduced = stage.result
    return [
        Row(
            "stage: rows", sorted(per_second)[len(per_second) // 2], "rows/cpu-s",
            reference=f"{min(per_second):,.0f}-{max(per_second):,.0f}; two passes and digests",
        ),
        Row(
            "stage: files", reduced.file_bytes_after / reduced.file_bytes_before, "of before",
            higher_is_better=False, reference="both lz4",
        ),
        ratio_row(
            "cache: sooner than from Parquet", cache["frame from Parquet"],
            cache["frame from the cache"],
        ),
    ]  # fmt: skip


def main() -> int:
    args = arguments(__doc__)
    num_rows, repeats = (100_000, 3) if args.quick else (1_000_000, 7)
    return report([*frame_rows(num_rows, repeats), *stage_rows(num_rows, repeats)], args)


if __name__ == "__main__":
    sys.exit(main())
