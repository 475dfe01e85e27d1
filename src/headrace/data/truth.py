"""What predictions are judged against: labels, weights and resampling units of one split.

The rows of the table are the reference. Predictions are lined up with them by ``row_id`` alone;
a model without a prediction for a labelled row, or with one for a row that the split does not
have, is refused: scores of different rows cannot be compared.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from headrace.data.predictions import Predictions
from headrace.data.table import Table
from headrace.errors import ConfigError, DataError, IntegrityError
from headrace.schema import ROW_ID, Contract, encode_target
from headrace.storage import digest_bytes

Floats: TypeAlias = npt.NDArray[np.float64]
UnitChoice = Literal["auto", "row", "group", "hour", "day", "week", "month"]
_TIME_UNITS = ("hour", "day", "week", "month")


@dataclass(frozen=True)
class Truth:
    """The labelled side of one split, sorted by row id.

    Shapes: ``row_id`` (N,); ``labels`` per target (N,) float64: the value or the class code, NaN
    where the label is missing; ``weight`` (N,) or None without a weight column; ``unit_of_row``
    (N,) codes of the resampling units, which are called ``unit`` and follow each other in time
    where ``is_unit_of_time``; ``stratum`` (N,) codes of the strata column, or None without one.
    """

    split: str
    row_id: npt.NDArray[np.int64]
    labels: dict[str, Floats]
    weight: Floats | None
    unit: str
    unit_of_row: npt.NDArray[np.int64]
    is_unit_of_time: bool
    stratum: npt.NDArray[np.int64] | None

    @property
    def digest(self) -> str:
        """Digest of the sorted row ids: names the set of rows, whatever their labels."""
        return digest_bytes(np.sort(self.row_id).astype("<i8").tobytes())


def label_bytes(truth: Truth, target: str) -> bytes:
    """Return labels and weights, row by row: what scores hang on, beside the rows' ids."""
    labels = truth.labels[target]
    weight = np.ones(len(labels)) if truth.weight is None else truth.weight
    return np.column_stack([labels, weight]).astype("<f8").tobytes()


def unit_bytes(truth: Truth) -> bytes:
    """Return the units, row by row: with labels and rows, what resamples hang on."""
    return truth.unit_of_row.astype("<i8").tobytes()


def read_truth(
    table: Table, split: str, *, unit: UnitChoice, key: str, strata: str | None = None
) -> Truth:
    """Read labels, weights and units of ``split``; ``key`` is where params.yaml sets the unit.

    ``strata`` is the column whose values are the strata of the units, if there are any.

    ``unit`` auto follows the split that the contract records: days of the column of a time split,
    groups of the column of a grouped split, else rows.

    Raises:
        ConfigError: if the unit asked for needs a column that the contract does not have, or has
            twice and the split is by neither.
        DataError: no rows in the split; a weight that is missing, negative or not finite, or all
            weights 0; an infinite label.
    """
    contract = table.contract
    unit_name, unit_column = _choose_unit(contract, unit, key)
    rows = table.read(split, _columns(contract, unit_column, strata))
    if rows.num_rows == 0:
        raise DataError(
            f"{table.folder} has no {split} rows, and this stage needs them; "
            f"change `extract.split` in params.yaml so that {split} gets a share"
        )
    truth = _truth(rows, table, split, unit_name, unit_column)
    if truth.weight is not None:
        refuse_no_weight(contract, split, is_any=bool(truth.weight.any()))
    return replace(
        truth,
        unit_of_row=_unit_codes(rows, unit_column, unit_name),
        stratum=None if strata is None else _codes(rows[strata]),
    )


def stream_truth(table: Table, split: str, *, unit: UnitChoice, key: str) -> Iterator[Truth]:
    """Yield what ``read_truth`` reads, a batch at a time in the order of row ids.

    ``unit_of_row`` holds keys in place of codes: the row id, or a hash of the unit's value, so
    that a unit has one key in every batch.

    Raises:
        ConfigError, DataError: as ``read_truth``, for the rows of a batch.
        IntegrityError: if the row ids do not rise.
    """
    contract = table.contract
    unit_name, unit_column = _choose_unit(contract, unit, key)
    last: int | None = None
    for batch in table.batches(split, _columns(contract, unit_column)):
        rows = pa.Table.from_batches([batch])
        truth = replace(
            _truth(rows, table, split, unit_name, unit_column),
            unit_of_row=_unit_keys(rows, unit_column, unit_name),
        )
        if (np.diff(truth.row_id) <= 0).any() or (last is not None and truth.row_id[0] <= last):
            raise IntegrityError(
                f"{table.folder}: the {split} rows are not sorted by row id; run `headrace repro`"
            )
        last = int(truth.row_id[-1])
        yield truth


def refuse_no_weight(contract: Contract, split: str, *, is_any: bool) -> None:
    """Raise ``DataError`` unless some row of ``split`` has a weight above 0."""
    if not is_any:
        raise DataError(f"the weight column {contract.weight!r} is 0 in all {split} rows")


def line_up(
    predictions: Predictions, truth: Truth, is_needed: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return where the rows of ``truth`` that are needed stand in ``predictions``.

    ``predictions`` are those of the split of ``truth``. Shape: one position per needed row.

    Raises:
        DataError: if needed rows have no prediction, or predictions are of rows that the split
            does not have: with the count and the first row ids.
    """
    who = f"model {predictions.model!r}, target {predictions.target!r}"
    return places_of(predictions.row_id, truth, is_needed, who=who)


def places_of(
    row_id: npt.NDArray[np.int64], truth: Truth, is_needed: npt.NDArray[np.bool_], *, who: str
) -> npt.NDArray[np.int64]:
    """Return where the rows of ``truth`` that are needed stand in ``row_id``; as ``line_up``."""
    unknown = row_id[~np.isin(row_id, truth.row_id)]
    if len(unknown):
        raise DataError(
            f"{who}: {len(unknown)} predictions are of rows that the {truth.split} split does not "
            f"have; first row ids: {_first(unknown)}; run `headrace repro` to predict again"
        )
    needed = truth.row_id[is_needed]
    order = np.argsort(row_id, kind="stable")
    places = np.searchsorted(row_id, needed, sorter=order)
    found = np.zeros(len(needed), dtype=bool)
    is_inside = places < len(order)
    found[is_inside] = row_id[order[places[is_inside]]] == needed[is_inside]
    if not found.all():
        lost = needed[~found]
        raise DataError(
            f"{who}: {len(lost)} labelled {truth.split} rows have no prediction; "
            f"first row ids: {_first(lost)}; run `headrace repro` to predict again"
        )
    positions: npt.NDArray[np.int64] = order[places]
    return positions


def _columns(contract: Contract, *more: str | None) -> list[str]:
    wanted = [target.name for target in contract.targets]
    wanted += [name for name in (contract.weight, *more) if name is not None]
    return [ROW_ID, *dict.fromkeys(wanted)]


def _truth(
    rows: pa.Table, table: Table, split: str, unit_name: str, unit_column: str | None
) -> Truth:
    """Return labels and weights of ``rows``; each row is a unit yet."""
    contract = table.contract
    labels = {target.name: encode_target(rows[target.name], target) for target in contract.targets}
    infinite = [name for name, values in labels.items() if np.isinf(values).any()]
    if infinite:
        raise DataError(f"{table.folder}: targets {infinite} have infinite labels in {split} rows")
    return Truth(
        split=split,
        row_id=rows[ROW_ID].to_numpy(),
        labels=labels,
        weight=_weights(rows, contract, split),
        unit=unit_name,
        unit_of_row=np.arange(rows.num_rows),
        is_unit_of_time=_is_of_time(contract, unit_column),
        stratum=None,
    )


def _choose_unit(contract: Contract, unit: UnitChoice, key: str) -> tuple[str, str | None]:
    if unit == "auto":
        return _unit_of_split(contract)
    if unit == "row":
        return "row", None
    column = _column_of_role(contract, "group" if unit == "group" else "time", unit, key)
    if unit == "group":
        return column, column
    if not _is_temporal(contract, column):
        raise ConfigError(
            f"`{key}` is {unit}, but the time column {column!r} is "
            f"{contract.column(column).dtype}, which has no {unit}s; use auto or row"
        )
    return unit, column


def _unit_of_split(contract: Contract) -> tuple[str, str | None]:
    split = contract.split
    if split is None or split.column is None or split.kind not in ("time", "grouped"):
        return "row", None
    if split.kind == "time" and _is_temporal(contract, split.column):
        return "day", split.column
    return split.column, split.column  # a group; or a year, a week number: its values are blocks


def _column_of_role(
    contract: Contract, role: Literal["group", "time"], unit: UnitChoice, key: str
) -> str:
    """Return the split's column if it has ``role``, else the only column that has it."""
    names = contract.named(role)
    if contract.split is not None and contract.split.column in names:
        return contract.split.column
    if not names:
        raise ConfigError(f"`{key}` is {unit}, but the data contract has no {role} column")
    if len(names) > 1:
        raise ConfigError(
            f"`{key}` is {unit}, but the data contract has the {role} columns {list(names)} and "
            f"the split is by none of them; use auto or row, or leave the role {role} to one of "
            f"them in `extract.columns`"
        )
    return names[0]


def _is_of_time(contract: Contract, name: str | None) -> bool:
    """Whether values of the column follow each other in time: a date, or what a split is cut by."""
    split = contract.split
    by_time = (split.column,) if split is not None and split.kind == "time" else ()
    return name is not None and name in (*contract.named("time"), *by_time)


def _is_temporal(contract: Contract, name: str) -> bool:
    return contract.column(name).dtype.startswith(("timestamp", "date"))


def _unit_codes(rows: pa.Table, column: str | None, unit: str) -> npt.NDArray[np.int64]:
    if column is None:
        return np.arange(rows.num_rows, dtype=np.int64)
    return _codes(_floored(rows[column], unit))


def _floored(values: pa.ChunkedArray, unit: str) -> pa.ChunkedArray:
    # A column of numbers may be called "week" as well; its values are the units.
    is_floored = unit in _TIME_UNITS and pa.types.is_temporal(values.type)
    return pc.floor_temporal(values, unit=unit) if is_floored else values


def _unit_keys(rows: pa.Table, column: str | None, unit: str) -> npt.NDArray[np.int64]:
    if column is None:
        row_id: npt.NDArray[np.int64] = rows[ROW_ID].to_numpy()
        return row_id
    encoded = _floored(rows[column], unit).combine_chunks()
    if not pa.types.is_dictionary(encoded.type):
        encoded = pc.dictionary_encode(encoded, null_encoding="encode")
    names = encoded.dictionary.cast(pa.string()).to_pylist()
    # A null is a unit too; no name is its own, as names begin with a sign.
    keys = [_text_key("" if name is None else f"={name}") for name in names] + [_text_key("")]
    codes = encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)
    unit_key: npt.NDArray[np.int64] = np.array(keys, np.int64)[codes]
    return unit_key


def _text_key(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _codes(values: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    # Codes follow the values' order, so they do not depend on the order of rows; null is a unit.
    encoded = pc.dictionary_encode(values.combine_chunks(), null_encoding="encode")
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    found: npt.NDArray[np.int64] = position[codes]
    return found


def _weights(rows: pa.Table, contract: Contract, split: str) -> Floats | None:
    name = contract.weight
    if name is None:
        return None
    weight: Floats = rows[name].cast(pa.float64()).to_numpy()
    is_bad = ~np.isfinite(weight) | (weight < 0)
    if is_bad.any():
        row_ids = rows[ROW_ID].to_numpy()[is_bad]
        raise DataError(
            f"the weight column {name!r} is missing, negative or infinite in {len(row_ids)} "
            f"{split} rows; first row ids: {_first(row_ids)}; mend or drop these rows in the recipe"
        )
    return weight


def _first(row_ids: npt.NDArray[np.int64]) -> list[str]:
    return [str(row_id) for row_id in row_ids[:5]]
