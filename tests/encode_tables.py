"""Small tables for the tests of the encoder, the shards and the stream."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.data.encoder import EncodedBatch
from headrace.data.layout import row_layout
from headrace.data.table import Table, open_table
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Column, Contract, Role, Target
from headrace.stages.encode import Encoded, EncodeParams, encode
from headrace.storage import new_folder, write_file

ROLES: dict[str, Role] = {
    "distance": "numeric",
    "seats": "numeric",
    "is_weekend": "numeric",
    "carrier": "category",
    "gate": "category",
    "delay": "target",
    "late": "target",
    "importance": "weight",
    "remark": "text",
}
TARGETS = (
    Target(name="delay", task="regression"),
    Target(name="late", task="binary", labels=("false", "true")),
)


def example_columns(num_rows: int, *, seed: int = 0) -> dict[str, pa.Array]:
    """Return columns of flights: nulls in a number, a category and a label, one boolean."""
    rng = np.random.default_rng(seed)
    delay = rng.normal(5, 20, num_rows)
    no_label = rng.random(num_rows) < 0.1
    return {
        "distance": pa.array(rng.normal(1e6, 3, num_rows), mask=rng.random(num_rows) < 0.2),
        "seats": pa.array(rng.integers(20, 300, num_rows, dtype=np.int16)),
        "is_weekend": pa.array(rng.random(num_rows) < 0.3),
        "carrier": pa.array(
            rng.choice(["AA", "B6", "UA", None], num_rows).tolist(), pa.string()
        ).dictionary_encode(),
        "gate": pa.array(rng.integers(1, 9, num_rows)),
        "delay": pa.array(delay, mask=no_label),
        "late": pa.array(delay > 15),
        "importance": pa.array(rng.random(num_rows).astype(np.float32)),
        "remark": pa.array(["text"] * num_rows),
    }


def contract_of(
    columns: Mapping[str, pa.Array],
    *,
    roles: Mapping[str, Role] = ROLES,
    targets: tuple[Target, ...] = TARGETS,
) -> Contract:
    """Return the contract of columns, whose roles go by their names."""
    return Contract(
        columns=tuple(
            Column(name=name, role=roles[name], dtype=str(values.type))
            for name, values in columns.items()
        ),
        targets=targets,
    )


def write_table(
    folder: Path,
    splits: Mapping[str, Mapping[str, pa.Array]],
    *,
    roles: Mapping[str, Role] = ROLES,
    targets: tuple[Target, ...] = TARGETS,
    row_group_rows: int = 100,
) -> Table:
    """Write a table folder as the stage ``reduce`` does; row ids are numbered through."""
    with new_folder(folder) as private:
        first_id = 0
        for split, columns in splits.items():
            num_rows = len(next(iter(columns.values())))
            fold = pa.array(np.arange(num_rows) % 5, pa.int8())
            table = pa.table(
                {
                    "row_id": pa.array(np.arange(first_id, first_id + num_rows)),
                    "fold": fold if split == "train" else pa.nulls(num_rows, pa.int8()),
                    **columns,
                }
            )
            (private / split).mkdir()
            path = private / split / "part-00000.parquet"
            pq.write_table(table, path, row_group_size=row_group_rows)
            first_id += num_rows
        contract = contract_of(splits["train"], roles=roles, targets=targets)
        write_file(private / "contract.json", contract.to_json())
    return open_table(folder)


def changed(rows: EncodedBatch, **arrays: np.ndarray) -> EncodedBatch:
    """Return a batch with other arrays than its encoder made."""
    parts = {field.name: getattr(rows, field.name) for field in rows.layout.fields} | arrays
    layout = row_layout(
        num_targets=parts["targets"].shape[1],
        num_numeric=parts["numeric"].shape[1],
        num_codes=parts["codes"].shape[1],
        codes=rows.layout.field("codes").dtype,
        numeric="<f4",
    )
    packed = layout.empty(len(rows))
    for name, view in layout.split(packed).items():
        view[...] = parts[name]
    return EncodedBatch(packed, layout)


def encode_example(
    folder: Path, *, num_train: int = 500, shard_bytes: int = 4000, **params: Any
) -> tuple[Path, Encoded, MemoryRecorder]:
    """Write an example table below ``folder`` and encode it; return the encoded folder."""
    splits = {"train": num_train, "valid": 60, "test": 40, "gap": 20}
    write_table(
        folder / "reduce",
        {s: example_columns(n, seed=i) for i, (s, n) in enumerate(splits.items())},
    )
    recorder = MemoryRecorder()
    encoded = encode(
        folder / "reduce",
        folder / "encode",
        EncodeParams(shard_bytes=shard_bytes, **params),
        resources=Resources(),
        recorder=recorder,
    )
    return folder / "encode", encoded, recorder
