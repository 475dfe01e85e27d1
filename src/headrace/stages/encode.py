"""Stage ``encode``: fit the encoder on train rows, write all rows once as fixed-width shards.

Two passes over the table: one over train rows to fit, one over train, valid and test to write.
The gap between the splits is for nobody and is not encoded. Train rows without any label are left
out and counted: nothing can be learned from them. An input that alone gives a target away is named,
or refused (``leaks``). Memory is one batch, the quantile sample and the sample looked at for leaks.
"""

import errno
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from headrace.data.draws import is_sampled
from headrace.data.encoder import EncodedBatch, Encoder, encode_batches, fit_encoder
from headrace.data.layout import NumericDtype
from headrace.data.leaks import SAMPLE_ROWS, suspicious_columns
from headrace.data.shards import (
    SHARD_SPLITS,
    ShardSchema,
    ShardWriter,
    StoredError,
    shard_schema,
    write_schema,
)
from headrace.data.table import Table, open_table
from headrace.data.usable import refuse_unusable
from headrace.errors import DataError, ResourceError
from headrace.memory import format_bytes
from headrace.params import Bytes, Resources, Section
from headrace.record import Recorder
from headrace.storage import new_folder

_STORED: Mapping[str, NumericDtype] = {"float32": "<f4", "float16": "<f2"}


class EncodeParams(Section):
    """Section ``encode`` of params.yaml: what of a category is kept, and how shards are cut."""

    max_categories: Annotated[int, Field(ge=1, le=2**31 - 3)] = 50_000  # known labels per category
    min_count: Annotated[int, Field(ge=1)] = 2  # train rows a label needs to have its own code
    num_quantiles: Annotated[int, Field(ge=2, le=65_536)] = 1000  # per numeric input
    quantile_rows: Annotated[int, Field(ge=100)] = 50_000  # train rows drawn to find them
    shard_bytes: Bytes = 256 << 20  # of all files of one shard
    # What numbers are stored as. float16 halves their bytes; the largest error is in shards.json.
    numeric: Literal["float32", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0  # of the drawn rows
    # What to do about an input whose ROC-AUC or R² alone is above 0.999 (see data.leaks)
    leaks: Literal["warn", "stop", "allow"] = "warn"


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` made; printable."""

    num_rows: Mapping[str, int]  # per split
    num_shards: int
    num_numeric: int
    num_categories: int
    dropped: Mapping[str, str]  # feature left out -> why
    num_unlabelled: int  # train rows left out, because they have no label at all
    num_bytes: int

    def __str__(self) -> str:
        rows = ", ".join(f"{split} {count:,}" for split, count in self.num_rows.items())
        return (
            f"encoded rows: {rows}; {self.num_numeric} numeric and {self.num_categories} category "
            f"inputs, {len(self.dropped)} left out; {format_bytes(self.num_bytes)} in "
            f"{self.num_shards} shards"
        )


@dataclass
class _Written:
    """What was written so far, over the splits."""

    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_unlabelled: int = 0
    num_done: int = 0
    num_infinite: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    worst: list[npt.NDArray[np.float64]] = field(default_factory=list)  # (N,) of each split
    looked_at: list[EncodedBatch] = field(default_factory=list)  # train rows, for leaks


def encode(
    source: Path, out: Path, params: EncodeParams, *, resources: Resources, recorder: Recorder
) -> Encoded:
    """Fit an encoder on the train rows of ``source`` and write its shards to ``out``.

    Raises:
        DataError: if nothing is left to learn from, or a weight or a target is not usable.
        SchemaError: if a column cannot be what its role says.
        ResourceError: if memory or disk will not suffice, with the figure needed.
    """
    table = open_table(source)
    total = table.num_rows("train") + sum(table.num_rows(split) for split in SHARD_SPLITS)
    _refuse_small_memory(table, params, resources)
    encoder = fit_encoder(
        table,
        max_categories=params.max_categories,
        min_count=params.min_count,
        num_quantiles=params.num_quantiles,
        quantile_rows=params.quantile_rows,
        seed=params.seed,
        threads=resources.threads,
        progress=lambda done: recorder.progress(done, total, unit="rows", detail="fit"),
    )
    schema = shard_schema(encoder, numeric=_STORED[params.numeric])
    _refuse_small_disk(out, table, schema)
    written = _Written(num_done=table.num_rows("train"))
    try:
        with new_folder(out) as folder:
            encoder.save(folder)
            for split in SHARD_SPLITS:
                _write_split(
                    folder, split, table, encoder, schema, params, written, resources.threads
                )
                recorder.progress(written.num_done, total, unit="rows", detail=split)
            schema = _completed(schema, params, written)
            write_schema(folder, schema)
            _look_for_leaks(encoder, written, params, recorder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(_disk_message(out, table, schema)) from error
    _tell(recorder, table, encoder, written)
    num_rows = {split: sum(sizes) for split, sizes in written.sizes.items()}
    return Encoded(
        num_rows=num_rows,
        num_shards=sum(len(sizes) for sizes in written.sizes.values()),
        num_numeric=len(encoder.numeric),
        num_categories=len(encoder.categories),
        dropped=encoder.dropped,
        num_unlabelled=written.num_unlabelled,
        num_bytes=sum(num_rows.values()) * schema.bytes_per_row,
    )


def _write_split(
    folder: Path,
    split: str,
    table: Table,
    encoder: Encoder,
    schema: ShardSchema,
    params: EncodeParams,
    written: _Written,
    threads: int,
) -> None:
    num_infinite = np.zeros(len(encoder.numeric), np.int64)
    with ShardWriter(
        folder / split,
        schema,
        shard_bytes=params.shard_bytes,
        num_rows=table.num_rows(split),
    ) as writer:
        for batch, in_batch in encode_batches(
            table, split, encoder.columns, encoder.transform_reusing, threads=threads
        ):
            refuse_unusable(batch, encoder, split)
            num_infinite += in_batch
            written.num_done += len(batch)
            if split == "train":
                has_label = ~np.isnan(batch.targets).all(axis=1)
                written.num_unlabelled += len(batch) - int(has_label.sum())
                batch = batch if has_label.all() else batch.where(np.flatnonzero(has_label))
                written.looked_at.append(_drawn(batch, table.num_rows("train"), params.seed))
            writer.append(batch)
    if split == "train" and not writer.sizes:
        raise DataError(
            f"{table.folder}: no train row has a label of "
            f"{', '.join(target.name for target in encoder.targets)}"
        )
    written.sizes[split] = tuple(writer.sizes)
    written.num_infinite[split] = num_infinite
    written.worst.append(writer.worst)


def _drawn(batch: EncodedBatch, num_rows: int, seed: int) -> EncodedBatch:
    """Return copies of the rows of a train batch that are looked at for leaks."""
    share = min(1.0, SAMPLE_ROWS / max(1, num_rows))
    return batch.where(np.flatnonzero(is_sampled(batch.row_id, share, seed=seed)))


def _look_for_leaks(
    encoder: Encoder, written: _Written, params: EncodeParams, recorder: Recorder
) -> None:
    """Name or refuse inputs that give a target away.

    Raises:
        DataError: if there are some and `encode.leaks` is stop.
    """
    if params.leaks == "allow":
        return
    drawn = written.looked_at
    found = suspicious_columns(
        EncodedBatch(np.concatenate([batch.packed for batch in drawn]), drawn[0].layout),
        numeric=encoder.numeric,
        categories=[category.name for category in encoder.categories],
        targets=encoder.targets,
    )
    if not found:
        return
    message = (
        f"{'; '.join(map(str, found))}. It may be the answer itself, which is not known when "
        f"predicting: set `extract.columns.{found[0].column}.role` to ignore, or `encode.leaks` to "
        f"allow if it is"
    )
    if params.leaks == "stop":
        raise DataError(message)
    recorder.warn(message)


def _completed(schema: ShardSchema, params: EncodeParams, written: _Written) -> ShardSchema:
    """Return the schema with the rows that were written, and what float16 cost."""
    errors: tuple[StoredError, ...] = ()
    if params.numeric == "float16":
        worst = np.max(written.worst, axis=0).tolist()
        errors = tuple(
            StoredError(name=name, worst=error)
            for name, error in zip(schema.numeric, worst, strict=True)
        )
    return schema.model_copy(update={"splits": written.sizes, "float16_errors": errors})


def _refuse_small_memory(table: Table, params: EncodeParams, resources: Resources) -> None:
    columns = len(table.contract.columns)
    sample = min(params.quantile_rows + SAMPLE_ROWS, table.num_rows("train")) * columns * 8
    per_thread = 64 << 20  # a batch decoded and encoded, and one that waits to be written
    needed = sample + (2 + resources.threads) * per_thread
    if needed > resources.memory_budget:
        raise ResourceError(
            f"encode needs about {format_bytes(needed)} for a table of {columns} columns, "
            f"`resources.memory_budget` is {format_bytes(resources.memory_budget)}; raise it, or "
            f"lower `encode.quantile_rows` ({params.quantile_rows})"
        )


def _refuse_small_disk(out: Path, table: Table, schema: ShardSchema) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    if _needed_bytes(table, schema) > shutil.disk_usage(out.parent).free:
        raise ResourceError(_disk_message(out, table, schema))


def _needed_bytes(table: Table, schema: ShardSchema) -> int:
    return sum(table.num_rows(split) for split in SHARD_SPLITS) * schema.bytes_per_row


def _disk_message(out: Path, table: Table, schema: ShardSchema) -> str:
    return (
        f"the shards in {out} need {format_bytes(_needed_bytes(table, schema))} of disk, "
        f"{format_bytes(shutil.disk_usage(out.parent).free)} are free; nothing was kept. Free "
        f"some and run the stage again"
    )


def _tell(recorder: Recorder, table: Table, encoder: Encoder, written: _Written) -> None:
    for split, sizes in written.sizes.items():
        recorder.dataset(
            "table", path=table.folder, digest=table.digest, num_rows=sum(sizes), context=split
        )
    recorder.params(
        {
            "encode.inputs.numeric": len(encoder.numeric),
            "encode.inputs.category": len(encoder.categories),
            "encode.inputs.dropped": len(encoder.dropped),
        }
    )
    for name, reason in encoder.dropped.items():
        recorder.warn(f"feature {name} is left out: {reason}")
    for split, counts in written.num_infinite.items():
        for name, count in zip(encoder.numeric, counts.tolist(), strict=True):
            if count:
                recorder.warn(f"{name}: {count} infinite values in {split} count as missing")
    if written.num_unlabelled:
        recorder.warn(f"{written.num_unlabelled} train rows have no label and are left out")
