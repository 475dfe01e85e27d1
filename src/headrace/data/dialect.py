"""How a CSV file is written: its dialect, the files of a source, and what was read of them.

The dialect is explicit. What a look at the first rows proposes goes to params.yaml for review and
is never used to read: DuckDB's reader, left to its sniffing, drops rows that do not fit its guess.
"""

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from headrace.params import Bytes, Section

NULL_MARKS = ("NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "?", "-")
_TYPE = re.compile(r"^[A-Za-z][A-Za-z0-9_ ]*(\(\s*\d+\s*(,\s*\d+\s*)?\))?$")


def _known_type(value: str) -> str:
    if not _TYPE.match(value):
        raise ValueError("not an SQL type; write for example BIGINT, DOUBLE, VARCHAR, DATE")
    return value


SqlType = Annotated[str, AfterValidator(_known_type)]


class Dialect(Section):
    """How the CSV files of a source are written, and the types of their columns by name.

    An empty field is always missing; ``nulls`` names further texts that mean missing.
    """

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    quote: Annotated[str, Field(max_length=1)] = '"'  # empty: fields are never quoted
    names: Annotated[tuple[str, ...], Field(strict=False)] = ()  # for files without a header line
    skip: Annotated[int, Field(ge=0)] = 0  # lines before the header or the first row
    nulls: Annotated[tuple[str, ...], Field(strict=False)] = ()
    encoding: Literal["utf-8", "latin-1", "utf-16"] = "utf-8"
    trim: bool = False  # cut blanks around every value
    max_line: Bytes = 2 << 20  # a longer line is a fault
    types: dict[str, SqlType] = Field(
        default_factory=dict
    )  # SQL types by column; found from all values where not given

    @model_validator(mode="after")
    def _marks_differ(self) -> Self:
        if self.quote == self.delimiter:
            raise ValueError("quote and delimiter must differ")
        return self


@dataclass(frozen=True)
class File:
    """A file of a source: its path, and its name as messages and outs call it."""

    path: Path
    name: str


@dataclass(frozen=True)
class Reject:
    """A row that was not read: where it is, which column is at fault, why, and its text."""

    file: str
    line: int
    column: str
    reason: str
    text: str


@dataclass(frozen=True)
class LoadedFile:
    """What was read from one file."""

    file: File
    digest: str
    num_rows_in: int
    num_rows_kept: int


@dataclass
class Loaded:
    """What was read from the files of one source."""

    types: dict[str, str]
    files: list[LoadedFile] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write ``rejects.csv``: one line per rejected row; with only a header if there is none."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["file", "line", "column", "reason", "text"])
        for reject in rejects:
            writer.writerow([reject.file, reject.line, reject.column, reject.reason, reject.text])
