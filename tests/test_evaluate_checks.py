"""The checks of a whole table: what they read, what they write, and that threads change nothing."""

import time
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.data.drawn import draw_rows, drawn_predictions
from headrace.data.predictions import Predictions, read_predictions, write_predictions
from headrace.data.table import open_table
from headrace.data.truth import read_truth
from headrace.errors import ConfigError
from headrace.evaluation.bootstrap import Resampling, Units
from headrace.schema import Column, Contract, Split, Target
from headrace.stages.evaluate_checks import run_checks
from headrace.storage import new_folder, write_file

LATE = Target(name="late", task="binary", labels=("no", "yes"))
SIZES = {"train": 900, "valid": 400, "test": 500}
RESAMPLING = Resampling(200, 0.95, seed=0)
COLUMNS = (
    Column(name="id", role="key", dtype="int64"),
    Column(name="when", role="time", dtype="timestamp[us]"),
    Column(name="x", role="numeric", dtype="float"),
    Column(name="z", role="numeric", dtype="int16"),
    Column(name="c", role="category", dtype="string"),
    Column(name="late", role="target", dtype="string"),
)


@dataclass
class Made:
    """A table of three splits and one model, whose values a test may change first."""

    split: Split = field(default_factory=lambda: Split(kind="random"))
    sizes: dict[str, int] = field(default_factory=lambda: SIZES)
    num_more: int = 0  # further numbers

    def __post_init__(self):
        rng = np.random.default_rng(0)
        self.columns, self.row_id, self.predicted, self.label = {}, {}, {}, {}
        for number, (split, size) in enumerate(self.sizes.items()):
            x = rng.normal(size=size)
            p = 1 / (1 + np.exp(-x))
            self.row_id[split] = np.sort(rng.choice(10**7, size, replace=False)) + number * 10**7
            self.columns[split] = {
                "id": np.arange(size),
                "when": (19_000 + rng.integers(0, 40, size)) * 86_400_000_000,
                "x": x.astype("f4"),
                "z": rng.integers(0, 1000, size).astype("i2"),
                "c": rng.choice(["a", "b", "d"], size),
            }
            for k in range(self.num_more):
                self.columns[split][f"x{k}"] = rng.normal(size=size).astype("f4")
            self.label[split] = rng.random(size) < p
            self.predicted[split] = np.clip(p + 0.05 * rng.normal(size=size), 0.01, 0.99)

    def write(self, root):
        more = [Column(name=f"x{k}", role="numeric", dtype="float") for k in range(self.num_more)]
        contract = Contract(columns=(*more, *COLUMNS), targets=(LATE,), split=self.split)
        with new_folder(root / "reduce") as folder:
            write_file(folder / "contract.json", contract.to_json())
            for split, columns in self.columns.items():
                fold = np.arange(self.sizes[split]) % 5
                table = pa.table(
                    {
                        "row_id": self.row_id[split],
                        "fold": pa.array(
                            fold if split == "train" else [None] * len(fold), pa.int8()
                        ),
                        **columns,
                        "when": pa.array(columns["when"]).cast(pa.timestamp("us")),
                        "late": np.where(self.label[split], "yes", "no"),
                    }
                )
                (folder / split).mkdir()
                pq.write_table(table, folder / split / "part-00000.parquet", row_group_size=300)
        with new_folder(root / "model") as folder:
            row_id = np.concatenate(list(self.row_id.values()))
            fold = np.full(len(row_id), -1, np.int8)
            fold[: self.sizes["train"]] = np.arange(self.sizes["train"]) % 5
            write_predictions(
                folder,
                Predictions(
                    "model",
                    "late",
                    row_id,
                    fold,
                    np.repeat(np.arange(3, dtype=np.int8), list(self.sizes.values())),
                    np.concatenate(list(self.predicted.values())),
                    ((0, 1, 2, 3, 4),),
                    np.zeros(len(row_id), np.int32),
                ),
                LATE,
            )
        return open_table(root / "reduce"), root / "model"

    def check(self, root, *, slices=(), threads=1, in_memory=True):
        table, model = self.write(root)
        truth = read_truth(table, "test", unit="auto", key="evaluate.unit") if in_memory else None
        count = self.sizes["test"]
        return run_checks(
            table,
            {"model": model},
            {"late": "model"},
            truth,
            Units("row", np.arange(count), count),
            Resampling(200, 0.95, seed=0, threads=threads),
            unit="auto",
            key="evaluate.unit",
            slices=slices,
            interpreted=None,
            budget_bytes=1 << 26,
        )


def verdicts(checks):
    return {(one.check, one.subject): one.verdict for one in checks.findings}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    return Made().check(tmp_path_factory.mktemp("honest"))


def test_an_honest_table_and_model_pass(honest):
    """All of them, and each is there; rows with x near 0 are harder, and slices say so."""
    found = verdicts(honest)
    assert honest.slices["late"].worst[0].column == "x"
    assert honest.slices["late"].worst[0].p_holm < 0.05
    assert set(found.values()) == {"ok"}, honest.findings
    assert len(found) == 3 + 3 + 1 + 4 + 3 + 2
    assert honest.warnings == []
    assert honest.note == f"sanity checks: 0 bad, 0 warn, 0 unknown, {len(found)} ok"


def test_the_file_says_what_was_looked_at(honest):
    content = honest.to_json()
    assert content["format"] == 1
    assert content["num_rows"]["test"] == {"drawn": 500, "all": 500}
    (slices,) = (one for one in content["targets"]["late"] if one["check"] == "slices")
    assert slices["facts"]["correction"] == "holm"
    assert slices["facts"]["unit"] == "row"
    assert {one["column"] for one in slices["facts"]["worst"]} <= {"x", "z", "c", "when"}


def test_the_sections_hold_all_findings(honest):
    data = honest.data_section()
    assert len(data.tables[0].rows) == 6
    assert {row[1] for row in data.tables[1].rows} == {"x", "z", "c"}
    section = honest.target_section("late", "model", 0.95)
    assert [len(table.rows) for table in section.tables] == [10, 10]
    assert len(section.charts[0].traces[0]["x"]) == 10
    slices = section.tables[1]
    assert "expected there" in slices.headings
    assert {row[1] for row in slices.rows} == {"worse", "alike"}
    assert slices.rows[0][0].startswith("x: ")
    assert "from resamples of 500 rows." in slices.note


def test_threads_and_streaming_change_nothing(tmp_path, honest):
    two = Made().check(tmp_path / "two", threads=2)
    assert two.to_json() == honest.to_json()
    assert two.target_section("late", "model", 0.95) == honest.target_section("late", "model", 0.95)
    streamed = Made().check(tmp_path / "streamed", in_memory=False)
    assert verdicts(streamed) == verdicts(honest)


def test_faults_are_found_and_warned_of(tmp_path):
    """Copies of train rows, moved values, and 1 − p, in one table."""
    made = Made()
    for name in ("x", "z", "c"):
        made.columns["test"][name][:40] = made.columns["train"][name][:40]
    made.columns["valid"]["x"] += 2
    made.predicted["test"] = 1 - made.predicted["test"]
    checks = made.check(tmp_path)
    found = verdicts(checks)

    assert found["duplicate rows", "train → test"] == "bad"
    assert found["duplicate rows", "train → valid"] == "ok"
    assert found["feature drift", "train → valid"] == "bad"
    assert found["feature drift", "train → test"] == "ok"
    assert found["inverted predictions", "model"] == "bad"
    (copies,) = (
        one for one in checks.table if one.subject == "train → test" and "dup" in one.check
    )
    assert copies.facts["num_rows"] == 40
    assert copies.facts["first_row_ids"] == [str(one) for one in made.row_id["test"][:5]]
    (drift,) = (
        one for one in checks.table if one.subject == "train → valid" and "dri" in one.check
    )
    assert "Most shifted, by stability index: x (" in drift.sentence
    assert len(checks.warnings) == list(found.values()).count("bad")


def test_a_bad_slice_and_a_leak_are_found(tmp_path):
    """A leak is not warned of again: ``encode`` has told of it."""
    made = Made()
    for split in SIZES:
        made.columns[split]["z"] = made.label[split].astype("i2")
    is_bad = made.columns["test"]["c"] == "b"
    wrong = np.where(made.label["test"], 0.05, 0.95)
    made.predicted["test"] = np.where(is_bad, wrong, made.predicted["test"])
    checks = made.check(tmp_path, slices=["c"])
    found = verdicts(checks)

    assert found["slices", "model"] == "warn"
    worst = checks.slices["late"].worst[0]
    assert (worst.column, worst.label, worst.num_rows) == ("c", "b", is_bad.sum())
    assert {one.column for one in checks.slices["late"].worst} == {"c"}
    assert found["leaks", "late"] == "bad"
    assert not any("leaks" in text for text in checks.warnings)


def test_on_a_split_by_time_drift_is_expected(tmp_path):
    made = Made(split=Split(kind="time", column="when"))
    for number, split in enumerate(SIZES):
        made.columns[split]["when"] += number * 40 * 86_400_000_000
    made.columns["test"]["x"] += 2
    checks = made.check(tmp_path, in_memory=False)
    (drift,) = (
        one
        for one in checks.table
        if one.check == "feature drift" and one.subject == "train → test"
    )
    assert drift.verdict == "warn"
    assert "drift is expected" in drift.sentence
    assert drift.facts["unit"] == "day"
    assert drift.facts["num_units"] == 80


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("whem", "is no column of the table; nearest name: when"),
        ("late", "which is a target of type string; slices need"),
        ("id", "which is a key of type int64"),
    ],
)
def test_a_column_that_cannot_be_cut_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError, match=r"`evaluate.slices` names") as caught:
        Made().check(tmp_path, slices=[name])
    assert message in str(caught.value)


def test_a_sample_is_the_same_rows_for_labels_columns_and_predictions(tmp_path):
    made = Made()
    table, model = made.write(tmp_path)
    rows = draw_rows(table, "train", ["x"], count=300, seed=1, unit="auto", key="k")
    assert 230 < len(rows.row_id) < 370
    assert rows.num_rows == 900
    is_drawn = np.isin(made.row_id["train"], rows.row_id)
    np.testing.assert_array_equal(
        rows.columns["x"].to_numpy(), made.columns["train"]["x"][is_drawn]
    )
    np.testing.assert_array_equal(rows.labels["late"], made.label["train"][is_drawn])
    predicted = drawn_predictions(model, LATE, rows)
    np.testing.assert_array_equal(predicted, made.predicted["train"][is_drawn])
    assert read_predictions(model, LATE).values[0] == made.predicted["train"][0]
    other = draw_rows(table, "train", ["x"], count=300, seed=2, unit="auto", key="k")
    assert len(np.intersect1d(other.row_id, rows.row_id)) < len(rows.row_id) * 0.6


@pytest.mark.slow
def test_a_large_table_is_checked_in_seconds(tmp_path):
    """300,000 rows of 20 columns: CPU seconds; twice the rows do not cost twice as much."""
    seconds = []
    for factor in (1, 2):
        sizes = {"train": 210_000 * factor, "valid": 45_000 * factor, "test": 45_000 * factor}
        made = Made(sizes=sizes, num_more=17)
        start = time.process_time()
        checks = made.check(tmp_path / str(factor))
        seconds.append(time.process_time() - start)
        assert sum(all_rows for _, all_rows in checks.num_rows.values()) == 300_000 * factor
        assert all(drawn < 52_000 for drawn, _ in checks.num_rows.values())
    assert seconds[0] < 20
    assert seconds[1] < 1.7 * seconds[0]


def test_a_target_without_drawn_labels_is_unknown(tmp_path):
    """Few labels, and none among the rows that were drawn: told, and no error."""
    made = Made()
    table, model = made.write(tmp_path)
    path = table.folder / "test" / "part-00000.parquet"
    rows = pq.read_table(path)
    nothing = pa.nulls(rows.num_rows, rows["late"].type)
    place = rows.schema.get_field_index("late")
    pq.write_table(rows.set_column(place, "late", nothing), path)
    checks = run_checks(
        table,
        {"model": model},
        {"late": "model"},
        None,
        Units("row", np.arange(500), 500),
        RESAMPLING,
        unit="auto",
        key="evaluate.unit",
        slices=(),
        interpreted=None,
        budget_bytes=1 << 26,
    )
    found = verdicts(checks)
    assert found["target distribution", "late"] == found["predictions", "late"] == "unknown"
    assert checks.target_section("late", "model", 0.95).charts == ()
