"""A small published model with three targets, made by the real stages from raw-like rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from headrace.models.baseline import BaselineParams
from headrace.models.catboost import CatboostParams
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import FEATURE_ROLES, Role, Target
from headrace.stages.decide import DecideParams, decide
from headrace.stages.encode import EncodeParams, encode
from headrace.stages.publish import Published, PublishParams, publish
from headrace.stages.reduce import ReduceParams, reduce
from headrace.stages.stack import StackParams, stack
from headrace.stages.train import train
from tests.encode_tables import write_table

ROLES: dict[str, Role] = {
    "flight": "key",
    "distance": "numeric",
    "seats": "numeric",
    "is_weekend": "numeric",
    "carrier": "category",
    "gate": "category",
    "delay": "target",
    "late": "target",
    "band": "target",
}
TARGETS = (
    Target(name="delay", task="regression"),
    Target(name="late", task="binary", labels=("false", "true")),
    Target(name="band", task="multiclass", labels=("early", "late", "ontime")),
)
TOLD = {"resources": Resources(), "recorder": MemoryRecorder()}


@dataclass(frozen=True)
class Case:
    """The folders of one small project, all stages run."""

    root: Path
    published: Published
    members: Mapping[str, Path]

    @property
    def package(self) -> Path:
        return self.root / "publish"


def raw_columns(num_rows: int, *, seed: int, permute_labels: bool = False) -> dict[str, pa.Array]:
    """Return wide columns as ``extract`` writes them; labels depend on the inputs."""
    rng = np.random.default_rng(seed)
    seats = rng.integers(20, 200, num_rows)
    carrier = rng.choice(["AA", "B6", "UA"], num_rows)
    delay = 0.1 * (seats - 100) + 12 * (carrier == "B6") + rng.normal(0, 2, num_rows)
    if permute_labels:
        delay = rng.permutation(delay)
    band = np.where(delay < -3, "early", np.where(delay > 6, "late", "ontime"))
    is_missing = rng.random(num_rows) < 0.1
    return {
        "flight": pa.array(np.arange(num_rows) + 2**60),
        "distance": pa.array(np.round(rng.normal(900, 300, num_rows), 2), mask=is_missing),
        "seats": pa.array(seats),
        "is_weekend": pa.array(rng.random(num_rows) < 0.3),
        "carrier": pa.array(carrier.tolist(), pa.string()),
        "gate": pa.array(rng.integers(1, 9, num_rows), mask=rng.random(num_rows) < 0.1),
        "delay": pa.array(delay),
        "late": pa.array(delay > 5),
        "band": pa.array(band.tolist(), pa.string()),
    }


def make_case(root: Path, *, permute_test_labels: bool = False, name: str = "flights") -> Case:
    """Run reduce, encode, train (linear baseline, small catboost), stack and publish."""
    rows = {"train": 600, "valid": 200, "test": 150}
    splits = {
        split: raw_columns(count, seed=seed, permute_labels=permute_test_labels and split == "test")
        for seed, (split, count) in enumerate(rows.items())
    }
    write_table(root / "extract", splits, roles=ROLES, targets=TARGETS)
    reduce(root / "extract", root / "reduce", ReduceParams(), **TOLD)
    encode(root / "reduce", root / "encode", EncodeParams(), **TOLD)
    sections = {
        "baseline": BaselineParams(kind="linear"),
        "catboost": CatboostParams(iterations=40, depth=3, learning_rate=0.2, threads=1),
    }
    for model, section in sections.items():
        train(
            root / "reduce",
            root / "encode",
            root / "train" / model,
            section,
            model=model,
            cache=root / "cache",
            checkpoints=root / "checkpoints" / model,
            **TOLD,
        )
    members = {model: root / "train" / model for model in sections}
    stack(root / "reduce", members, root / "stack", StackParams(), **TOLD)
    published = publish_case(root, members, root / "publish", PublishParams(name=name))
    return Case(root, published, members)


def publish_case(
    root: Path, members: Mapping[str, Path], out: Path, params: PublishParams
) -> Published:
    """Publish what ``make_case`` trained, once more or elsewhere; decide, if that is not done."""
    if not (root / "decide").exists():
        decide(root / "reduce", members, root / "stack", root / "decide", DecideParams(), **TOLD)
    folders = (root / "reduce", root / "encode", members, root / "stack", root / "decide")
    return publish(*folders, out, params, **TOLD)


def raw_rows(num_rows: int = 50, *, seed: int = 9) -> pa.Table:
    """Return new rows: inputs alone."""
    columns = raw_columns(num_rows, seed=seed)
    return pa.table({name: columns[name] for name in columns if ROLES[name] in FEATURE_ROLES})
