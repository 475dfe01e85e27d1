"""Proposing how a CSV file is written, from its first rows, for a person to review.

Never used to read: ``headrace init`` writes the proposal into params.yaml, and it is read by that.
"""

import codecs
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from headrace.data.csvbytes import lines_of, raw_blocks
from headrace.data.delimited import DELIMITERS, is_number
from headrace.data.dialect import NULL_MARKS, Dialect
from headrace.errors import DataError

_GUESS_ROWS = 200_000


def propose_dialect(path: Path) -> Dialect:
    """Guess how the CSV file ``path`` is written, from its first rows, for a person to review.

    Never used to read: what is proposed is written into params.yaml, and read strictly by it.
    """
    encoding = _guess_encoding(path)
    lines = list(itertools.islice(lines_of(path, encoding), 200))
    if not lines:
        raise DataError(f"{path.name} is empty; give a file with a header line and rows")
    counts = {mark: _even_count(lines, mark) for mark in DELIMITERS}
    delimiter = max(counts, key=lambda mark: counts[mark])
    rows = list(csv.reader(lines, delimiter=delimiter))
    is_headless = any(is_number(value) for value in rows[0])
    names = tuple(f"column_{i + 1}" for i in range(len(rows[0]))) if is_headless else ()
    has_blanks = any(value != value.strip() for row in rows[not is_headless :] for value in row)
    nulls = _guess_nulls(path, encoding, delimiter)
    return Dialect(
        delimiter=delimiter if counts[delimiter] else ",",
        names=names,
        nulls=tuple(sorted(nulls)),
        encoding=encoding,
        trim=has_blanks,
    )


def _guess_encoding(path: Path) -> Literal["utf-8", "latin-1", "utf-16"]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for number, block in enumerate(raw_blocks(path)):
        if number == 0 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return "utf-16"
        try:
            decoder.decode(block)
        except UnicodeDecodeError:
            return "latin-1"
    return "utf-8"


def _guess_nulls(path: Path, encoding: str, delimiter: str) -> set[str]:
    """Return the null marks that stand alone in a field of the first rows."""
    found: set[str] = set()
    rows = csv.reader(lines_of(path, encoding), delimiter=delimiter)
    for row in itertools.islice(rows, _GUESS_ROWS):
        found.update({value.strip() for value in row}.intersection(NULL_MARKS))
    return found - {"-"}


def _even_count(lines: Sequence[str], mark: str) -> float:
    counts = [len(row) - 1 for row in csv.reader(lines, delimiter=mark) if row]
    common = max(set(counts), key=counts.count)
    return common * counts.count(common) / len(counts)
