"""The one way to write and to read a file: aside, whole, digested, renamed; digest before parsing.

Why: DuckDB, pyarrow, torch and pandas write in place and never fsync, so a kill or a full disk
leaves half a file under its final name, and most formats read a flipped bit back as other data.
Here a folder or file gets its final name only when every byte is on disk, and a manifest carries
the digests that readers check first. Cost: one pass of SHA-256 over what is written and read.

The digest of a file is the SHA-256 of its content; a file longer than one block (1 MiB) has as its
digest the SHA-256 of its blocks' digests, so that single blocks can be checked on first touch.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from headrace.errors import IntegrityError

BLOCK_BYTES = 1 << 20
MANIFEST = "manifest.json"
_PRIVATE = re.compile(r"^\.new-(?P<name>.+)\.(?P<pid>\d+)$")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says about one file: its length, digest and, if long, block digests."""

    num_bytes: int
    digest: str
    blocks: tuple[str, ...] = ()


def canonical_json(value: Any) -> str:
    """Return the one JSON text of ``value``: sorted keys, no NaN, two-space indent, newline."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in hex."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> FileEntry:
    """Read ``path`` once and return its length, digest and block digests."""
    blocks: list[bytes] = []
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            blocks.append(hashlib.sha256(block).digest())
            num_bytes += len(block)
    return _entry(num_bytes, blocks)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a private folder beside ``out``; on success it becomes ``out``, manifest included.

    If the body raises, nothing appears under ``out`` and an older ``out`` stays as it was.
    Leftovers of killed writers beside ``out`` are removed first.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent)
    private = _private_name(out)
    shutil.rmtree(private, ignore_errors=True)  # of a killed writer that had the same pid
    private.mkdir()
    try:
        yield private
        _write_manifest(private)
        _sync_folder(private)
        _replace_folder(private, out)
    finally:
        shutil.rmtree(private, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a private file beside ``path``, open for writing; on success it becomes ``path``.

    Readers see the old content or the new, never a part; if the body raises, nothing changes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    private = _private_name(path)
    try:
        with private.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        private.replace(path)
        _sync_directory(path.parent)
    finally:
        private.unlink(missing_ok=True)


def write_file(path: Path, data: bytes | str) -> None:
    """Write ``data`` to ``path``; see ``new_file``."""
    with new_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as canonical JSON; see ``write_file``."""
    write_file(path, canonical_json(value))


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        IntegrityError: if the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing; run the stage that writes it again") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path} is not whole JSON ({error}); delete it and run again"
        ) from error


def read_manifest(folder: Path) -> Mapping[str, FileEntry]:
    """Return the files of ``folder`` by relative name, as its manifest lists them.

    Raises:
        IntegrityError: if there is no manifest, or it has a form this version does not read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise IntegrityError(
            f"{folder} has no {MANIFEST}, so it was not written to its end; "
            f"run `headrace repro` to make it again"
        )
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 1:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise IntegrityError(f"{path} has manifest format {found}; this headrace reads format 1")
    return {
        name: FileEntry(entry["bytes"], entry["sha256"], tuple(entry.get("blocks", ())))
        for name, entry in content["files"].items()
    }


def verify_folder(folder: Path) -> Mapping[str, FileEntry]:
    """Check every file of ``folder`` against its manifest and return the manifest.

    Raises:
        IntegrityError: naming each missing, unlisted or changed file (with its first bad block).
    """
    manifest = read_manifest(folder)
    faults = [fault for name, entry in manifest.items() if (fault := _fault(folder / name, entry))]
    listed = set(manifest) | {MANIFEST}
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    faults += [f"{name} is not in the manifest" for name in sorted(present - listed)]
    if faults:
        raise IntegrityError(
            f"{folder} is damaged: {'; '.join(faults)}. Delete the folder and run `headrace repro`"
        )
    return manifest


def verify_file(folder: Path, name: str) -> Path:
    """Check one file of ``folder`` against the manifest and return its path.

    Raises:
        IntegrityError: if the file is not listed, missing or changed.
    """
    manifest = read_manifest(folder)
    if name not in manifest:
        raise IntegrityError(f"{folder / MANIFEST} does not list {name}; run the stage again")
    if fault := _fault(folder / name, manifest[name]):
        raise IntegrityError(
            f"{folder} is damaged: {fault}. Delete the folder and run `headrace repro`"
        )
    return folder / name


def folder_digest(folder: Path) -> str:
    """Return one digest for all the content of ``folder``, taken from its manifest."""
    manifest = read_manifest(folder)
    return digest_bytes(canonical_json({name: e.digest for name, e in manifest.items()}).encode())


def sweep(folder: Path) -> None:
    """Remove what killed writers left in ``folder``: private names whose process is gone."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _PRIVATE.match(path.name)
        if match and not _is_alive(int(match["pid"])):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _entry(num_bytes: int, blocks: list[bytes]) -> FileEntry:
    if len(blocks) <= 1:
        digest = blocks[0].hex() if blocks else digest_bytes(b"")
        return FileEntry(num_bytes, digest)
    return FileEntry(num_bytes, digest_bytes(b"".join(blocks)), tuple(b.hex() for b in blocks))


def _fault(path: Path, expected: FileEntry) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected.num_bytes:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected.num_bytes}"
    found = digest_file(path)
    if found.digest == expected.digest:
        return ""
    pairs = zip(found.blocks, expected.blocks, strict=False)
    bad = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
    return f"{path.name} has another digest than when it was written (first in block {bad})"


def _write_manifest(folder: Path) -> None:
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    files = {}
    for path in paths:
        entry = digest_file(path)
        files[path.relative_to(folder).as_posix()] = {
            "bytes": entry.num_bytes,
            "sha256": entry.digest,
            **({"blocks": list(entry.blocks)} if entry.blocks else {}),
        }
    write_json(folder / MANIFEST, {"format": 1, "files": files})


def _sync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        else:
            _sync_directory(path)
    _sync_directory(folder)


def _replace_folder(private: Path, out: Path) -> None:
    aside = _private_name(out, "old")
    if out.exists():
        out.replace(aside)
    private.replace(out)
    _sync_directory(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private_name(path: Path, kind: str = "new") -> Path:
    # Starts with a dot and ends with the pid: outside any glob for data, and sweepable.
    suffix = "" if kind == "new" else f"-{kind}"
    return path.with_name(f".new-{path.name}{suffix}.{os.getpid()}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
