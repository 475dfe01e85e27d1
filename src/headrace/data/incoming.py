"""New rows in memory, checked and brought to the types a model was trained on.

The rows that are to be predicted come with the columns of the *extract* contract, targets left
out. Each input column is checked by the family of its type there: a whole number may come in any
integer type, or as a float without a fraction (what pandas makes of integers beside a null). Then
it gets the narrower type of ``reduce`` where every value of it survives that exactly; otherwise it
keeps the wide type, so that a value the train rows never reached is neither cut nor refused.

Columns nobody asked for are ignored. All faults of a table are told in one message.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from headrace.errors import SchemaError, nearest
from headrace.params import Section
from headrace.schema import Role, arrow_type

if TYPE_CHECKING:
    import pandas as pd


class InputColumn(Section):
    """One column a model reads: its type in the extracted table and in the reduced one."""

    name: str
    role: Role
    dtype: str
    reduced: str

    @property
    def type(self) -> pa.DataType:
        """The type that new rows have, dictionaries spelled out."""
        kind = arrow_type(self.dtype)
        return kind.value_type if pa.types.is_dictionary(kind) else kind


def conform(rows: pa.Table, inputs: Sequence[InputColumn]) -> pa.Table:
    """Return the input columns of ``rows`` in their order, each in the narrower type that holds it.

    Raises:
        SchemaError: naming each column that is missing (with the nearest name), comes twice, has
            another type, or holds a value that its type cannot be.
    """
    require_columns(rows.column_names, inputs)
    columns: dict[str, pa.Array] = {}
    faults = []
    for wanted in inputs:
        try:
            wide = _widened(_whole(rows.column(wanted.name)), wanted)
            columns[wanted.name] = _narrowed(wide, arrow_type(wanted.reduced))
        except (_FaultError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as fault:
            faults.append(f"{wanted.name!r} should be {wanted.type}, but {_first_line(fault)}")
    _refuse(faults)
    return pa.table(columns)


def from_pandas(frame: "pd.DataFrame", inputs: Sequence[InputColumn]) -> pa.Table:
    """Return the input columns of a pandas frame as Arrow; its index is ignored.

    Raises:
        SchemaError: naming each column that is missing, comes twice or mixes types.
    """
    names = [str(name) for name in frame.columns]
    require_columns(names, inputs)
    columns: dict[str, pa.Array] = {}
    faults = []
    for wanted in inputs:
        series = frame.iloc[:, names.index(wanted.name)]
        try:
            columns[wanted.name] = pa.array(series, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            faults.append(f"{wanted.name!r} mixes types ({_first_line(error)})")
    _refuse(faults)
    return pa.table(columns)


def require_columns(present: Sequence[str], inputs: Sequence[InputColumn]) -> None:
    """Refuse rows without an input column, or with one twice.

    Raises:
        SchemaError: naming all of them, with the nearest name to the first one missing.
    """
    wanted = [column.name for column in inputs]
    missing = [name for name in wanted if name not in present]
    if missing:
        raise SchemaError(
            f"the rows lack the columns {missing}, which the model reads"
            f"{nearest(missing[0], present)}"
        )
    doubled = [name for name in wanted if list(present).count(name) > 1]
    if doubled:
        raise SchemaError(f"the rows have the columns {doubled} twice; keep one of each")


class _FaultError(Exception):
    """A column cannot be what the contract says."""


def _whole(column: pa.ChunkedArray) -> pa.Array:
    values = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # of more than 2 GB of text, or of no chunk
        values = pa.concat_arrays(values.chunks) if values.num_chunks else values.type
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    is_long = pa.types.is_large_string(values.type) or pa.types.is_string_view(values.type)
    return values.cast(pa.string()) if is_long else values


def _widened(values: pa.Array, wanted: InputColumn) -> pa.Array:
    """Return ``values`` in the family of the extracted type, none of them changed."""
    kind, found = wanted.type, values.type
    if pa.types.is_null(found):
        return pa.nulls(len(values), kind)
    if found == kind:
        return values
    families: list[tuple[Callable[[pa.DataType], bool], Callable[[pa.Array], pa.Array]]] = [
        (pa.types.is_integer, lambda v: _integers(v, kind)),
        (pa.types.is_floating, _floats),
        (pa.types.is_decimal, _floats if wanted.role == "numeric" else _numbers_as_they_are),
        (pa.types.is_boolean, _booleans),
        (pa.types.is_temporal, lambda v: _times(v, kind)),
    ]
    for is_family, widen in families:
        if is_family(kind):
            return widen(values)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        if not pa.types.is_string(found):
            raise _FaultError(f"is {found}")
        return values
    raise _FaultError(f"is {found}")


def _integers(values: pa.Array, kind: pa.DataType) -> pa.Array:
    found = values.type
    if pa.types.is_integer(found):
        return values
    if not (pa.types.is_floating(found) or pa.types.is_decimal(found)):
        raise _FaultError(f"is {found}")
    if pa.types.is_floating(found):
        values = _without_nan(values)
    fraction = pc.not_equal(values, pc.floor(values))
    if pc.any(fraction).as_py():
        first = values.filter(fraction)[0].as_py()
        raise _FaultError(f"holds {first}, which is no whole number")
    is_unsigned = pa.types.is_unsigned_integer(kind) and kind.bit_width == 64
    return values.cast(pa.uint64() if is_unsigned else pa.int64())


def _floats(values: pa.Array) -> pa.Array:
    values = _numbers_as_they_are(values)
    return values if pa.types.is_floating(values.type) else values.cast(pa.float64(), safe=False)


def _numbers_as_they_are(values: pa.Array) -> pa.Array:
    kind = values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return values
    raise _FaultError(f"is {kind}")


def _booleans(values: pa.Array) -> pa.Array:
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise _FaultError(f"is {kind}")
    if pa.types.is_floating(kind):
        values = _without_nan(values)
    other = pc.and_(pc.not_equal(values, 0), pc.not_equal(values, 1))
    if pc.any(other).as_py():
        raise _FaultError(f"holds {values.filter(other)[0].as_py()}, which is neither 0 nor 1")
    return pc.equal(values, 1)


def _times(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if not (pa.types.is_temporal(values.type) or pa.types.is_string(values.type)):
        raise _FaultError(f"is {values.type}")
    return values.cast(kind)


def _narrowed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Return ``values`` as ``kind`` if that changes none of them, else as they are."""
    if values.type == kind or pa.types.is_dictionary(kind):
        # A dictionary is a way to store text: what was text stays text, known or not.
        return values
    source = values
    if pa.types.is_floating(values.type) and pa.types.is_integer(kind):
        source = _without_nan(values)
    try:
        narrow = source.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return values
    if not pa.types.is_floating(kind) or kind.bit_width >= _width(values.type):
        return narrow
    is_same = pc.equal(narrow.cast(values.type), values)
    is_nan = pc.is_nan(values) if pa.types.is_floating(values.type) else pa.scalar(False)
    return narrow if pc.all(pc.or_(is_same, is_nan)).as_py() is not False else values


def _without_nan(values: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def _width(kind: pa.DataType) -> int:
    return int(kind.bit_width) if pa.types.is_primitive(kind) else 64


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise SchemaError(
            f"the rows do not fit the model's contract: {'; '.join(faults)}. Bring them to the "
            f"types that the training data had"
        )
