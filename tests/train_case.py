"""A small learnable table with all three tasks, for the tests of models and of stage ``train``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from headrace.data.encoder import EncodedBatch
from headrace.data.shards import open_shards
from headrace.data.table import open_table
from headrace.models.protocol import StopRows, TrainViews
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import Role, Target
from headrace.stages.encode import EncodeParams, encode
from tests.encode_tables import write_table

DELAY = Target(name="delay", task="regression")
LATE = Target(name="late", task="binary", labels=("no", "yes"))
CLASS = Target(name="class", task="multiclass", labels=("a", "b", "c"))
TARGETS = (DELAY, LATE, CLASS)
ROLES: dict[str, Role] = {
    "distance": "numeric",
    "wind": "numeric",
    "carrier": "category",
    "gate": "category",
    "importance": "weight",
}
RESOURCES = Resources()
# Per kind, what makes a fit of some hundred rows a matter of a second.
QUICK = {
    "baseline": {"kind": "linear"},
    "catboost": {"iterations": 40, "depth": 3},
    "factorization": {"weight_decay": 0.01, "max_epochs": 3, "batch_rows": 64},
    "nn": {"hidden_sizes": [16], "max_epochs": 3, "batch_rows": 64},
    "tabnet": {"width": 4, "num_steps": 2, "max_epochs": 2, "batch_rows": 64, "health": "off"},
}


def example_columns(
    num_rows: int, *, seed: int = 0, targets: tuple[Target, ...] = TARGETS, weight: bool = False
) -> dict[str, pa.Array]:
    """Return rows whose labels follow from two numbers and a category; a tenth lack a label."""
    rng = np.random.default_rng(seed)
    distance, wind = rng.normal(500, 100, num_rows), rng.normal(0, 1, num_rows)
    carrier = rng.integers(0, 4, num_rows)
    signal = (distance - 500) / 100 + 2 * (carrier % 2) - 1 + 0.3 * rng.normal(0, 1, num_rows)
    labels = {
        "delay": pa.array(30 * signal + 10, mask=rng.random(num_rows) < 0.1),
        "late": pa.array(
            np.where(signal > 0, "yes", "no").tolist(), mask=rng.random(num_rows) < 0.1
        ),
        "class": pa.array(np.array(["a", "b", "c"])[np.digitize(signal, [-0.7, 0.7])].tolist()),
    }
    columns = {
        "distance": pa.array(distance),
        "wind": pa.array(wind, mask=rng.random(num_rows) < 0.3),
        "carrier": pa.array(
            [None if c == 3 and i % 2 else "WXYZ"[c] for i, c in enumerate(carrier)]
        ).dictionary_encode(),
        "gate": pa.array(rng.integers(1, 6, num_rows), mask=rng.random(num_rows) < 0.1),
    }
    if weight:
        columns["importance"] = pa.array(rng.uniform(0.5, 2, num_rows))
    return columns | {target.name: labels[target.name] for target in targets}


def make_case(
    folder: Path,
    *,
    num_train: int = 600,
    targets: tuple[Target, ...] = TARGETS,
    weight: bool = False,
    change: Mapping[str, Mapping[str, pa.Array]] | None = None,
) -> TrainViews:
    """Write table and shards below ``folder``; ``change`` replaces columns, per split."""
    splits = {
        split: example_columns(num_rows, seed=seed, targets=targets, weight=weight)
        | dict((change or {}).get(split, {}))
        for seed, (split, num_rows) in enumerate(
            {"train": num_train, "valid": 150, "test": 130}.items()
        )
    }
    roles = ROLES | {target.name: "target" for target in targets}
    write_table(folder / "reduce", splits, roles=roles, targets=targets)
    return encode_only(folder)


def make_far_case(folder: Path, offset: float, **options: Any) -> TrainViews:
    """Write a case whose regression target is ``offset`` higher than in ``make_case``."""
    change = {
        split: {"delay": pc.add(example_columns(num_rows, seed=seed)["delay"], offset)}
        for seed, (split, num_rows) in enumerate({"train": 600, "valid": 150, "test": 130}.items())
    }
    return make_case(folder, targets=(DELAY,), change=change, **options)


def encode_only(folder: Path) -> TrainViews:
    """Encode the table below ``folder`` and return its views."""
    encode(
        folder / "reduce",
        folder / "encode",
        EncodeParams(shard_bytes=8000),
        resources=RESOURCES,
        recorder=MemoryRecorder(),
    )
    return views_of(folder)


def views_of(folder: Path) -> TrainViews:
    """Return the views of the table and shards below ``folder``; fold 4 is for stopping."""
    contract = open_table(folder / "reduce").contract
    return TrainViews(
        folder / "reduce",
        folder / "encode",
        folder / "cache",
        contract,
        folds=(0, 1, 2, 3, 4),
        stop=StopRows("fold", fold=4),
    )


def encoded_rows(views: TrainViews, split: str) -> EncodedBatch:
    """Return all encoded rows of a split."""
    shards = open_shards(views.encoded, split)
    return shards.slice(0, shards.num_rows)


def table_rows(views: TrainViews, split: str) -> pa.Table:
    """Return the input columns of a split."""
    return open_table(views.table).read(split, views.contract.features)


def tree_bytes(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder`` with its content."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
