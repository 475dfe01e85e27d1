"""The bytes of a CSV file: encoding, line ends, records counted apart from DuckDB, physical lines.

One pass over the decoded bytes checks what DuckDB passes over in silence (NUL bytes) or says
unclearly (encoding, mixed line ends), and counts the records, so that rows in = rows kept + rejects
can be asserted against a count that DuckDB did not make. The quick count takes quotes by parity;
where it disagrees, ``records`` counts exactly, row by row.
"""

import codecs
import csv
import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.data.dialect import Dialect, File
from headrace.errors import DataError

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Content:
    """What a pass over the bytes of a file found."""

    num_records: int  # without header and skipped lines
    newline: str
    is_mixed: bool  # several kinds of line ends


@dataclass(frozen=True)
class Record:
    """One record of a file: its physical lines, counted from 1, and its text."""

    first_line: int
    last_line: int
    text: str


def inspect(file: File, dialect: Dialect) -> Content:
    """Check encoding and NUL bytes and count the records, in one pass over the decoded bytes."""
    quote = dialect.quote.encode()
    newline, last, is_inside, num_ends = b"", b"", False, 0
    num_feeds, num_returns, num_pairs = 0, 0, 0
    for block in _blocks(file, dialect):
        if not newline:
            newline = b"\n" if b"\n" in block or b"\r" not in block else b"\r"
        ends, is_inside = _ends_outside_quotes(block, newline, quote, is_inside)
        num_ends += ends
        num_feeds += block.count(b"\n")
        num_returns += block.count(b"\r")
        num_pairs += block.count(b"\r\n") + (last == b"\r" and block[:1] == b"\n")
        last = block[-1:] or last
    if not last:
        raise DataError(f"{file.name} is empty; give a file with a header line and rows")
    num_records = num_ends + (last != newline or is_inside) - dialect.skip - (not dialect.names)
    kinds = (num_pairs, num_feeds - num_pairs, num_returns - num_pairs)
    return Content(max(num_records, 0), newline.decode(), sum(map(bool, kinds)) > 1)


def lines_of(path: Path, encoding: str) -> Iterator[str]:
    """Yield the physical lines of a file with their ends, without a byte order mark."""
    codec = "utf-8-sig" if encoding == "utf-8" else encoding
    with _open(path) as binary, io.TextIOWrapper(binary, encoding=codec, newline="") as text:
        yield from text


def reader_of(lines: Iterator[str], dialect: Dialect) -> Any:
    """Return Python's CSV reader in the dialect."""
    if not dialect.quote:
        return csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote)


def records(file: File, dialect: Dialect, num_columns: int) -> Iterator[Record]:
    """Yield the records after the header with their physical lines: slow, for faults only."""
    csv.field_size_limit(2**31 - 1)
    lines = lines_of(file.path, dialect.encoding)
    for _ in range(dialect.skip):
        next(lines, "")
    taken: list[str] = []

    def tap() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = reader_of(tap(), dialect)
    is_header = not dialect.names
    first = dialect.skip + 1
    for row in reader:
        last = dialect.skip + reader.line_num
        if not is_header and (row or num_columns == 1):
            yield Record(first, last, "".join(taken).rstrip("\r\n"))
        is_header = False
        first = last + 1
        taken.clear()


def physical_lines(
    file: File, dialect: Dialect, content: Content, positions: Sequence[int]
) -> list[int]:
    """Return the line that holds the byte before each of the ascending ``positions``."""
    if not positions:
        return []
    newline = content.newline.encode()
    lines = []
    start, line, waiting = 0, 1, list(positions)
    has_mark = dialect.encoding == "utf-8" and next(raw_blocks(file.path))[:3] == codecs.BOM_UTF8
    shift = 3 if has_mark else 0
    for block in _blocks(file, dialect):
        while waiting and waiting[0] - 1 - shift < start + len(block):
            lines.append(line + block[: max(waiting.pop(0) - 1 - shift - start, 0)].count(newline))
        line += block.count(newline)
        start += len(block)
    return lines + [line] * len(waiting)


def _blocks(file: File, dialect: Dialect) -> Iterator[bytes]:
    """Yield the content of a file as UTF-8 bytes, without NUL, without a byte order mark."""
    decoder = codecs.getincrementaldecoder(dialect.encoding)()
    line, is_first = 1, True
    for raw in itertools.chain(raw_blocks(file.path), [b""]):
        block = raw
        if is_first and dialect.encoding != "utf-16" and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{file.name} is UTF-16 text; set `encoding: utf-16` for its source")
        try:
            text = decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            before, odd = error.object[: error.start], error.object[error.start : error.start + 1]
            at = line + before.count(b"\n")
            raise DataError(
                f"{file.name}:{at}: the byte 0x{odd.hex()} is not "
                f"{dialect.encoding} text; if the file is Latin-1, set `encoding: latin-1` for its "
                f"source"
            ) from error
        if dialect.encoding != "utf-8":
            block = text.encode()
        if is_first:
            block = block.removeprefix(codecs.BOM_UTF8)
        if b"\0" in block:
            at = line + block[: block.index(b"\0")].count(b"\n")
            raise DataError(
                f"{file.name}:{at}: holds a NUL byte, which no text file has; the file is "
                f"damaged, or no CSV, or UTF-16 (then set `encoding: utf-16`)"
            )
        line += block.count(b"\n")
        is_first = False
        if block:
            yield block


def raw_blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file as it is, unpacked if its name ends in .gz."""
    try:
        with _open(path) as file:
            while block := file.read(_BLOCK_BYTES):
                yield block
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); get it again") from error


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _ends_outside_quotes(
    block: bytes, newline: bytes, quote: bytes, is_inside: bool
) -> tuple[int, bool]:
    if not quote or quote not in block:
        return (0 if is_inside else block.count(newline)), is_inside
    codes = np.frombuffer(block, np.uint8)
    quotes = np.flatnonzero(codes == quote[0])
    ends = np.flatnonzero(codes == newline[0])
    is_outside = (np.searchsorted(quotes, ends) + is_inside) % 2 == 0
    return int(is_outside.sum()), bool((len(quotes) + is_inside) % 2)
