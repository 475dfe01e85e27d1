"""Checkpoints of a training run: whole or absent, digest first, the one before is kept.

A torch file with a flipped bit mostly reads back as other numbers without an error, and a kill
while saving in place leaves nothing readable. So a checkpoint is written aside with its SHA-256 in
front, and the newest that is whole is the one that counts. Only tensors and plain values are
loaded (``weights_only``), so a checkpoint can run no code. Cost: one extra copy in memory.

A file ``given.ckpt`` in the folder is one that a person asked for: it is used, or the run ends with
the reason. The first checkpoint of the run takes its place.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from headrace.errors import ConfigError, IntegrityError
from headrace.lineage import value_changes
from headrace.record import Recorder
from headrace.storage import new_file, sweep

NEWEST = "newest.ckpt"
BEFORE = "before.ckpt"
GIVEN = "given.ckpt"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Checkpoints:
    """The checkpoints in ``folder``, which belongs to one stage key.

    ``signature`` describes what is trained, as JSON values; a checkpoint with another signature is
    not used.
    """

    def __init__(self, folder: Path, *, signature: Any, recorder: Recorder) -> None:
        self._folder = folder
        self._signature = signature
        self._recorder = recorder
        self._is_newest_damaged = False

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, text, lists, mappings) as the newest checkpoint."""
        buffer = io.BytesIO()
        torch.save({"signature": self._signature, "state": state}, buffer)
        content = buffer.getbuffer()
        newest = self._folder / NEWEST
        with new_file(newest) as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
            if newest.is_file() and not self._is_newest_damaged:
                newest.replace(self._folder / BEFORE)
        self._is_newest_damaged = False
        (self._folder / GIVEN).unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """Return the newest whole state, or None; a damaged or foreign one is named and skipped.

        Raises:
            ConfigError: if the checkpoint that was asked for is of another signature.
            IntegrityError: if it is damaged.
        """
        sweep(self._folder)  # of a run that was killed while it saved
        if (self._folder / GIVEN).is_file():
            return self._load_given(self._folder / GIVEN)
        for name in (NEWEST, BEFORE):
            path = self._folder / name
            if not path.is_file():
                continue
            found = _read(path)
            if found is None:
                self._recorder.warn(f"checkpoint {path} is damaged and is not used")
                self._is_newest_damaged |= name == NEWEST
            elif differs := self._differences(found):
                self._recorder.warn(
                    f"checkpoint {path} is not used, and training starts fresh: {differs}"
                )
            else:
                return _state(found)
        return None

    def _load_given(self, path: Path) -> dict[str, Any]:
        found = _read(path)
        differs = "" if found is None else self._differences(found)
        if found is None or differs:
            path.unlink()  # the next run is asked again, or goes on from its own
        if found is None:
            raise IntegrityError(
                "the checkpoint given with --resume is damaged; give another, or run without it"
            )
        if differs:
            raise ConfigError(
                f"the checkpoint given with --resume is of another training ({differs}); run "
                f"without --resume to start fresh"
            )
        return _state(found)

    def _differences(self, found: dict[str, Any]) -> str:
        changes = value_changes("", found["signature"], self._signature)
        return "; ".join(f"{name} {told}".strip() for name, told in changes)


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a checkpoint; None if it is not what was written."""
    data = memoryview(path.read_bytes())
    content = data[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
        return None
    found: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    return found


def _state(found: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = found["state"]
    return state
