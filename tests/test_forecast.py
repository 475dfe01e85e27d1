"""The forecast of a run: rows without reading, costs near what was measured, refusals in time."""

import gzip
import json
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headrace.commands.costs import Cost, Shape, stage_cost
from headrace.commands.forecast import Forecast, StageForecast, forecast
from headrace.commands.init import init
from headrace.commands.sizes import SourceSize, measure_sources
from headrace.data.scan import Source
from headrace.errors import DataError, ResourceError
from headrace.params import Resources
from headrace.project import Project
from headrace.storage import write_json
from headrace.tracking.journal import open_run

# DVC's own use of a library that has moved on.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")

_GIB = 1 << 30
_MIB = 1 << 20


# --- rows ----------------------------------------------------------------------------------------


def _measure(root: Path, **source: object) -> SourceSize:
    (size,) = measure_sources(root, {"rows": Source.model_validate(source)})
    return size


def _csv(num_rows: int, *, width: int = 6) -> str:
    body = "".join(f"{i},{'x' * (1 + i % width)},{i % 7}\n" for i in range(num_rows))
    return f"nr,text,kind\n{body}"


def test_a_small_csv_is_counted_exactly_with_or_without_its_last_newline(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(_csv(500))
    assert _measure(tmp_path, path="rows.csv").num_rows == 500
    path.write_text(_csv(500).rstrip("\n"))
    size = _measure(tmp_path, path="rows.csv")
    assert (size.num_rows, size.is_exact, size.rows_text) == (500, True, "500 rows")
    assert _measure(tmp_path, path="rows.csv", names=["a", "b", "c"], skip=1).num_rows == 500


def test_a_large_csv_is_told_from_samples(tmp_path: Path):
    """Rows get longer towards the end; windows all over the file see it, one would not."""
    rows = [f"{i},{'x' * (5 + i // 4000)}" for i in range(150_000)]
    (tmp_path / "rows.csv").write_text("nr,text\n" + "\n".join(rows) + "\n")
    size = _measure(tmp_path, path="rows.csv")
    assert size.num_rows == pytest.approx(150_000, rel=0.05)
    assert size.rows_text.startswith("~")


def test_of_very_many_files_some_stand_for_all(tmp_path: Path):
    for number in range(250):
        (tmp_path / f"{number}.csv").write_text(_csv(20 + number % 3))
    size = _measure(tmp_path, path="*.csv")
    assert (size.num_files, size.is_exact) == (250, False)
    assert size.num_rows == pytest.approx(250 * 21, rel=0.03)


def test_compressed_text_parquet_and_json_are_told(tmp_path: Path):
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(_csv(200_000).encode()))
    assert _measure(tmp_path, path="rows.csv.gz").num_rows == pytest.approx(200_000, rel=0.1)
    (tmp_path / "few.csv.gz").write_bytes(gzip.compress(_csv(20).encode()))
    assert _measure(tmp_path, path="few.csv.gz").num_rows == 20

    for number in range(2):
        pq.write_table(pa.table({"x": list(range(1000))}), tmp_path / f"part{number}.parquet")
    size = _measure(tmp_path, path="part*.parquet")
    assert (size.num_rows, size.num_files, size.is_exact) == (2000, 2, True)

    records = [{"nr": i, "deep": {"a": [1, {"b": 2}]}} for i in range(300)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert _measure(tmp_path, path="rows.jsonl").num_rows == 300
    (tmp_path / "rows.json").write_text(json.dumps(records * 50))
    assert _measure(tmp_path, path="rows.json").num_rows == pytest.approx(15_000, rel=0.02)


def test_databases_tell_their_own_estimate(tmp_path: Path):
    with duckdb.connect(str(tmp_path / "shop.duckdb")) as connection:
        connection.execute("CREATE TABLE orders AS SELECT * FROM range(1234)")
    assert _measure(tmp_path, path="shop.duckdb", table="orders").num_rows == 1234
    lite = sqlite3.connect(tmp_path / "shop.sqlite")
    with lite:
        lite.execute("CREATE TABLE orders (x)")
        lite.executemany("INSERT INTO orders VALUES (?)", [(i,) for i in range(77)])
    lite.close()
    assert _measure(tmp_path, path="shop.sqlite", table="orders").num_rows == 77
    query = _measure(tmp_path, path="shop.sqlite", query="SELECT * FROM orders")
    assert (query.num_rows, query.rows_text) == (None, "rows unknown")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv.gz"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"not what it says")
    with pytest.raises(DataError, match=f"{name} is not a whole .* file"):
        _measure(tmp_path, path=name)


# --- costs ---------------------------------------------------------------------------------------

# Seconds, peak bytes of the stage's process and bytes of its out, recorded on two cores.
_MEASURED = {
    "water": (
        Shape(3276, 9, 0, 0, 1, 521_910, True),
        {
            "extract": (0.9, 189e6, 0.27e6),
            "reduce": (0.9, 179e6, 0.27e6),
            "encode": (0.5, 163e6, 0.18e6),
            "train@baseline": (0.4, 161e6, 0.1e6),
            "train@catboost": (2.1, 176e6, 0.1e6),
            "train@nn": (10.8, 374e6, 0.1e6),
            "stack": (0.8, 188e6, 0.1e6),
            "evaluate": (1.8, 201e6, 0.5e6),
            "publish": (0.6, 170e6, 1.2e6),
        },
    ),
    "adult": (
        Shape(48_842, 6, 8, 1, 1, 5_977_435, True),
        {
            "extract": (2.0, 177e6, 0.96e6),
            "train@catboost": (19.4, 196e6, 0.8e6),
            "train@nn": (73.0, 340e6, 0.8e6),
            "stack": (0.9, 177e6, 0.45e6),
            "evaluate": (2.3, 217e6, 0.6e6),
        },
    ),
    "200k rows": (
        Shape(200_000, 14, 5, 1, 2, 27_680_040, True),
        {
            "extract": (3.5, 248e6, 16e6),
            "reduce": (1.0, 242e6, 17e6),
            "encode": (0.7, 189e6, 17e6),
            "train@baseline": (0.5, 150e6, 11e6),
            "train@catboost": (150.0, 628e6, 11e6),
            "train@nn": (48.8, 399e6, 11e6),
            "stack": (2.5, 246e6, 11e6),
            "evaluate": (4.8, 234e6, 1.3e6),
        },
    ),
    "flights": (
        Shape(335_214, 21, 7, 1, 2, 33_400_000, True),
        {
            "extract": (9.2, 370e6, 20e6),
            "reduce": (3.0, 255e6, 13e6),
            "encode": (2.0, 210e6, 35e6),
            "train@baseline": (1.1, 170e6, 12e6),
            "train@catboost": (110.0, 441e6, 12e6),
            "train@nn": (60.0, 422e6, 12e6),
            "stack": (8.0, 298e6, 12e6),
            "evaluate": (11.0, 256e6, 1.3e6),
        },
    ),
}
_MEMBERS = {"water": 8.0, "adult": 8.0, "200k rows": 1.0, "flights": 4.0}  # of train@nn, one fit
_CASES = [(case, stage) for case, (_, stages) in _MEASURED.items() for stage in stages]


@pytest.mark.parametrize(("case", "stage"), _CASES)
def test_costs_are_near_what_was_measured(case: str, stage: str):
    """Seconds within 2.5 times or 3 s, memory within 1.7 times, disk within 3 times or 10 MB."""
    shape, measured = _MEASURED[case]
    seconds, peak_bytes, disk_bytes = measured[stage]
    params = {"members": _MEMBERS[case]}
    cost = stage_cost(stage, shape, params, Resources(memory_budget=2 * _GIB), 3)
    assert cost.seconds <= 2.5 * seconds + 3
    assert seconds <= 2.5 * cost.seconds + 3
    assert peak_bytes / 1.7 <= cost.peak_bytes <= 1.7 * peak_bytes
    assert disk_bytes / 3 - 10e6 <= cost.disk_bytes <= 3 * disk_bytes + 10e6


def test_memory_of_streaming_stages_stays_and_the_pool_is_capped():
    """Ten million rows cost time and disk, but memory only up to what the settings allow."""
    resources = Resources(memory_budget=2 * _GIB)
    few = _MEASURED["200k rows"][0]
    many = replace(few, num_rows=50 * few.num_rows, source_bytes=50 * few.source_bytes)
    costs = {
        stage: stage_cost(stage, many, {"pool_budget": float(_GIB)}, resources, 3)
        for stage in ("extract", "reduce", "encode", "train@catboost")
    }
    assert costs["extract"].peak_bytes <= _GIB + 200 * _MIB
    assert costs["reduce"].peak_bytes < 400 * _MIB
    assert costs["train@catboost"].peak_bytes < 3 * _GIB
    assert costs["encode"].disk_bytes > 40 * stage_cost("encode", few, {}, resources, 3).disk_bytes


# --- the whole -----------------------------------------------------------------------------------


def _forecast(*, peak: int, disk: int, budget: int = 2 * _GIB, state: str = "stale") -> Forecast:
    stage = StageForecast("train@catboost", state, Cost(10.0, peak, disk, 10), "rates")
    return Forecast(
        sources=(SourceSize("rows", 1, 100, 10, 100, True),),
        shape=Shape(10, 2, 1, 0, 1, 100, True),
        stages=(stage,),
        budget_bytes=budget,
        free_bytes=10 * _GIB,
        machine_bytes=16 * _GIB,
    )


def test_what_does_not_fit_is_refused_with_the_figure():
    with pytest.raises(ResourceError, match=r"train@catboost needs about 3.4 GiB .* at least 3.8"):
        _forecast(peak=3 * _GIB, disk=1).require_fit()
    with pytest.raises(ResourceError, match=r"20.0 GiB of disk and 10.0 GiB are free"):
        _forecast(peak=1, disk=20 * _GIB).require_fit()
    both = _forecast(peak=3 * _GIB, disk=20 * _GIB)
    assert len(both.faults) == 2
    assert str(both).count("will not fit") == 2
    fits = _forecast(peak=_MIB, disk=_MIB)
    fits.require_fit()
    assert "it fits" in str(fits)


def test_near_a_limit_warns_and_nothing_to_do_refuses_nothing():
    near = _forecast(peak=3 * _GIB // 2, disk=9 * _GIB)
    assert {warning[:6] for warning in near.warnings} == {"memory", "disk i"}
    idle = _forecast(peak=9 * _GIB, disk=99 * _GIB, state="fresh")
    idle.require_fit()
    assert "nothing would run" in str(idle)
    assert "this machine has 16.0 GiB" in str(_forecast(peak=1, disk=1, budget=32 * _GIB))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("project")
    body = [f"{i},{i % 13 / 2},{'abc'[i % 3]},{i % 2}" for i in range(400)]
    (root / "rows.csv").write_text("\n".join(["nr,size,kind,target", *body]) + "\n")
    init(root, targets=["target"])
    return Project(root)


def test_a_project_that_never_ran_would_run_all_of_it(project: Project):
    told = forecast(project)
    assert [one.stage for one in told.stages] == [
        "extract", "reduce", "encode", "train@baseline", "train@catboost", "train@nn",
        "stack", "decide", "interpret", "evaluate", "publish",
    ]  # fmt: skip
    assert {one.state for one in told.stages} == {"never run"}
    assert {one.basis for one in told.stages} == {"rates"}
    shape = told.shape
    assert (shape.num_rows, shape.num_numbers, shape.num_categories) == (400, 1, 1)
    assert (shape.num_texts, shape.num_targets) == (1, 1)  # nr is put aside
    assert "400 rows" in str(told)


def test_a_union_counts_the_rows_of_both_sources(project: Project, tmp_path: Path):
    (tmp_path / "a.csv").write_text((project.root / "rows.csv").read_text())
    (tmp_path / "b.csv").write_text((project.root / "rows.csv").read_text() + "400,1.0,a,1\n")
    (tmp_path / "all.sql").write_text(
        "-- one UNDER the other\nSELECT * FROM a UNION ALL SELECT * FROM b"
    )
    init(tmp_path, targets=["target"], recipe=Path("all.sql"))
    assert forecast(Project(tmp_path)).shape.num_rows == 801


def test_an_example_that_is_not_there_yet_is_known(tmp_path: Path):
    """A fresh clone has no raw data, and its forecast is that of the flights all the same."""
    (tmp_path / "params.yaml").write_text(
        "version: 1\nmodels: [baseline]\nraw: {example: flights}\n"
        "extract: {sources: {flights: data/raw/flights.csv}, targets: [late]}\n"
    )
    init(tmp_path)
    told = forecast(Project(tmp_path))
    assert told.shape.num_rows == 336_776
    assert told.stages[0].stage == "raw"


def test_earlier_runs_replace_the_rates(project: Project):
    """What the journal has is scaled by the rows that the last extract had."""
    journal = open_run(project.journal, kind="repro")
    stage = journal.stage("encode")
    stage.peak_bytes = 123 * _MIB
    time.sleep(0.05)
    stage.close("finished", exit_code=0)
    journal.close("finished")
    report = {"sources": {"rows": {"rows": 200}}, "rows": {"recipe": 200, "without_target": 100}}
    write_json(project.data("extract") / "extract.json", report)
    told = forecast(project)
    (encode,) = [one for one in told.stages if one.stage == "encode"]
    (seconds,) = [
        e["seconds"]
        for line in next(project.journal.glob("*.jsonl")).read_text().splitlines()
        if (e := json.loads(line))["event"] == "stage_close"
    ]
    assert encode.basis == "run 1"
    assert encode.cost.seconds == pytest.approx(2 * seconds)
    assert encode.cost.peak_bytes >= 123 * _MIB
    assert told.shape.num_rows == 200  # half of the source's 400 rows, as it was before


def test_a_forecast_starts_nothing_and_is_quick(project: Project):
    """A process of its own: no Prefect, MLflow, torch or CatBoost, and well below 5 s of work."""
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from headrace.commands.forecast import forecast\n"
        "from headrace.project import Project\n"
        "forecast(Project(Path(sys.argv[1])))\n"
        "heavy = {'prefect', 'mlflow', 'torch', 'catboost', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy), time.process_time())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(project.root)],
        capture_output=True,
        text=True,
        check=True,
    )
    heavy, _, seconds = done.stdout.strip().rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 4
