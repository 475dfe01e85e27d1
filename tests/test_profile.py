"""The data profile against plain numpy, and its independence of threads and order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.data.engine import open_engine
from headrace.data.profile import NUM_BINS, profile_table
from headrace.schema import Column, Contract, Target

ROWS = 5000


def describe(folder: Path, table: pa.Table, contract: Contract, *, threads: int = 2, **ranges):
    with open_engine(folder, memory_budget=1 << 30, threads=threads, max_spill=1 << 30) as engine:
        engine.load("t", pa.RecordBatchReader.from_batches(table.schema, table.to_batches()))
        return profile_table(engine, "t", contract, ranges=ranges)


def column(name: str, role: str, dtype: str) -> Column:
    return Column(name=name, role=role, dtype=dtype)


CONTRACT = Contract(
    columns=(
        column("x", "numeric", "double"),
        column("n", "numeric", "int64"),
        column("gappy", "numeric", "double"),
        column("kind", "category", "string"),
        column("flag", "category", "bool"),
        column("day", "ignore", "timestamp[us]"),
        column("price", "target", "double"),
        column("late", "target", "bool"),
        column("grade", "target", "string"),
    ),
    targets=(
        Target(name="price", task="regression"),
        Target(name="late", task="binary", labels=("false", "true")),
        Target(name="grade", task="multiclass", labels=("a", "b", "c")),
    ),
)


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    x = rng.lognormal(2, 1.5, ROWS)
    kind = rng.integers(0, 6, ROWS)
    return {
        "x": x,
        "n": rng.integers(-50, 400, ROWS) + 2**40,
        "gappy": np.where(rng.random(ROWS) < 0.3, np.nan, rng.normal(1e6, 3, ROWS)),
        "kind": np.array([f"k{k}" for k in kind], dtype=object),
        "flag": rng.random(ROWS) < 0.2,
        "day": np.datetime64("2024-01-01") + rng.integers(0, 300, ROWS).astype("timedelta64[D]"),
        "price": 3 * x + kind * 9 + rng.normal(0, 5, ROWS),
        "late": x > 12,
        "grade": np.array(["abc"[k % 3] for k in kind], dtype=object),
    }


def as_table(data: dict[str, np.ndarray]) -> pa.Table:
    arrays = {
        name: pa.array(values, from_pandas=True) if values.dtype.kind == "f" else pa.array(values)
        for name, values in data.items()
    }
    arrays["day"] = arrays["day"].cast(pa.timestamp("us"))
    return pa.table(arrays)


def eta(groups: np.ndarray, values: np.ndarray) -> float:
    """The correlation ratio, as textbooks have it."""
    mean = values.mean()
    between = sum(
        (groups == g).sum() * (values[groups == g].mean() - mean) ** 2 for g in set(groups)
    )
    return float(np.sqrt(between / ((values - mean) ** 2).sum()))


def cramer(one: np.ndarray, other: np.ndarray) -> float:
    counts = np.array([[np.sum((one == a) & (other == b)) for b in sorted(set(other))]
                       for a in sorted(set(one))], dtype=float)  # fmt: skip
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum()
    return float(np.sqrt(chi2 / counts.sum() / (min(counts.shape) - 1)))


def test_numbers_agree_with_numpy(tmp_path, data):
    found = describe(tmp_path, as_table(data), CONTRACT, x=(0.0, 50.0))
    for name in ("x", "n", "gappy", "price"):
        values = data[name][~np.isnan(data[name])] if name == "gappy" else data[name]
        entry = found[name]
        assert entry["nulls"] == ROWS - len(values)
        assert entry["distinct"] == len(np.unique(values))
        assert entry["mean"] == pytest.approx(values.mean(), rel=1e-8)
        assert entry["median"] == pytest.approx(np.median(values), rel=1e-8)
        assert entry["std"] == pytest.approx(values.std(ddof=1), rel=1e-6)
        assert (entry["min"], entry["max"]) == pytest.approx((values.min(), values.max()), rel=1e-8)
        counts, edges = np.histogram(values, bins=NUM_BINS)
        assert entry["histogram"]["edges"] == pytest.approx(list(edges), rel=1e-8)
        assert np.abs(np.array(entry["histogram"]["counts"]) - counts).sum() <= 4  # at the edges
        assert sum(entry["histogram"]["counts"]) == len(values)
    assert found["x"]["outside_range"]["count"] == int((data["x"] > 50).sum())


def test_associations_agree_with_their_formulas(tmp_path, data):
    found = describe(tmp_path, as_table(data), CONTRACT)
    present = ~np.isnan(data["gappy"])
    late = data["late"].astype(float)
    expected = {
        ("x", "price"): ("pearson", np.corrcoef(data["x"], data["price"])[0, 1]),
        ("x", "late"): ("pearson", np.corrcoef(data["x"], late)[0, 1]),
        ("gappy", "price"): (
            "pearson",
            np.corrcoef(data["gappy"][present], data["price"][present])[0, 1],
        ),
        ("x", "grade"): ("eta", eta(data["grade"], data["x"])),
        ("kind", "price"): ("eta", eta(data["kind"], data["price"])),
        ("flag", "late"): ("eta", eta(data["flag"], late)),
        ("kind", "grade"): ("cramers_v", cramer(data["kind"], data["grade"])),
    }
    for (name, target), (measure, value) in expected.items():
        entry = found[name]["association"][target]
        assert entry["measure"] == measure
        assert entry["value"] == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert found["kind"]["association"]["grade"]["value"] == pytest.approx(1)


def test_texts_flags_and_dates_are_described(tmp_path, data):
    found = describe(tmp_path, as_table(data), CONTRACT)
    values, counts = np.unique(data["kind"].astype(str), return_counts=True)
    best = sorted(zip(values, counts, strict=True), key=lambda pair: (-pair[1], pair[0]))
    assert found["kind"]["top"] == [{"value": v, "count": int(n)} for v, n in best]
    assert {one["value"] for one in found["flag"]["top"]} == {"true", "false"}
    assert found["day"]["min"].startswith(str(data["day"].min()))
    assert sum(found["day"]["histogram"]["counts"]) == ROWS


def test_neither_threads_nor_order_change_a_digit(tmp_path, data, monkeypatch):
    monkeypatch.setattr("headrace.data.profile._DIGITS", 17)  # every bit, not only what is shown
    wide = {name: np.concatenate([values] * 30) for name, values in data.items()}
    wide["x"] = wide["x"] * np.random.default_rng(1).uniform(0.9, 1.1, len(wide["x"]))
    table = as_table(wide)
    order = np.random.default_rng(2).permutation(table.num_rows)
    one = describe(tmp_path, table, CONTRACT, threads=1)
    assert one == describe(tmp_path, table, CONTRACT, threads=2)
    assert one == describe(tmp_path, table.take(order), CONTRACT, threads=2)


NUMBERS = st.lists(
    st.floats(-1e300, 1e300, allow_subnormal=False).filter(lambda v: v == 0 or abs(v) > 1e-200)
    | st.sampled_from([0.0, -0.0, 1e-200, 7.0]),
    min_size=1,
    max_size=60,
)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=NUMBERS)
def test_any_finite_numbers_can_be_described(tmp_path, values):
    contract = Contract(
        columns=(column("v", "numeric", "double"), column("y", "target", "int64")),
        targets=(Target(name="y", task="regression"),),
    )
    table = pa.table({"v": pa.array(values), "y": pa.array(range(len(values)), pa.int64())})
    entry = describe(tmp_path, table, contract)["v"]
    largest = max(abs(value) for value in values)
    assert entry["mean"] == pytest.approx(np.mean(np.array(values) / 64) * 64, abs=largest * 1e-8)
    assert sum(entry["histogram"]["counts"]) == len(values)
    ordered = sorted(values)
    middle = ordered[(len(values) - 1) // 2] / 2 + ordered[len(values) // 2] / 2
    assert entry["median"] == pytest.approx(middle, rel=1e-8, abs=largest * 1e-8)


def test_all_missing_columns_and_single_values_are_described(tmp_path):
    contract = Contract(
        columns=(
            column("none", "ignore", "double"),
            column("same", "numeric", "double"),
            column("list", "vector", "list<element: double>"),
            column("y", "target", "double"),
        ),
        targets=(Target(name="y", task="regression"),),
    )
    table = pa.table(
        {
            "none": pa.array([None, None, None], pa.float64()),
            "same": [2.5, 2.5, 2.5],
            "list": [[1.0], [2.0], None],
            "y": [1.0, 2.0, 3.0],
        }
    )
    found = describe(tmp_path, table, contract)
    assert found["none"] == {
        "role": "ignore", "dtype": "double", "rows": 3, "nulls": 3, "distinct": 0
    }  # fmt: skip
    assert (found["same"]["std"], found["same"]["median"]) == (0.0, 2.5)
    assert found["same"]["histogram"] == {"edges": [2.5, 2.5], "counts": [3]}
    assert found["same"]["association"]["y"]["value"] is None
    assert found["list"]["nulls"] == 1
