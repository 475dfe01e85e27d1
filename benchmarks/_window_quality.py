"""What a window shuffle costs in quality: a network trained on rows that lie sorted by the target.

That is the worst case: rows that lie together have nearly the same target. The default
window is a quarter of the rows here. Exact and window shuffle train the same
network for one epoch from the same seeds; the mean of the window's errors must lie within the
errors of the exact shuffle's seeds.
"""

import statistics
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from benchmarks._folders import told, with_identity
from benchmarks.harness import Row
from headrace.data.stream import Batch, stream
from headrace.schema import Column, Contract, Target
from headrace.stages.encode import EncodeParams, encode
from headrace.storage import new_folder, write_file

NUM_NUMERIC = 20
NUM_TRAIN = 1 << 20
NUM_VALID = 16_000
BATCH_ROWS = 256
ORDERS = ("exact", "window", "sequential")


def rows(quick: bool) -> list[Row]:
    """Train over seeds and orders; one row per order."""
    seeds = range(3 if quick else 8)
    with tempfile.TemporaryDirectory() as name:
        encoded = _encoded(Path(name))
        errors = {order: [_error(encoded, order, seed) for seed in seeds] for order in ORDERS}
    worst = max(errors["exact"])
    return [
        Row(
            f"sorted data, {order} order: error of the network", statistics.mean(found), "RMSE",
            worst if order == "window" else None, None, False,
            f"mean of {len(found)} seeds, {min(found):.4f}-{max(found):.4f}"
            + (f"; exact {min(errors['exact']):.4f}-{worst:.4f}" if order == "window" else ""),
        )
        for order, found in errors.items()
    ]  # fmt: skip


def _encoded(root: Path) -> Path:
    """Write a table whose train rows are sorted by the target, and encode it."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(NUM_NUMERIC, 8)) / np.sqrt(NUM_NUMERIC)
    with new_folder(root / "table") as private:
        for split, num_rows in (("train", NUM_TRAIN), ("valid", NUM_VALID)):
            x = rng.normal(size=(num_rows, NUM_NUMERIC))
            y = np.tanh(x @ mix * 2).sum(axis=1) + rng.normal(size=num_rows) / 2
            order = np.argsort(y) if split == "train" else np.arange(num_rows)
            columns = {f"x{i}": pa.array(x[order, i], pa.float32()) for i in range(NUM_NUMERIC)}
            table = with_identity(pa.table({**columns, "y": pa.array(y[order])}), first_id=0)
            (private / split).mkdir()
            pq.write_table(table, private / split / "part-00000.parquet")
        contract = Contract(
            columns=tuple(
                Column(
                    name=name,
                    role="target" if name == "y" else "numeric",
                    dtype=str(table.schema.field(name).type),
                )
                for name in table.column_names[2:]
            ),
            targets=(Target(name="y", task="regression"),),
        )
        write_file(private / "contract.json", contract.to_json())
    encode(root / "table", root / "encode", EncodeParams(), **told())
    return root / "encode"


def _error(encoded: Path, order: str, seed: int) -> float:
    """Train from ``seed`` and return the root mean squared error on the valid rows."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Linear(NUM_NUMERIC, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    batches = stream(encoded, batch_size=BATCH_ROWS, order=order, seed=seed)
    for batch in batches:
        loss = _squared(network, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        valid = stream(encoded, split="valid", batch_size=NUM_VALID, order="sequential")
        return float(torch.cat([_squared(network, batch) for batch in valid]).mean().sqrt())


def _squared(network: nn.Module, batch: Batch) -> torch.Tensor:
    return (network(batch.numeric)[:, 0] - batch.targets[:, 0].float()) ** 2
