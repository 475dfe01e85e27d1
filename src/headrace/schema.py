"""The data contract: what every column is, written by ``extract`` and read by every later stage.

It travels with the table, with the encoded shards and with the published model, so that no stage
guesses again what a column means. Physical types are Arrow types, written as Arrow writes them.
"""

from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError, model_validator

from headrace.errors import IntegrityError, SchemaError, nearest
from headrace.params import Section
from headrace.storage import canonical_json, digest_bytes, read_json

CONTRACT = "contract.json"
ROW_ID = "row_id"  # int64, first column of every table and every prediction file
FOLD = "fold"  # int8, null outside the train split
SPLITS = ("train", "valid", "test", "gap")

Role = Literal[
    "key", "time", "group", "numeric", "category", "text", "vector", "target", "weight", "ignore"
]
Task = Literal["regression", "binary", "multiclass"]
FEATURE_ROLES: tuple[Role, ...] = ("numeric", "category")


class Column(Section):
    """One column of the table: its role, its Arrow type and what was seen in the train rows."""

    name: str
    role: Role
    dtype: str  # as ``str(pyarrow.DataType)``: int64, double, string, bool, timestamp[us], …
    nullable: bool = True
    note: str = ""  # unit or remark, free text
    low: float | None = None  # smallest and largest value seen, numbers only
    high: float | None = None
    cardinality: int | None = None  # distinct values seen, categories only


class Target(Section):
    """What is to be predicted from which column, and for classes their labels in code order.

    ``labels[i]`` is the text of class ``i``. In a binary task ``labels[1]`` is the positive class.
    """

    name: str
    task: Task
    labels: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _labels_fit_task(self) -> Self:
        expected = {"regression": len(self.labels) == 0, "binary": len(self.labels) == 2}
        if not expected.get(self.task, len(self.labels) >= 3):
            raise ValueError(f"a {self.task} target cannot have {len(self.labels)} labels")
        return self

    @property
    def num_outputs(self) -> int:
        """Columns a prediction of this target has: 1 (value or P(positive)) or one per class."""
        return len(self.labels) if self.task == "multiclass" else 1


class Split(Section):
    """How rows were divided into train, valid and test, and by which column if by one."""

    kind: Literal["random", "stratified", "grouped", "time", "given"]
    column: str | None = None


class Contract(Section):
    """All columns of the table in their order, but ``row_id`` and ``fold``; and the targets.

    ``split`` is None in a contract written before it was recorded.
    """

    format: Literal[1] = 1
    columns: Annotated[tuple[Column, ...], Field(strict=False)]
    targets: Annotated[tuple[Target, ...], Field(strict=False, min_length=1)]
    split: Split | None = None

    def column(self, name: str) -> Column:
        """Return the column called ``name``.

        Raises:
            SchemaError: if there is none, with the nearest name.
        """
        for column in self.columns:
            if column.name == name:
                return column
        names = [column.name for column in self.columns]
        raise SchemaError(f"the data contract has no column {name!r}{nearest(name, names)}")

    def target(self, name: str) -> Target:
        """Return the target called ``name``.

        Raises:
            SchemaError: if there is none, with the nearest name.
        """
        for target in self.targets:
            if target.name == name:
                return target
        names = [target.name for target in self.targets]
        raise SchemaError(f"the data contract has no target {name!r}{nearest(name, names)}")

    def named(self, *roles: Role) -> tuple[str, ...]:
        """Return the names of the columns in ``roles``, in table order."""
        return tuple(column.name for column in self.columns if column.role in roles)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns models learn from: numeric and category, in table order."""
        return self.named(*FEATURE_ROLES)

    @property
    def weight(self) -> str | None:
        """Name of the row weight column, if there is one."""
        return next(iter(self.named("weight")), None)

    @property
    def digest(self) -> str:
        """Digest of the whole contract, as footers and manifests carry it."""
        return digest_bytes(self.to_json().encode())

    def to_json(self) -> str:
        """Return the canonical JSON text of the contract; one without a split keeps its digest."""
        absent = {"split"} if self.split is None else None
        return canonical_json(self.model_dump(mode="json", exclude=absent))


def read_contract(folder: Path) -> Contract:
    """Read ``contract.json`` of a stage's folder.

    Raises:
        IntegrityError: if it is missing, no JSON, or of a form this version does not read.
    """
    path = folder / CONTRACT
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") != 1:
        raise IntegrityError(
            f"{path} has contract format {content.get('format')}; this headrace reads format 1: "
            f"run `headrace upgrade`, then `headrace repro`"
        )
    try:
        return Contract.model_validate(content)
    except ValidationError as error:
        raise IntegrityError(f"{path} is not a data contract ({error})") from error


def file_stem(name: str) -> str:
    """Return the file name, less its ending, that stands for ``name``, whatever it consists of.

    ASCII letters, digits, ``.``, ``_`` and ``-`` stay, the rest is percent-escaped as UTF-8, and
    so is a dot in front; no two names have the same stem.

    >>> file_stem("late"), file_stem("km/h"), file_stem("..")
    ('late', 'km%2Fh', '%2E.')
    """
    stem = quote(name, safe="").replace("~", "%7E")
    return f"%2E{stem[1:]}" if stem.startswith(".") else stem or "%"


def arrow_type(name: str) -> pa.DataType:
    """Turn the text of an Arrow type back into the type; the inverse of ``str(type)``.

    >>> arrow_type("timestamp[us]") == pa.timestamp("us")
    True
    """
    if name.startswith("dictionary<"):
        fields = dict(part.split("=") for part in name[len("dictionary<") : -1].split(", "))
        return pa.dictionary(arrow_type(fields["indices"]), arrow_type(fields["values"]))
    if name.startswith("list<"):
        return pa.list_(arrow_type(name[name.index(": ") + 2 : -1]))
    if name.startswith("timestamp["):
        unit, _, zone = name[len("timestamp[") : -1].partition(", tz=")
        return pa.timestamp(unit, tz=zone or None)
    if name.startswith("decimal128("):
        precision, scale = name[len("decimal128(") : -1].split(",")
        return pa.decimal128(int(precision), int(scale))
    plain = {"date32[day]": pa.date32(), "time64[us]": pa.time64("us"), "double": pa.float64()}
    plain |= {"float": pa.float32(), "halffloat": pa.float16(), "bool": pa.bool_()}
    return plain[name] if name in plain else pa.type_for_alias(name)


def label_text(values: pa.Array) -> pa.Array:
    """Return the canonical text of each label or category, null where it is null or NaN.

    Each value decides, not its type or its batch: whole numbers are written without point or
    exponent, so 3, 3.0, a decimal 3.00 and "3" are one label; other numbers as the shortest decimal
    that reads back the same; booleans are "false" and "true"; text is itself, the empty one too.

    >>> label_text(pa.array([3.0, 0.5, -0.0, None])).to_pylist()
    ['3', '0.5', '0', None]
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        return label_text(values.dictionary).take(values.indices)
    if pa.types.is_float16(kind):
        return _float_text(values.cast(pa.float32()))
    if pa.types.is_floating(kind):
        return _float_text(values)
    if pa.types.is_decimal(kind):
        return _decimal_text(values)
    return values.cast(pa.string())


def _float_text(values: pa.Array) -> pa.Array:
    is_whole = pc.and_(pc.equal(values, pc.floor(values)), pc.less(pc.abs(values), 2.0**63))
    zero = pa.scalar(0, values.type)
    whole = pc.if_else(pc.fill_null(is_whole, False), values, zero).cast(pa.int64())
    text = pc.if_else(is_whole, whole.cast(pa.string()), values.cast(pa.string()))
    return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.string()), text)


def _decimal_text(values: pa.Array) -> pa.Array:
    text = values.cast(pa.string())
    digits = pc.replace_substring_regex(text, r"E.*|^[-0.]+|[.]", "")
    text = pc.replace_substring_regex(text, r"(\.[0-9]*?)0+$", r"\1")
    text = pc.replace_substring_regex(text, r"\.$", "")
    # A float holds 15 digits exactly; with more, two labels could become one.
    is_short = pc.less_equal(pc.utf8_length(pc.utf8_rtrim(digits, "0")), 15)
    is_whole = pc.match_substring_regex(text, r"^-?[0-9]+$")
    as_float = _float_text(text.cast(pa.float64()))  # the cast of decimals themselves is rougher
    return pc.if_else(pc.and_not(is_short, is_whole), as_float, text)


def _rows_of(text: pa.Array, is_wanted: pa.Array, indices: pa.Array) -> dict[str, int]:
    """Return how many rows have the first texts of a dictionary that are wanted and used."""
    of_row = pc.drop_null(indices).to_numpy().astype(np.int64)
    num_rows = np.bincount(of_row, minlength=len(text))
    wanted = np.flatnonzero((num_rows > 0) & is_wanted.to_numpy(zero_copy_only=False))
    return {text[i].as_py(): int(num_rows[i]) for i in wanted[:5].tolist()}


def encode_target(values: pa.Array | pa.ChunkedArray, target: Target) -> npt.NDArray[np.float64]:
    """Return target values as float64: the value itself, or the class code; NaN where null.

    Shape: one number per row.

    Raises:
        SchemaError: if a class is not among the contract's labels, with the number of its rows.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if target.task == "regression":
        out: npt.NDArray[np.float64] = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
        return out
    # A class is looked up once per batch, not once per row: as text that cost four times as much.
    kind = values.type
    if pa.types.is_float16(kind):  # Arrow cannot hash it
        values = values.cast(pa.float32())
    if not pa.types.is_dictionary(kind):
        values = values.dictionary_encode()
    text = label_text(values.dictionary)
    codes_of_text = pc.index_in(text, value_set=pa.array(target.labels, pa.string()))
    codes = codes_of_text.take(values.indices)
    unknown = pc.and_(pc.is_null(codes_of_text), pc.is_valid(text))
    if pc.any(unknown).as_py() and (found := _rows_of(text, unknown, values.indices)):
        rows = ", ".join(f"{label!r} (rows here: {count})" for label, count in found.items())
        raise SchemaError(
            f"target {target.name!r} has classes that the train rows do not have: {rows}; known: "
            f"{list(target.labels)}; leave such rows out in the recipe or put the class together "
            f"with another, then `headrace repro`"
        )
    result: npt.NDArray[np.float64] = codes.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return result
