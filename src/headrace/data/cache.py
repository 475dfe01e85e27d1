"""Frames kept by pickle in ``.headrace/cache``: an accelerator, never a dependency, never an out.

A pickle is the fastest way back to a pandas frame, and the least safe: it follows the versions of
the libraries, a flipped bit comes back as other data, and it runs code when loaded. So an entry is
named after all it depends on (the table's digest, split and columns; Python, pandas, numpy and
pyarrow by version, headrace by its code), its digest is checked before anything of it is unpickled,
and the unpickler knows only the classes a frame is made of. Whatever does not match is dropped and
the frame is built again, with one warning; deleting the folder is always safe.

Layout of an entry, one file that gets its name when whole: the SHA-256 of all that follows, in
hex; a line of JSON with the lengths; the pickle; the frame's arrays, as they lie in memory. The
arrays are written from where they are and read to where they stay: no second copy at any time.
Two processes that fill one entry both write it, and the later one wins with the same frame.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import platform
import time
import zoneinfo
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import headrace
from headrace.data.frames import read_frame
from headrace.data.table import Table
from headrace.errors import IntegrityError
from headrace.lineage import code_digest
from headrace.memory import format_bytes
from headrace.record import Recorder
from headrace.storage import canonical_json, digest_bytes, new_file, sweep

if TYPE_CHECKING:
    import pandas as pd

CAP_BYTES = 4 << 30  # of all entries together; the ones used longest ago go first
_SUFFIX = ".frame"
_DIGEST_CHARS = 64
_ALIGNMENT = 64  # of every array in the file, and so in memory
_MAX_HEADER_BYTES = 1 << 20
# All that a pickled frame names, by package. Names and not modules: "anything of pandas" would let
# in functions that read and write files.
_KNOWN = {
    "builtins": {"bytearray", "slice"},
    "datetime": {"timedelta", "timezone"},
    "zoneinfo": {"ZoneInfo"},
    "numpy": {"_frombuffer", "_reconstruct", "dtype", "ndarray"},
    "pyarrow": {"_restore_array", "chunked_array", "py_buffer", "type_for_alias"},
    "pandas": {
        "ArrowStringArray", "BlockManager", "BooleanArray", "BooleanDtype", "Categorical",
        "CategoricalDtype", "DataFrame", "DatetimeArray", "DatetimeTZDtype", "Index",
        "IntegerArray", "RangeIndex", "StringArray", "StringDtype", "TimedeltaArray",
        "__pyx_unpickle_NDArrayBacked", "_new_Index", "_unpickle_block",
        *(f"{kind}{bits}Dtype" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    },
}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """Where a frame is kept: its content and the environment are two parts of the name."""

    folder: Path
    content: str
    environment: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.content}-{self.environment}{_SUFFIX}"

    def of_other_environments(self) -> list[Path]:
        found = self.folder.glob(f"{self.content}-*{_SUFFIX}")
        return sorted(path for path in found if path != self.path)


def cached_frame(
    table: Table,
    split: str,
    columns: Sequence[str] | None,
    *,
    cache: Path,
    recorder: Recorder,
    cap_bytes: int = CAP_BYTES,
) -> pd.DataFrame:
    """Return what ``read_frame`` returns, from the cache where it holds the very same.

    The frame is the caller's: changing it changes no entry. The recorder hears ``cache_hit``, and
    on a hit the seconds that were saved.

    Args:
        table: A verified table; its digest is part of the entry's name.
        split: Split to read.
        columns: Columns to read, None for all.
        cache: Folder of the cache (``.headrace/cache``).
        recorder: Hears of hits, and of entries that had to be dropped.
        cap_bytes: What all entries together may take on disk.

    Raises:
        SchemaError: as ``read_frame`` does.
    """
    entry = _entry(table, split, columns, cache)
    frame, timing = _from_cache(entry, recorder)
    recorder.params({"cache_hit": frame is not None})
    what = f"{split} rows of {table.folder.name}"
    if frame is not None:
        recorder.note(f"{what}: frame from the cache {timing}")
        return frame
    start = time.perf_counter()
    frame = read_frame(table, split, columns)
    built_s = time.perf_counter() - start
    try:
        _write(entry.path, frame, built_s=built_s, cap_bytes=cap_bytes)
        _prune(entry, cap_bytes)
    except OSError as error:
        recorder.warn(f"{what}: the frame was not kept in the cache {cache} ({error})")
    return frame


def _entry(table: Table, split: str, columns: Sequence[str] | None, cache: Path) -> _Entry:
    content = {
        "format": 1,
        "table": table.digest,
        "split": split,
        "columns": None if columns is None else list(columns),
    }
    return _Entry(
        cache / "frames",
        digest_bytes(canonical_json(content).encode())[:32],
        digest_bytes(canonical_json(_versions()).encode())[:16],
    )


def _versions() -> dict[str, str]:
    import pandas as pd

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "pandas": pd.__version__,
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
        "headrace": f"{headrace.__version__} {code_digest(__name__)}",
    }


def _from_cache(entry: _Entry, recorder: Recorder) -> tuple[pd.DataFrame | None, str]:
    """The kept frame and the time it saved, or None; entries that do not match are dropped."""
    start = time.perf_counter()
    faults = []
    for path in entry.of_other_environments():
        faults.append("was made with other versions of Python, pandas, numpy, pyarrow or headrace")
        path.unlink(missing_ok=True)
    try:
        frame, built_s = _read(entry.path)
        os.utime(entry.path)  # used now, so pruned last
        read_s = time.perf_counter() - start
        return (
            frame,
            f"in {read_s:.2f} s instead of {built_s:.2f} s: {built_s - read_s:.2f} s saved",
        )
    except (FileNotFoundError, NotADirectoryError):
        pass
    except IntegrityError as error:
        faults.append(str(error))
        entry.path.unlink(missing_ok=True)
    except OSError as error:  # it stays: the next one may be able to read it
        faults.append(f"cannot be read ({error})")
    if faults:
        recorder.warn(f"a cached frame {faults[-1]}; it is not used and built again")
    return None, ""


def _write(path: Path, frame: pd.DataFrame, *, built_s: float, cap_bytes: int) -> None:
    arrays: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(frame, protocol=5, buffer_callback=arrays.append)
    parts: list[Any] = [pickled, *(array.raw() for array in arrays)]
    lengths = [len(part) for part in parts]
    if sum(lengths) > cap_bytes:
        raise OSError(f"its {format_bytes(sum(lengths))} are more than {format_bytes(cap_bytes)}")
    header = json.dumps({"lengths": lengths, "built_s": built_s}).encode() + b"\n"
    sweep(path.parent)
    with new_file(path) as file:
        digest = hashlib.sha256()
        file.write(b"0" * _DIGEST_CHARS)
        for part in [header, *parts]:
            for piece in (part, bytes(-len(part) % _ALIGNMENT)):
                digest.update(piece)
                file.write(piece)
        file.seek(0)
        file.write(digest.hexdigest().encode())


def _read(path: Path) -> tuple[pd.DataFrame, float]:
    """Read a whole entry; nothing of it is looked at before its digest is found to be right.

    Raises:
        IntegrityError: if the digest differs, or the pickle names what no frame is made of.
    """
    content = np.empty(path.stat().st_size, np.uint8)
    with path.open("rb") as file:
        num_bytes = file.readinto(content.data)
    stated = content[:_DIGEST_CHARS].tobytes()
    body = content.data[_DIGEST_CHARS:]
    if num_bytes != len(content) or hashlib.sha256(body).hexdigest().encode() != stated:
        raise IntegrityError(f"({path.name}) has another digest than when it was written")
    line = bytes(body[:_MAX_HEADER_BYTES]).partition(b"\n")[0] + b"\n"
    header = json.loads(line)
    parts = []
    position = _aligned(len(line))
    for length in header["lengths"]:
        parts.append(body[position : position + length])
        position += _aligned(length)
    frame = _FrameUnpickler(io.BytesIO(parts[0]), buffers=parts[1:]).load()
    return frame, float(header["built_s"])


class _FrameUnpickler(pickle.Unpickler):
    """Loads frames and nothing else, should a digest ever be forged with its entry."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) == ("builtins", "getattr"):
            return _zone_method
        if global_name in _KNOWN.get(module_name.partition(".")[0], ()):
            return super().find_class(module_name, global_name)
        raise IntegrityError(f"names {module_name}.{global_name}, which no frame is made of")


def _zone_method(owner: Any, name: str) -> Any:
    """A time zone is pickled as a call of ``getattr``, which could give anything."""
    if owner is not zoneinfo.ZoneInfo or name != "_unpickle":
        raise IntegrityError(f"names {name} of {owner!r}, which no frame is made of")
    return getattr(owner, name)


def _prune(entry: _Entry, cap_bytes: int) -> None:
    """Remove the entries used longest ago until all fit the cap; never the one just written."""
    sizes = []
    for path in entry.folder.glob(f"*{_SUFFIX}"):
        try:
            state = path.stat()
        except FileNotFoundError:  # another process prunes as well
            continue
        sizes.append((path != entry.path, -state.st_mtime_ns, state.st_size, path))
    total = 0
    for _, _, size, path in sorted(sizes):
        total += size
        if total > cap_bytes:
            path.unlink(missing_ok=True)


def _aligned(length: int) -> int:
    return length + -length % _ALIGNMENT
