"""A project's data from Python: what a notebook asks for, one function each.

Paths are those of the stages (``"data/reduce"``, ``"data/train/catboost"``): taken as they are, or
from the root of the project that the current folder lies in. Everything is verified against its
digests before it is read, and pandas, torch and the models are loaded only by who asks for them.

    >>> import headrace
    >>> headrace.frame("data/reduce", split="valid")  # doctest: +SKIP
    >>> headrace.predictions("data/train/catboost", "late")  # doctest: +SKIP
    >>> headrace.model("data/publish").predict(rows)  # doctest: +SKIP
    >>> for batch in headrace.stream("data/encode", batch_size=4096):  # doctest: +SKIP
    ...     loss = step(batch.numeric, batch.codes, batch.targets)
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from headrace.errors import ConfigError, DataError, nearest
from headrace.project import find_project
from headrace.record import MemoryRecorder
from headrace.storage import read_manifest, verify_file

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd
    import pyarrow as pa

    from headrace.data.order import Kind
    from headrace.data.stream import BatchStream
    from headrace.data.table import Table
    from headrace.models.package import Package

_REDUCED = "data/reduce"
_ENCODED = "data/encode"


def frame(
    path: Path | str = _REDUCED, split: str = "train", columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the rows of one split of a stage's table as a pandas frame, in row order.

    Integers with missing values are nullable, texts with few values are categories, dates are
    times. Within a project the frame is kept in ``.headrace/cache``; a second call takes it from
    there and says on stderr how much time that saved. The frame is yours to change.

    Args:
        path: Folder of a table: ``data/extract`` or ``data/reduce``.
        split: One of train, valid, test, gap.
        columns: Columns wanted, in that order; None for all, ``row_id`` and ``fold`` included.

    Raises:
        IntegrityError: if the table is missing, unfinished or damaged.
        SchemaError: if it has no such split or column, with the nearest name.
    """
    from headrace.data.cache import cached_frame
    from headrace.data.frames import read_frame

    opened = table(path)
    try:
        project = find_project(opened.folder.resolve())
    except ConfigError:
        return read_frame(opened, split, columns)
    return cached_frame(opened, split, columns, cache=project.cache, recorder=_Told())


def table(path: Path | str = _REDUCED) -> Table:
    """Return a verified reader of a stage's table: contract, digest, batches, whole columns.

    Raises:
        IntegrityError: if the table is missing, unfinished or damaged.
    """
    from headrace.data.table import open_table

    return open_table(_found(path))


def batches(
    path: Path | str = _REDUCED,
    *,
    split: str | None = None,
    columns: Sequence[str] | None = None,
    delimiter: str = ",",
    batch_rows: int = 65_536,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of any table as Arrow record batches; memory stays at a batch.

    Args:
        path: A stage's table, a Parquet file, folder or glob, an Arrow IPC file, a CSV file (read
            strictly, see ``headrace.data.batches``).
        split: Split of a stage's table; None for all of them, one after the other.
        columns: Columns wanted, in that order; None for all.
        delimiter: Between the fields of a CSV.
        batch_rows: Most rows a batch may have.

    Raises:
        DataError: if there is no such file, or it cannot be read as what it is.
        SchemaError: if a column or split is not there, or files of one glob differ in columns.
        IntegrityError: if a stage's table is damaged.
    """
    from headrace.data.batches import batches as read

    return read(
        _found(path), split=split, columns=columns, delimiter=delimiter, batch_rows=batch_rows
    )


def stream(
    path: Path | str = _ENCODED,
    *,
    batch_size: int,
    split: str = "train",
    order: Kind | None = None,
    sampling: str | None = None,
    seed: int = 0,
    rows: npt.ArrayLike | None = None,
    encoder: Path | str | None = None,
    threads: int = 1,
) -> BatchStream:
    """Return the batches of encoded rows as tensors, for any PyTorch loop.

    Each pass over it is the next epoch, in another order. ``headrace.data.stream.BatchStream`` has
    further settings (ranks, window, block) and says what a batch holds; ``loader`` there reads
    ahead of it, ``samples()`` gives single rows.

    Args:
        path: Folder of encoded rows (``data/encode``); or, with ``encoder``, a stage's table, a
            Parquet file, a folder or a pattern, whose rows are encoded in every epoch again.
        batch_size: Rows of a batch.
        split: One of train, valid, test.
        order: One of exact, window, block, sequential (see ``headrace.data.order``); None is exact,
            and window for Parquet.
        sampling: None for each row once; ``weighted`` draws rows by their weight,
            ``balanced:TARGET`` takes the classes of a target in turn.
        seed: Of the order.
        rows: Which rows of the split, as a mask or as ascending positions; None for all.
        encoder: For Parquet: folder with a fitted encoder (``data/encode``).
        threads: For Parquet: how many decode.

    Raises:
        ConfigError: if a setting is out of range, or ``rows`` does not fit the split.
        DataError: if there is no Parquet file, or the weights or classes cannot be sampled.
        IntegrityError: if the folder is missing, unfinished or damaged.
        SchemaError: if there is no such split, with the nearest name.
    """
    from headrace.data.stream import stream as open_stream

    return open_stream(
        _found(path),
        batch_size=batch_size,
        split=split,
        order=order,
        sampling=sampling,
        seed=seed,
        rows=rows,
        encoder=None if encoder is None else _found(encoder),
        threads=threads,
    )


def predictions(path: Path | str, target: str) -> pd.DataFrame:
    """Return a model's predictions of one target, one row per row of the table it predicted.

    Columns: ``row_id``, ``fold`` (missing outside train), ``split``, ``model``, ``target``,
    ``folds_seen`` and ``prediction`` (the value, or the probability of the second label), or
    ``class_0``, ``class_1``, … for a target of several classes. Join them by ``row_id``.

    Args:
        path: Folder of a model or of the stack: ``data/train/catboost``, ``data/stack``.
        target: Name of the target.

    Raises:
        DataError: if there are no predictions of that target, with the nearest name.
        IntegrityError: if the folder is missing, unfinished or damaged.
    """
    import pyarrow.parquet as pq

    from headrace.data.frames import to_series
    from headrace.data.predictions import FOLDER
    from headrace.schema import file_stem

    folder = _found(path)
    names = sorted(
        unquote(Path(name).stem) for name in read_manifest(folder) if name.startswith(f"{FOLDER}/")
    )
    if target not in names:
        known = f"; there are: {', '.join(names)}" if names else ""
        raise DataError(
            f"{folder} has no predictions of {target!r}{nearest(target, names) or known}"
        )
    rows = pq.read_table(verify_file(folder, f"{FOLDER}/{file_stem(target)}.parquet"))
    import pandas as pd

    return pd.concat(
        [
            to_series(column, name=name, is_nullable=name == "fold")
            for name, column in zip(rows.column_names, rows.columns, strict=True)
        ],
        axis=1,
    )


def model(path: Path | str = "data/publish") -> Package:
    """Return the published model: encoder, members and weights in one; ``predict`` takes raw rows.

    Args:
        path: Folder of the model package.

    Raises:
        IntegrityError: if the package is missing, unfinished or damaged.
    """
    from headrace.models.package import load_package

    return load_package(_found(path))


class _Told(MemoryRecorder):
    """Says notes and warnings on stderr: there is no run that could keep them."""

    def note(self, text: str) -> None:
        sys.stderr.write(f"headrace: {text}\n")

    def warn(self, text: str) -> None:
        sys.stderr.write(f"headrace: warning: {text}\n")


def _found(path: Path | str) -> Path:
    """The path as it is, or from the project's root where only that leads somewhere."""
    place = Path(path)
    if place.is_absolute() or place.exists():
        return place
    try:
        below_root = find_project(Path.cwd()).root / place
    except ConfigError:
        return place
    return below_root if below_root.exists() else place
