"""The dtype plan: for each column the narrowest type that loses nothing, and the proof of it.

Deciding is pure: what one pass saw of a column (``ColumnRange``) goes in, the new type and its
error certificate come out. ``cast_column`` then does what the plan says, with Arrow's checked
casts, so that a plan that does not fit the data is an error and never a changed number.

The rules, in short:

- An integer gets the narrowest type, signed or unsigned, that holds its smallest and largest value.
- A float whose values are whole numbers becomes an integer where that is narrower; NaN becomes
  null, for both mean "no value". A key, group, category or class does so at any width: two ids
  that differ must never become one.
- Any other float becomes float32 if every value survives it bit for bit, or if the caller allows a
  relative error that covers the worst one. float16 is never chosen, only granted to who asks.
- A text becomes codes of a dictionary, sorted by text, where that saves a quarter of its bytes.
- What cannot be narrowed without loss stays as it is: a decimal with a fraction, a time, bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.data.ranges import ColumnRange, NarrowFloat, Number, is_list, is_text
from headrace.errors import SchemaError, nearest
from headrace.schema import Role, arrow_type

Dtype: TypeAlias = Literal[
    "keep", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "string", "category",
]  # fmt: skip

_DISCRETE: tuple[Role, ...] = ("key", "group", "category")  # equal or not is what counts
_MAY_LOSE: tuple[Role, ...] = ("numeric", "vector", "weight", "ignore")
_SPELLED_OUT: tuple[Role, ...] = ("text", "vector")  # read as text by who uses them
_INTEGERS = (
    pa.uint8(), pa.int8(), pa.uint16(), pa.int16(), pa.uint32(), pa.int32(), pa.uint64(),
    pa.int64(),
)  # fmt: skip
_EXACT_IN_FLOAT = {pa.float16(): 1 << 11, pa.float32(): 1 << 24, pa.float64(): 1 << 53}
_WORTH_A_DICTIONARY = 0.75  # of the bytes of the plain texts; each row group repeats it on disk


@dataclass(frozen=True)
class ColumnPlan:
    """What becomes of one column, and the certificate of what that costs."""

    seen: ColumnRange
    after: pa.DataType
    worst_rel_error: float = 0.0
    key_collisions: int | None = None  # ids that became another id; None where there are no ids
    remark: str = ""

    @property
    def name(self) -> str:
        """Name of the column."""
        return self.seen.name

    @property
    def before(self) -> pa.DataType:
        """Type the column came with."""
        return self.seen.dtype

    @property
    def bytes_before(self) -> int:
        """Bytes of the column in memory as it came."""
        return self.seen.bytes_as(self.before)

    @property
    def bytes_after(self) -> int:
        """Bytes of the column in memory as planned."""
        return self.seen.bytes_as(self.after)

    @property
    def categories(self) -> Any:
        """The texts in the order of their codes (a pyarrow array), if the column becomes codes."""
        return self.seen.categories if pa.types.is_dictionary(self.after) else None

    def certificate(self) -> dict[str, Any]:
        """Return the plan of the column as ``plan.json`` holds it."""
        seen = self.seen
        return {
            "from": str(self.before),
            "to": str(self.after),
            "nulls": seen.num_nulls,
            "nans": seen.num_nans,
            "low": _json_number(seen.low),
            "high": _json_number(seen.high),
            "worst_rel_error": self.worst_rel_error,
            "key_collisions": self.key_collisions,
            "categories": None if self.categories is None else len(self.categories),
            "remark": self.remark,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def plan_dtypes(
    ranges: Sequence[ColumnRange],
    roles: Mapping[str, Role],
    *,
    max_rel_error: float = 0.0,
    overrides: Mapping[str, Dtype] | None = None,
) -> tuple[ColumnPlan, ...]:
    """Choose the type of every column.

    Args:
        ranges: What was seen of each column.
        roles: Role of each column, by name.
        max_rel_error: Worst relative error a numeric feature or weight may suffer; 0 is lossless.
            Keys, groups, categories, times and targets are kept exactly, whatever it is.
        overrides: Types that are wished for by name; ``"keep"`` leaves a column as it is.

    Raises:
        SchemaError: if an override names no column or a type that cannot hold what was seen.
    """
    wished = dict(overrides or {})
    names = [seen.name for seen in ranges]
    unknown = [name for name in wished if name not in names]
    if unknown:
        raise SchemaError(
            f"`reduce.overrides` in params.yaml names {unknown}, which the table does not have"
            f"{nearest(unknown[0], names)}"
        )
    plans = []
    for seen in ranges:
        role = roles[seen.name]
        wish = wished.get(seen.name)
        allowed = max_rel_error if role in _MAY_LOSE else 0.0
        after = _wished(seen, role, wish) if wish else narrowest(seen, role, max_rel_error=allowed)
        plans.append(
            ColumnPlan(
                seen=seen,
                after=after,
                worst_rel_error=_error_of(seen, after),
                # Integers and dictionaries give different ids different codes; nothing else is
                # chosen for an id, so this is a statement about the plan and not a measurement.
                key_collisions=0 if role in ("key", "group") else None,
                remark=_remark(seen, role),
            )
        )
    return tuple(plans)


def narrowest(seen: ColumnRange, role: Role, *, max_rel_error: float) -> pa.DataType:
    """Return the narrowest type for a column that keeps ``max_rel_error``."""
    kind = seen.dtype
    if is_text(kind):
        return _narrowest_text(seen, role)
    if is_list(kind):
        item = _narrowest_item(seen, kind.value_type, max_rel_error)
        return kind if item == kind.value_type else _list_of(item, kind)
    if pa.types.is_floating(kind):
        return _narrowest_float(seen, kind, role in _DISCRETE, max_rel_error)
    if pa.types.is_integer(kind):
        integer = smallest_integer(seen.low, seen.high)
        return integer if integer is not None and integer.bit_width < kind.bit_width else kind
    if pa.types.is_decimal(kind):
        return _narrowest_decimal(seen, kind, max_rel_error)
    return pa.date32() if pa.types.is_date64(kind) else kind


def smallest_integer(low: Number | None, high: Number | None) -> pa.DataType | None:
    """Return the narrowest integer type that holds ``low`` to ``high``, or None.

    >>> smallest_integer(0, 255), smallest_integer(-1, 127), smallest_integer(-1, 128)
    (DataType(uint8), DataType(int8), DataType(int16))
    """
    if low is None or high is None:
        return pa.int8()
    for dtype in _INTEGERS:
        least, most = _bounds(dtype)
        if least <= int(low) and int(high) <= most:
            return dtype
    return None


def cast_column(array: pa.Array, plan: ColumnPlan) -> pa.Array:
    """Return the values of a batch's column in the planned type.

    Raises:
        pyarrow.ArrowInvalid: if a value does not fit, that is, if the plan was made from other
            data.
    """
    after = plan.after
    if array.type == after:
        return array
    if pa.types.is_dictionary(after):
        return _to_codes(array, plan.categories, after)
    if pa.types.is_dictionary(array.type):
        return array.dictionary_decode().cast(after)
    if pa.types.is_floating(array.type) and pa.types.is_integer(after):
        return _nan_to_null(array).cast(after)
    if pa.types.is_decimal(array.type) and not pa.types.is_floating(after):
        return array.cast(pa.int64()).cast(after)
    if pa.types.is_decimal(array.type):
        return array.cast(pa.float64()).cast(after)
    return array.cast(after)


def _narrowest_float(
    seen: ColumnRange, kind: pa.DataType, is_discrete: bool, max_rel_error: float
) -> pa.DataType:
    if seen.num_values == 0:
        return pa.float32() if kind.bit_width > 32 else kind
    integer = smallest_integer(seen.low, seen.high) if seen.is_whole else None
    if is_discrete:
        return kind if integer is None else integer
    is_float32_enough = seen.is_float32 or (
        max_rel_error > 0 and seen.error("float32") <= max_rel_error
    )
    float_width = min(kind.bit_width, 32 if is_float32_enough else 64)
    if integer is not None and integer.bit_width < float_width:
        return integer
    return pa.float32() if float_width < kind.bit_width else kind


def _narrowest_item(seen: ColumnRange, kind: pa.DataType, max_rel_error: float) -> pa.DataType:
    """Items of vectors stay floats: a vector that happens to be whole is still a vector."""
    if not pa.types.is_float64(kind):
        return kind
    is_enough = seen.is_float32 or (max_rel_error > 0 and seen.error("float32") <= max_rel_error)
    return pa.float32() if is_enough else kind


def _narrowest_decimal(seen: ColumnRange, kind: pa.DataType, max_rel_error: float) -> pa.DataType:
    integer = smallest_integer(seen.low, seen.high) if seen.is_whole else None
    if integer is not None and integer != pa.uint64():  # Arrow casts decimals by way of int64
        return integer
    if max_rel_error > 0 and seen.error("float32") <= max_rel_error:
        return pa.float32()
    # A decimal of up to 15 digits is within half a unit in the last place of a double.
    is_double_enough = max_rel_error >= float(np.finfo(np.float64).eps)
    return pa.float64() if is_double_enough else kind


def _narrowest_text(seen: ColumnRange, role: Role) -> pa.DataType:
    if role in _SPELLED_OUT or seen.categories is None or len(seen.categories) == 0:
        return seen.dtype
    dictionary = _dictionary_of(seen.categories)
    if pa.types.is_dictionary(seen.dtype):
        return dictionary
    is_worth_it = seen.bytes_as(dictionary) <= _WORTH_A_DICTIONARY * seen.bytes_as(pa.string())
    return dictionary if is_worth_it else seen.dtype


def _dictionary_of(categories: pa.Array) -> pa.DataType:
    # Signed, as pandas has its codes: then a frame shares them without a copy.
    last = len(categories) - 1
    index = next(t for t in (pa.int8(), pa.int16(), pa.int32()) if last < 1 << (t.bit_width - 1))
    return pa.dictionary(index, pa.string())


def _list_of(item: pa.DataType, like: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_list(like):
        return pa.list_(item, like.list_size)
    return pa.large_list(item) if pa.types.is_large_list(like) else pa.list_(item)


def _bounds(integer: pa.DataType) -> tuple[int, int]:
    limits = np.iinfo(integer.to_pandas_dtype())
    return int(limits.min), int(limits.max)


def _wished(seen: ColumnRange, role: Role, wish: Dtype) -> pa.DataType:
    """The type that was asked for, if it can hold what was seen."""
    where = f"`reduce.overrides.{seen.name}: {wish}` in params.yaml"
    if wish == "keep":
        return seen.dtype
    if is_text(seen.dtype) or wish in ("string", "category"):
        return _wished_text(seen, wish, where)
    after = pa.float64() if wish == "float64" else arrow_type(_ARROW_NAMES.get(wish, wish))
    is_number = pa.types.is_integer(seen.dtype) or pa.types.is_floating(seen.dtype)
    if not is_number and not pa.types.is_decimal(seen.dtype):
        raise SchemaError(f"{where} cannot be: the column is {seen.dtype}; remove the line")
    if pa.types.is_integer(after):
        _require_integer(seen, after, where)
    else:
        _require_float(seen, role, after, where)
    return after


_ARROW_NAMES: Mapping[str, str] = {"float16": "halffloat", "float32": "float"}


def _wished_text(seen: ColumnRange, wish: Dtype, where: str) -> pa.DataType:
    if not is_text(seen.dtype) or wish not in ("string", "category"):
        raise SchemaError(f"{where} cannot be: the column is {seen.dtype}; remove the line")
    if wish == "string":
        return pa.string()
    if seen.categories is None:
        raise SchemaError(
            f"{where} cannot be: the column has more distinct texts than `reduce.max_categories` "
            f"or than 32 MiB hold; raise it, or remove the line"
        )
    return _dictionary_of(seen.categories)


def _require_integer(seen: ColumnRange, after: pa.DataType, where: str) -> None:
    if not pa.types.is_integer(seen.dtype) and not seen.is_whole:
        raise SchemaError(f"{where} cannot be: the column has values that are no whole numbers")
    if seen.low is None or seen.high is None:
        return
    least, most = _bounds(after)
    wrong = [x for x in (int(seen.low), int(seen.high)) if not least <= x <= most]
    if wrong:
        raise SchemaError(
            f"{where} cannot be: the column holds {wrong[0]}, {after} holds {least} to "
            f"{most}; ask for {smallest_integer(seen.low, seen.high)}"
        )


def _require_float(seen: ColumnRange, role: Role, after: pa.DataType, where: str) -> None:
    if role not in _MAY_LOSE:
        raise SchemaError(
            f"{where} cannot be: the column is a {role}, which is kept exactly; remove the line"
        )
    if pa.types.is_integer(seen.dtype):
        limit = _EXACT_IN_FLOAT[after]
        wrong = [x for x in (int(seen.low or 0), int(seen.high or 0)) if abs(x) > limit]
        if wrong:
            raise SchemaError(
                f"{where} cannot be: the column holds the integer {wrong[0]}, {after} is exact up "
                f"to {limit}; ask for {smallest_integer(seen.low, seen.high)}"
            )
        return
    if _error_of(seen, after) >= 1.0:
        raise SchemaError(
            f"{where} cannot be: the column holds {seen.low} to {seen.high}, and in {after} some "
            f"of its values would become infinite or 0; ask for a wider type"
        )


def _error_of(seen: ColumnRange, after: pa.DataType) -> float:
    """The worst relative error of going to ``after``, as it was measured."""
    before = seen.dtype
    if is_list(before):
        before, after = before.value_type, after.value_type
    if not pa.types.is_floating(after) or pa.types.is_integer(before) or before == after:
        return 0.0
    if pa.types.is_decimal(before) and after == pa.float64():
        return float(np.finfo(np.float64).eps)
    if after.bit_width >= before.bit_width and pa.types.is_floating(before):
        return 0.0
    narrow: NarrowFloat = "float16" if after == pa.float16() else "float32"
    return seen.error(narrow)


def _remark(seen: ColumnRange, role: Role) -> str:
    if (
        seen.num_rows
        and seen.num_nulls + seen.num_nans >= seen.num_rows
        and not is_list(seen.dtype)
    ):
        return "has no value"
    if seen.is_infinite:
        return "holds infinite values"
    if role in ("key", "group") and pa.types.is_floating(seen.dtype):
        if not seen.is_whole:
            return "is an id that is no whole number; kept as it is"
        if max(abs(float(seen.high or 0)), abs(float(seen.low or 0))) > 1 << 53:
            return "is an id above 2^53 that came as float64; it may have been rounded before"
    is_constant = seen.low is not None and seen.low == seen.high
    if seen.categories is not None and len(seen.categories) == 1:
        is_constant = True
    return "is constant" if is_constant and seen.num_values == seen.num_rows else ""


def _nan_to_null(array: pa.Array) -> pa.Array:
    is_nan = pc.is_nan(array)
    return pc.if_else(is_nan, pa.scalar(None, array.type), array)


def _to_codes(array: pa.Array, categories: pa.Array, after: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        codes = pc.index_in(array.dictionary, value_set=categories).take(array.indices)
    else:
        codes = pc.index_in(array, value_set=categories)
    if codes.null_count != array.null_count:
        raise pa.ArrowInvalid("a text that the dtype plan has not seen")
    return pa.DictionaryArray.from_arrays(codes.cast(after.index_type), categories)


def _json_number(value: Number | None) -> int | float | str | None:
    """JSON has neither infinities nor decimals, and readers of it round above 2^53."""
    if value is None:
        return None
    if isinstance(value, Decimal) or (isinstance(value, float) and not np.isfinite(value)):
        return str(value)
    return str(value) if isinstance(value, int) and abs(value) > 1 << 53 else value
