"""Checkpoints of a training run: whole or absent, digest first, the one before is kept.

A torch file with a flipped bit mostly reads back as other numbers without an error, and a kill
while saving in place leaves nothing readable. So a checkpoint is written aside with its SHA-256 in
front, and the newest that is whole is the one that counts. Only tensors and plain values are
loaded (``weights_only``), so a checkpoint can run no code. Cost: one extra copy in memory.
"""

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from headrace.record import Recorder
from headrace.storage import write_file

_NEWEST = "newest.ckpt"
_BEFORE = "before.ckpt"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Checkpoints:
    """The checkpoints in ``folder``, which belongs to one stage key.

    ``signature`` describes what is trained; a checkpoint with another signature is not used.
    """

    def __init__(self, folder: Path, *, signature: str, recorder: Recorder) -> None:
        self._folder = folder
        self._signature = signature
        self._recorder = recorder

    def save(self, state: dict[str, Any]) -> None:
        """Write ``state`` (tensors, numbers, text, lists, mappings) as the newest checkpoint."""
        buffer = io.BytesIO()
        torch.save({"signature": self._signature, "state": state}, buffer)
        content = buffer.getvalue()
        newest = self._folder / _NEWEST
        if newest.is_file():
            newest.replace(self._folder / _BEFORE)
        write_file(newest, hashlib.sha256(content).digest() + content)

    def load(self) -> dict[str, Any] | None:
        """Return the newest whole state, or None; a damaged or foreign one is named and skipped."""
        for name in (_NEWEST, _BEFORE):
            path = self._folder / name
            if not path.is_file():
                continue
            data = path.read_bytes()
            content = data[_DIGEST_BYTES:]
            if hashlib.sha256(content).digest() != data[:_DIGEST_BYTES]:
                self._recorder.warn(f"checkpoint {path} is damaged and is not used")
                continue
            found = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
            if found["signature"] != self._signature:
                self._recorder.warn(
                    f"checkpoint {path} is of another model or other parameters and is not used; "
                    f"training starts fresh"
                )
                continue
            state: dict[str, Any] = found["state"]
            return state
        return None
