"""A look at one encoded batch: what a network is fed, in the words and units of the table.

``decode`` is the counterpart of ``Encoder.transform``: a number is standardised back, a code is its
label again. What the codes 0 and 1 stood for is gone; they are shown as ``<unknown>`` and null.
``look_at`` adds a summary per column: a person sees at a glance that a column is all missing, that
half of its labels were unknown to the fit, or that a class hardly comes.

The text has one line per column of the table, for tables are wider than terminals.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.data.encoder import FIRST_LABEL, MISSING, UNKNOWN, EncodedBatch, Encoder
from headrace.errors import SchemaError
from headrace.schema import FOLD, ROW_ID, Target

if TYPE_CHECKING:
    from headrace.data.stream import Batch

UNKNOWN_TEXT = "<unknown>"
MISSING_TEXT = "<missing>"
_TOP_LABELS = 3
_NAME_WIDTH = 24  # of a column's name, in characters
_CELL_WIDTH = 16
_FLOAT32_STEP = 2.0**-20  # relative to std; exact to 16 standard deviations from the mean


@dataclass(frozen=True)
class ColumnLook:
    """One column over the rows of the batch.

    ``low``, ``median`` and ``high`` are of the numbers that are there, None without any. ``labels``
    are pairs of label and rows: of a category the most frequent ones, of a target all its classes.
    """

    name: str
    kind: str  # number, category, weight; of a target its task
    num_missing: int
    num_unknown: int = 0  # rows whose label the fit did not keep; categories only
    low: float | None = None
    median: float | None = None
    high: float | None = None
    num_labels: int = 0  # known ones that come in the batch
    labels: tuple[tuple[str, int], ...] = ()
    step: float = 0.0  # smaller differences are lost in the encoding; 0 if none are


@dataclass(frozen=True)
class Look:
    """One decoded batch: a summary of every column, and the first rows."""

    num_rows: int
    columns: tuple[ColumnLook, ...]
    rows: pa.Table  # as ``decode`` returns them

    def text(self, *, width: int = 100) -> str:
        """Return summary and rows as text whose lines have at most ``width`` characters."""
        lines = _aligned(list(self._summary()), width, right=(2, 3))
        for first, stop, panel in self._panels(width):
            named = f"row {stop}" if stop - first == 1 else f"rows {first + 1} to {stop}"
            lines += ["", named, *_aligned(panel, width, right=())]
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values; a missing cell is null, a row id is text."""
        return {
            "rows": self.num_rows,
            "columns": [
                {
                    "name": column.name,
                    "kind": column.kind,
                    "missing": column.num_missing,
                    "unknown": column.num_unknown,
                    "low": column.low,
                    "median": column.median,
                    "high": column.high,
                    "num_labels": column.num_labels,
                    "labels": [list(pair) for pair in column.labels],
                }
                for column in self.columns
            ],
            "first_rows": [{**row, ROW_ID: str(row[ROW_ID])} for row in self.rows.to_pylist()],
        }

    def _summary(self) -> Iterator[tuple[str, ...]]:
        yield "column", "kind", "missing", "unknown", "low … median … high, or labels"
        for column in self.columns:
            is_category = column.kind == "category"
            yield (
                column.name,
                column.kind,
                _share(column.num_missing, self.num_rows),
                _share(column.num_unknown, self.num_rows) if is_category else "",
                _values_text(column, self.num_rows),
            )

    def _panels(self, width: int) -> Iterator[tuple[int, int, list[tuple[str, ...]]]]:
        """Yield the shown rows side by side, as many at a time as fit into ``width``."""
        names = [ROW_ID, FOLD, *(column.name for column in self.columns)]
        steps = {column.name: column.step for column in self.columns}
        cells = [
            [_cell(value, steps.get(name, 0.0)) for value in self.rows[name].to_pylist()]
            for name in names
        ]
        widths = [
            min(_CELL_WIDTH, max(len(column[row]) for column in cells))
            for row in range(self.rows.num_rows)
        ]
        room = width - min(_NAME_WIDTH, max(map(len, names)))
        first = 0
        while first < len(widths):
            ends = np.cumsum([2 + size for size in widths[first:]])
            stop = first + max(1, int(np.searchsorted(ends, room, side="right")))
            panel = [
                (name, *(_cut(cell, _CELL_WIDTH) for cell in column[first:stop]))
                for name, column in zip(names, cells, strict=True)
            ]
            yield first, stop, panel
            first = stop


def look_at(batch: "EncodedBatch | Batch", encoder: Encoder, *, num_rows: int) -> Look:
    """Summarise a batch on the CPU and decode its first ``num_rows`` rows.

    Raises:
        SchemaError: if the batch is of another encoder.
    """
    decoded = decode(batch, encoder)
    codes_BC = np.asarray(batch.codes)
    columns = [
        _number(scale.name, "number", decoded, step=scale.std * _FLOAT32_STEP)
        for scale in encoder.scales
    ]
    columns += [_category(encoder, j, codes_BC[:, j]) for j in range(len(encoder.categories))]
    columns += [_target(target, decoded) for target in encoder.targets]
    if encoder.contract.weight:
        columns.append(_number(encoder.contract.weight, "weight", decoded, step=0.0))
    return Look(len(batch), tuple(columns), decoded.slice(0, num_rows))


def decode(batch: "EncodedBatch | Batch", encoder: Encoder) -> pa.Table:
    """Return the rows of a batch on the CPU as a table: numbers in their own units, label texts.

    Columns: ``row_id``, ``fold`` (null outside train), numbers (double), categories (text, with
    ``<unknown>`` for a label that the fit did not keep), targets (double, or the text of the
    class) and the weight, if the contract has one. Missing is null. Numbers are as exact as they
    are stored: as float32, to 1e-7 of their distance from the mean.

    Raises:
        SchemaError: if the batch is of another encoder.
    """
    _refuse_foreign(batch, encoder)
    # np.asarray: of an array itself, of a tensor on the CPU its memory.
    numeric_BN, codes_BC = np.asarray(batch.numeric), np.asarray(batch.codes)
    targets_BT, fold_B = np.asarray(batch.targets), np.asarray(batch.fold)
    columns: dict[str, pa.Array] = {
        ROW_ID: pa.array(np.asarray(batch.row_id)),
        FOLD: pa.array(fold_B, mask=fold_B < 0),
    }
    for j, scale in enumerate(encoder.scales):
        x_B = numeric_BN[:, j].astype(np.float64) * scale.std + scale.mean
        columns[scale.name] = pa.array(x_B, from_pandas=True)
    for j, category in enumerate(encoder.categories):
        texts = pa.array([UNKNOWN_TEXT, None, *category.labels], pa.string())
        columns[category.name] = texts.take(pa.array(codes_BC[:, j].astype(np.int64)))
    for j, target in enumerate(encoder.targets):
        values = pa.array(targets_BT[:, j].astype(np.float64), from_pandas=True)
        if target.task != "regression":
            values = pa.array(target.labels, pa.string()).take(values.cast(pa.int64()))
        columns[target.name] = values
    if encoder.contract.weight:
        weight_B = np.asarray(batch.weight).astype(np.float64)
        columns[encoder.contract.weight] = pa.array(weight_B, from_pandas=True)
    return pa.table(columns)


def number_text(value: float, step: float = 0.0) -> str:
    """Return a number to at most seven digits, or less where ``step`` is the finest it can tell.

    >>> number_text(1999.9999997, 1e-5), number_text(0.1), number_text(12345678.0)
    ('2000', '0.1', '12345678')
    """
    if step > 0 and math.isfinite(step) and math.isfinite(value):
        value = round(value, math.floor(-math.log10(step)))
    if math.isfinite(value) and abs(value) < 1e15 and value == int(value):
        return str(int(value))
    return f"{value:.7g}"


def _refuse_foreign(batch: "EncodedBatch | Batch", encoder: Encoder) -> None:
    codes_BC = np.asarray(batch.codes)
    found = (batch.numeric.shape[1], codes_BC.shape[1], batch.targets.shape[1])
    expected = (len(encoder.scales), len(encoder.categories), len(encoder.targets))
    cardinalities = np.array(encoder.cardinalities, np.int64)
    if found != expected or (codes_BC.max(axis=0, initial=0) >= cardinalities).any():
        raise SchemaError(
            f"the batch has {found[0]} numbers, {found[1]} categories and {found[2]} targets, or "
            f"codes without a label; the encoder was fitted on {expected[0]}, {expected[1]} and "
            f"{expected[2]}: decode with the encoder that lies beside the shards"
        )


def _number(name: str, kind: str, decoded: pa.Table, *, step: float) -> ColumnLook:
    values = decoded[name]
    known: npt.NDArray[np.float64] = values.drop_null().to_numpy()
    if not len(known):
        return ColumnLook(name, kind, values.null_count, step=step)
    low, median, high = np.quantile(known, [0.0, 0.5, 1.0]).tolist()
    return ColumnLook(name, kind, values.null_count, low=low, median=median, high=high, step=step)


def _category(encoder: Encoder, j: int, codes_B: npt.NDArray[Any]) -> ColumnLook:
    category = encoder.categories[j]
    counts = np.bincount(codes_B.astype(np.int64), minlength=FIRST_LABEL)
    known = counts[FIRST_LABEL:]
    top = np.argsort(-known, kind="stable")[:_TOP_LABELS]
    return ColumnLook(
        category.name,
        "category",
        num_missing=int(counts[MISSING]),
        num_unknown=int(counts[UNKNOWN]),
        num_labels=int(np.count_nonzero(known)),
        labels=tuple((category.labels[i], int(known[i])) for i in top.tolist() if known[i]),
    )


def _target(target: Target, decoded: pa.Table) -> ColumnLook:
    if target.task == "regression":
        return _number(target.name, target.task, decoded, step=0.0)
    values = decoded[target.name]
    counts = {entry["values"]: entry["counts"] for entry in values.value_counts().to_pylist()}
    labels = tuple((label, int(counts.get(label, 0))) for label in target.labels)
    return ColumnLook(
        target.name,
        target.task,
        num_missing=values.null_count,
        num_labels=sum(count > 0 for _, count in labels),
        labels=labels,
    )


def _values_text(column: ColumnLook, num_rows: int) -> str:
    if column.low is not None and column.median is not None and column.high is not None:
        parts = (column.low, column.median, column.high)
        return " … ".join(number_text(value, column.step) for value in parts)
    if not column.labels:
        return ""
    shares = ", ".join(
        f"{_cut(_printable(label), _CELL_WIDTH)} {_share(count, num_rows)}"
        for label, count in column.labels
    )
    if column.kind != "category":
        return shares
    return f"{column.num_labels} label{'s'[: column.num_labels != 1]}: {shares}"


def _cell(value: Any, step: float) -> str:
    if value is None:
        return MISSING_TEXT
    return number_text(value, step) if isinstance(value, float) else _printable(str(value))


def _share(count: int, total: int) -> str:
    """Return a share in per cent in which a count above none is never 0 %.

    >>> _share(0, 10), _share(1, 4096), _share(1, 3), _share(3, 3)
    ('0 %', '<0.1 %', '33.3 %', '100 %')
    """
    percent = 100 * count / max(1, total)
    if 0 < percent < 0.1:
        return "<0.1 %"
    return f"{percent:.0f} %" if count in (0, total) else f"{percent:.1f} %"


def _aligned(rows: Sequence[tuple[str, ...]], width: int, *, right: tuple[int, ...]) -> list[str]:
    """Return rows of cells as lines; columns in ``right`` are flush right, lines are cut."""
    cells = [(_cut(_printable(row[0]), _NAME_WIDTH), *row[1:]) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(size) if place in right else cell.ljust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(_cut("  ".join(parts).rstrip(), width))
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _printable(text: str) -> str:
    """Return text that stays on its line and moves no cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text) or '""'
