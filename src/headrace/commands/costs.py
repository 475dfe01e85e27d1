"""What a stage costs for a table of a given shape: seconds, memory, disk.

Every stage streams or holds something known, so a start plus a rate per row and per value comes
near: within a factor of two on the machine they were measured on. The rates are figures of this
project's own stages on two cores, on tables of 3k to 335k rows (tests/test_forecast.py has them).
Earlier runs of the same project, where there are any, replace them. What cannot be known before,
such as when early stopping ends a training, is taken from the measured runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.params import Resources
from headrace.project import EMBEDDING_CATBOOST

_MIB = 1 << 20
_PROCESS_BYTES = 160 * _MIB  # a stage before it has read a row: Python and its packages
_GROUP_BYTES = 32 * _MIB  # decoded values of a row group
_PREDICTION_BYTES = 90  # of a row and target on disk
# After which early stopping ends a training, more or less.
_TREES_OF_MANY, _TREES_OF_FEW = 300, 600  # rows
_EPOCHS_OF_MANY, _EPOCHS_OF_FEW = 8, 60
_MANY = 50_000
TRAIN_SHARE, HELD_OUT_SHARE = 0.7, 0.3


@dataclass(frozen=True)
class Shape:
    """What is known of the table before it is made."""

    num_rows: int
    num_numbers: int
    num_categories: int
    num_texts: int  # texts, vectors and columns put aside: stored and passed on, not learnt from
    num_targets: int
    source_bytes: int  # of text or of unpacked Parquet, as the sources hold it
    is_text: bool  # whether sources must be parsed (CSV, JSON)

    @property
    def num_columns(self) -> int:
        """All columns of the table but row_id and fold."""
        return self.num_numbers + self.num_categories + self.num_texts + self.num_targets

    @property
    def num_inputs(self) -> int:
        """Columns that models learn from."""
        return self.num_numbers + self.num_categories


@dataclass(frozen=True)
class Cost:
    """What one stage takes; ``scratch_bytes`` are gone when it ends, ``disk_bytes`` stay."""

    seconds: float
    peak_bytes: int
    disk_bytes: int
    scratch_bytes: int = 0


def stage_cost(
    stage: str, shape: Shape, params: Mapping[str, float], resources: Resources, num_models: int
) -> Cost:
    """Return the cost of ``stage``; ``params`` are the numbers of its section that matter.

    Among them ``fits`` is how many models a bag is made of.

    A kind of model without measured rates costs what the network does.
    """
    name, _, model = stage.partition("@")
    if name == "extract":
        return _extract(shape, resources)
    if name in ("reduce", "encode"):
        return _streamed(name, shape)
    if name == "train":
        return _train(model, shape, params)
    if name == EMBEDDING_CATBOOST:
        return _embedding_catboost(shape, params)
    if name in ("stack", "decide", "evaluate"):
        return _of_predictions(name, shape, num_models)
    if name == "interpret":  # its rows are bounded; torch and catboost are loaded
        return Cost(4.0 + 2.0 * num_models, 5 * _PROCESS_BYTES // 2, _MIB)
    if name == "publish":
        return Cost(2.0, _PROCESS_BYTES, 10 * _MIB)
    return Cost(2.0, _PROCESS_BYTES, shape.source_bytes if name == "raw" else 0)


def _extract(shape: Shape, resources: Resources) -> Cost:
    values = shape.num_rows * shape.num_columns
    parse_s = shape.source_bytes * (20e-9 if shape.is_text else 4e-9)
    stored = shape.num_rows * _stored(shape)
    # DuckDB holds what it can and spills the rest, up to half of the budget.
    held = min(resources.memory_budget // 2, 3 * shape.source_bytes + 80 * _MIB)
    return Cost(
        seconds=1.5 + parse_s + values * 0.35e-6,
        peak_bytes=_PROCESS_BYTES + held,
        disk_bytes=int(stored),
        scratch_bytes=int(stored + (shape.source_bytes if shape.is_text else 0)),
    )


def _streamed(stage: str, shape: Shape) -> Cost:
    per_value = 0.12e-6 if stage == "reduce" else 0.08e-6
    row_bytes = _reduced(shape) if stage == "reduce" else _encoded(shape)
    num_bytes = int(shape.num_rows * row_bytes)
    return Cost(
        seconds=1.0 + shape.num_rows * shape.num_columns * per_value,
        peak_bytes=_PROCESS_BYTES + min(6 * num_bytes, 5 * _GROUP_BYTES),
        disk_bytes=num_bytes,
    )


def _train(model: str, shape: Shape, params: Mapping[str, float]) -> Cost:
    rows, held_out = shape.num_rows * TRAIN_SHARE, shape.num_rows * HELD_OUT_SHARE
    fits = params.get("fits", 1)
    predicted = held_out if fits == 1 else shape.num_rows
    written = int(2 * _MIB * fits + predicted * shape.num_targets * _PREDICTION_BYTES)
    if model == "baseline":
        return Cost(1.0 + shape.num_rows * 2e-6, _PROCESS_BYTES + int(held_out * 100), written)
    if model == "catboost":
        needed = rows * (100 + 16 * shape.num_numbers + 150 * shape.num_categories)
        held = min(needed, params.get("pool_budget", 1 << 30))
        learnt = rows * held / max(needed, 1.0)
        usual = _TREES_OF_MANY if rows > _MANY else _TREES_OF_FEW
        trees = min(params.get("iterations", usual), usual)
        tree_s = 0.003 + learnt * (1e-8 * shape.num_numbers + 13e-8 * shape.num_categories)
        seconds = 2.0 + fits * shape.num_targets * trees * tree_s
        return Cost(seconds, _PROCESS_BYTES + int(1.5 * held), written)
    usual = _EPOCHS_OF_MANY if rows > _MANY else _EPOCHS_OF_FEW
    epochs = min(params.get("max_epochs", usual), usual)
    row_s = 6e-6 + 0.5e-6 * shape.num_inputs + 6e-6 * params.get("members", 1)
    seconds = 4.0 + fits * (1.0 + epochs * rows * row_s)
    return Cost(seconds, 2 * _PROCESS_BYTES + int(held_out * 200), written)


def _embedding_catboost(shape: Shape, params: Mapping[str, float]) -> Cost:
    """Trees with a number more per target, and a table of its own with the networks' features."""
    fed = replace(shape, num_numbers=shape.num_numbers + shape.num_targets)
    trees = _train("catboost", fed, params)
    forward_s = shape.num_rows * (2e-6 + shape.num_inputs * 0.5e-6)
    return replace(
        trees,
        seconds=trees.seconds + forward_s,
        scratch_bytes=int(shape.num_rows * _reduced(fed)),
    )


def _of_predictions(stage: str, shape: Shape, num_models: int) -> Cost:
    """``stack`` and ``decide`` look at valid rows, ``evaluate`` at test rows, of all members."""
    values = shape.num_rows * HELD_OUT_SHARE / 2 * shape.num_targets * (num_models + 1)
    seconds = 1.5 + values * (3e-6 if stage == "stack" else 12e-6)
    written = shape.num_rows * HELD_OUT_SHARE * shape.num_targets * _PREDICTION_BYTES
    disk_bytes = 2 * _MIB + (written if stage == "stack" else 0)
    return Cost(seconds, _PROCESS_BYTES + int(values * 400), int(disk_bytes))


def _stored(shape: Shape) -> float:
    """Bytes of a row in data/extract, compressed; a text or a date counts as 15."""
    return 8 + 3.5 * shape.num_numbers + 1.5 * shape.num_categories + 15 * shape.num_texts


def _reduced(shape: Shape) -> float:
    return 8 + 4 * shape.num_numbers + 1.5 * shape.num_categories + 15 * shape.num_texts


def _encoded(shape: Shape) -> float:
    return 13 + 4 * shape.num_numbers + 2 * shape.num_categories + 8 * shape.num_targets
