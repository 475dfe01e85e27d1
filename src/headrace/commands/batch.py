"""``headrace batch``: one batch of the encoded rows, decoded, as a training would see it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.data.encoder import open_encoder
from headrace.data.look import Look, look_at
from headrace.data.order import Kind
from headrace.data.shards import open_shards
from headrace.data.stream import BatchStream
from headrace.errors import ConfigError
from headrace.project import Project

_BATCH_ROWS = 4096


@dataclass(frozen=True)
class ShownBatch:
    """A decoded batch and its place in the stream."""

    split: str
    order: Kind
    seed: int
    epoch: int
    batch: int
    num_batches: int  # of an epoch
    split_rows: int
    look: Look

    def text(self, *, width: int) -> str:
        """Return the batch as text for a terminal of ``width`` characters."""
        where = (
            f"{self.split}: batch {self.batch} of {self.num_batches} (from 0), "
            f"{self.look.num_rows:,} of {self.split_rows:,} rows; epoch {self.epoch}, "
            f"order {self.order}, seed {self.seed}"
        )
        return f"{where}\n\n{self.look.text(width=width)}"

    def to_json(self) -> dict[str, Any]:
        """Return the same as JSON values."""
        return {
            "split": self.split,
            "order": self.order,
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self.batch,
            "num_batches": self.num_batches,
            "split_rows": self.split_rows,
            **self.look.to_json(),
        }


def show_batch(
    project: Project,
    *,
    split: str,
    order: Kind,
    seed: int,
    epoch: int,
    batch: int,
    batch_size: int | None,
    num_rows: int,
) -> ShownBatch:
    """Read and decode batch ``batch`` of ``epoch``, with its first ``num_rows`` rows.

    Without a ``batch_size`` it is 4096, or the whole split if that has fewer rows.

    Raises:
        ConfigError: if a setting is out of range, or the epoch has no such batch.
        IntegrityError: if the stage ``encode`` has not run, or its files are damaged.
        SchemaError: if there is no such split.
    """
    folder = project.data("encode").relative_to(Path.cwd())
    if batch_size is None:
        batch_size = max(1, min(_BATCH_ROWS, open_shards(folder, split).num_rows))
    stream = BatchStream(folder, split=split, batch_size=batch_size, order=order, seed=seed)
    if num_rows < 1:
        raise ConfigError(f"--rows is {num_rows}; it must be at least 1")
    if epoch < 0 or not 0 <= batch < len(stream):
        raise ConfigError(
            f"there is no batch {batch} in epoch {epoch}: an epoch of split {split} has "
            f"{len(stream)} batches of up to {batch_size:,} rows, and both count from 0"
        )
    encoder = open_encoder(folder)
    stream.set_position(epoch, batch)
    return ShownBatch(
        split=split,
        order=order,
        seed=seed,
        epoch=epoch,
        batch=batch,
        num_batches=len(stream),
        split_rows=stream.num_rows,
        look=look_at(next(iter(stream)), encoder, num_rows=num_rows),
    )
