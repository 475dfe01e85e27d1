"""A small table and models' predictions as the stages before ``stack`` leave them, for tests."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from headrace.data.predictions import Predictions, write_predictions
from headrace.schema import SPLITS, Column, Contract, Split, Target
from headrace.storage import new_folder, write_file, write_json

SPLITS_OF_ROWS = ("train", "valid", "test")
DELAY = Target(name="delay", task="regression")
LATE = Target(name="late", task="binary", labels=("no", "yes"))
CARRIER = Target(name="carrier", task="multiclass", labels=("AA", "BB", "CC"))
BY_TIME = Split(kind="time", column="when")


@dataclass
class Case:
    """Rows over a number of days, as many per split, and how well each model knows the truth.

    Models predict train rows out of fold, in five folds, but for those ``without_train``.
    """

    targets: tuple[Target, ...] = (DELAY, LATE)
    num_rows: int = 600
    num_days: int = 30
    seed: int = 0
    noise: dict[str, float] = field(default_factory=lambda: {"plain": 3.0, "sharp": 1.0})
    without_train: tuple[str, ...] = ()
    has_weight: bool = False
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # split → target
    split: Split | None = BY_TIME
    groups: tuple[str, ...] = ()  # columns of role group before the time: the day modulo 7, 8, …
    more_times: tuple[str, ...] = ()  # columns of role time before ``when``: all of one day

    def __post_init__(self):
        self.row_id, self.day, self.latent = {}, {}, {}
        self._noise = {model: {} for model in self.noise}
        self._fill(("valid", "test"), np.random.default_rng(self.seed))
        self._fill(("train",), np.random.default_rng([self.seed, 1]))
        self.fold = np.arange(self.num_rows) % 5
        self.weight = np.random.default_rng([self.seed, 2]).uniform(0.5, 2, self.num_rows)

    def _fill(self, splits, rng):
        for split in splits:
            number = ("valid", "test", "train").index(split)
            low = -(2**62) + number * 10**6
            self.row_id[split] = np.sort(rng.choice(10**6, self.num_rows, replace=False)) + low
            self.day[split] = rng.integers(0, self.num_days, self.num_rows)
            of_day = rng.normal(0, 2, self.num_days)
            self.latent[split] = of_day[self.day[split]] + rng.normal(0, 1, self.num_rows)
            self.labels[split] = {
                target.name: self._label(target, split) for target in self.targets
            }
        for model, scale in self.noise.items():
            for split in splits:
                self._noise[model][split] = rng.normal(0, scale, self.num_rows)

    def _label(self, target, split):
        latent = self.latent[split]
        if target.task == "regression":
            return latent * 10
        if target.task == "binary":
            return (latent > 0).astype(float)
        return np.digitize(latent, [-1, 1]).astype(float)

    def contract(self):
        columns = [Column(name=name, role="group", dtype="int64") for name in self.groups]
        columns += [
            Column(name=name, role="time", dtype="timestamp[us]")
            for name in (*self.more_times, "when")
        ]
        for target in self.targets:
            is_number = target.task == "regression"
            dtype = "double" if is_number else "string"
            columns.append(Column(name=target.name, role="target", dtype=dtype))
        if self.has_weight:
            columns.append(Column(name="w", role="weight", dtype="double"))
        return Contract(columns=tuple(columns), targets=self.targets, split=self.split)

    def write_table(self, folder: Path) -> Path:
        no_fold = [None] * self.num_rows
        with new_folder(folder) as private:
            write_file(private / "contract.json", self.contract().to_json())
            for split in SPLITS_OF_ROWS:
                seconds = (19000 + self.day[split]) * 86_400
                columns = {
                    "row_id": pa.array(self.row_id[split]),
                    "fold": pa.array(self.fold if split == "train" else no_fold, pa.int8()),
                    "when": pa.array(seconds * 1_000_000).cast(pa.timestamp("us")),
                }
                for number, name in enumerate(self.groups):
                    columns[name] = pa.array(self.day[split] % (7 + number))
                for name in self.more_times:
                    columns[name] = pa.array(seconds * 0).cast(pa.timestamp("us"))
                for target in self.targets:
                    columns[target.name] = self._column(target, self.labels[split][target.name])
                if self.has_weight:
                    columns["w"] = pa.array(self.weight)
                (private / split).mkdir()
                pq.write_table(pa.table(columns), private / split / "part-00000.parquet")
        return folder

    def _column(self, target, values):
        is_missing = np.isnan(values)
        if target.task == "regression":
            return pa.array(values, mask=is_missing)
        texts = [None if np.isnan(v) else target.labels[int(v)] for v in values]
        return pa.array(texts, pa.string())

    def prediction(self, target: Target, model: str, split: str) -> np.ndarray:
        seen = self.latent[split] + self._noise[model][split]
        if target.task == "regression":
            return seen * 10
        if target.task == "binary":
            return 1 / (1 + np.exp(-seen))
        logits = -np.abs(seen[:, None] - np.array([-2.0, 0.0, 2.0]))
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def predictions(self, target: Target, model: str) -> Predictions:
        """Return what the model's stage writes: train rows by models of the other four folds."""
        splits = SPLITS_OF_ROWS[model in self.without_train :]
        row_id = np.concatenate([self.row_id[split] for split in splits])
        fold = np.full(len(row_id), -1, np.int8)
        if splits[0] == "train":
            fold[: self.num_rows] = self.fold
        return Predictions(
            model=model,
            target=target.name,
            row_id=row_id,
            fold=fold,
            split=np.repeat(np.array([SPLITS.index(s) for s in splits], np.int8), self.num_rows),
            values=np.concatenate([self.prediction(target, model, split) for split in splits]),
            folds_seen=(
                (0, 1, 2, 3, 4),
                *(tuple(other for other in range(5) if other != own) for own in range(5)),
            ),
            seen=(fold + 1).astype(np.int32),
        )

    def write_model(self, folder: Path, model: str, change=lambda predictions: predictions) -> Path:
        with new_folder(folder) as private:
            for target in self.targets:
                write_predictions(private, change(self.predictions(target, model)), target)
            write_json(private / "model.json", {"summary": self.summary(model)})
        return folder

    def summary(self, model: str) -> dict:
        """A bag of two fits whose held-back loss falls and rises again; ``plain`` kept none."""
        if model == "plain":
            return {"rows": self.num_rows}
        at = list(range(1, 31))
        learnt = [self.noise[model] + 2.0 ** -(step / 4) for step in at]
        held_back = [loss + (step - 12) ** 2 / 900 for step, loss in zip(at, learnt, strict=True)]
        curve = {"title": "loss of delay", "step": "epoch", "kept": 12, "at": at}
        curve |= {"held_back": held_back, "learnt": learnt}
        return {fold: {"best_epoch": 12, "curves": [curve]} for fold in ("fold-0", "fold-1")}

    def write(self, root: Path) -> tuple[Path, dict[str, Path]]:
        members = {m: self.write_model(root / "train" / m, m) for m in self.noise}
        return self.write_table(root / "reduce"), members
