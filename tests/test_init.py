"""``headrace init``: what it guesses, what it writes, what it refuses; nothing is copied."""

import datetime
import json
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from headrace.commands.contract_text import scalar
from headrace.commands.init import MODELS, init
from headrace.commands.settings import read_settings
from headrace.commands.upgrade import expected_pipeline
from headrace.errors import ConfigError, DataError
from headrace.project import Project
from headrace.stages.extract import ExtractParams

DAY = datetime.date(2024, 1, 1)


def _rows(num_rows: int = 120) -> dict[str, list[object]]:
    return {
        "amount": [(i * 37) % 101 / 4 for i in range(num_rows)],
        "shop": [("north", "south", "east")[i // 2 % 3] for i in range(num_rows)],
        "kind": ["abc"[i % 3] for i in range(num_rows)],
        "y": [i % 2 for i in range(num_rows)],
    }


def _write_csv(path: Path, rows: dict[str, list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(rows)]
    lines += [",".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")


def _extract(folder: Path) -> ExtractParams:
    section = read_settings(Project(folder)).section("extract")
    assert isinstance(section, ExtractParams)
    return section


def _split(folder: Path) -> dict[str, object]:
    return _extract(folder).split.model_dump(exclude_unset=True)


def test_a_csv_alone_becomes_a_project(tmp_path: Path):
    """The files are all there, params.yaml is accepted, the CSV stays as it was."""
    _write_csv(tmp_path / "sales.csv", _rows() | {"land": ["here"] * 120})
    before = (tmp_path / "sales.csv").read_bytes()

    made = init(tmp_path, targets=["y"])

    assert {"params.yaml", "recipe.sql", "dvc.yaml", "headrace.lock", ".dvc/config"} <= set(
        made.written
    )
    assert (tmp_path / "sales.csv").read_bytes() == before
    assert not (tmp_path / ".headrace").exists()
    settings = read_settings(Project(tmp_path))
    assert settings.models == MODELS
    params = _extract(tmp_path)
    assert params.sources["sales"].path == "sales.csv"
    assert params.targets["y"].task == "binary"
    assert params.targets["y"].labels == ("0", "1")
    assert params.columns["kind"].role == "category"
    assert params.columns["land"].role == "ignore"  # the same in every row
    dvc = yaml.safe_load((tmp_path / "dvc.yaml").read_text())["stages"]
    assert dvc["extract"]["deps"] == ["recipe.sql", "sales.csv"]
    sections = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert {"reduce", "encode", "stack", "decide", "interpret", "evaluate", "publish"} <= set(
        sections
    )
    for word in ("numeric", "120 rows", "target y: binary", "next: review params.yaml"):
        assert word in str(made)


def test_every_reason_stands_beside_its_column(tmp_path: Path):
    rows = _rows() | {
        "order_id": list(range(1000, 1120)),
        "remark": [f"the {i} parcel came late and was quite wet inside" for i in range(120)],
        "sample_weight": [1 + i % 3 for i in range(120)],
    }
    _write_csv(tmp_path / "sales.csv", rows)
    init(tmp_path, targets=["y"])
    lines = {
        line.strip().partition(":")[0]: line
        for line in (tmp_path / "params.yaml").read_text().splitlines()
        if "role:" in line
    }
    for name, role, reason in (
        ("order_id", "ignore", "looks like a row number or identifier"),
        ("remark", "text", "free text"),
        ("sample_weight", "weight", "never negative"),
        ("amount", "numeric", "a number"),
    ):
        assert f"role: {role}" in lines[name]
        assert reason in lines[name].partition("#")[2]


def test_the_default_recipe_runs_and_quotes_what_it_must(tmp_path: Path):
    """Names with blanks and SQL's own words survive; the table is what the CSV has."""
    from headrace.params import Resources
    from headrace.record import MemoryRecorder
    from headrace.stages.extract import extract

    rows = {"order": list(range(0, 240, 2)), "a b": [i % 7 for i in range(120)]} | _rows()
    _write_csv(tmp_path / "2024 sales.csv", rows)
    init(tmp_path, targets=["y"])
    assert "t_2024_sales" in _extract(tmp_path).sources
    text = (tmp_path / "recipe.sql").read_text()
    assert '"order"' in text
    assert "\n  amount," in text

    extract(
        tmp_path,
        tmp_path / "data/extract",
        _extract(tmp_path),
        scratch=tmp_path / "scratch",
        resources=Resources(memory_budget=512 << 20),
        recorder=MemoryRecorder(),
    )
    table = pq.read_table(tmp_path / "data/extract/train")
    assert set(rows) <= set(table.column_names)


def test_one_time_column_gives_a_time_split(tmp_path: Path):
    """70 % of the rows lie before valid, 85 % before test, up to a histogram bin."""
    rows = _rows(300) | {"sold": [DAY + datetime.timedelta(days=i) for i in range(300)]}
    _write_csv(tmp_path / "sales.csv", rows)
    made = init(tmp_path, targets=["y"])
    split = _extract(tmp_path).split
    assert split.kind == "time"
    assert split.column == "sold"
    valid_from = (split.valid_from.date() - DAY).days  # type: ignore[union-attr]
    test_from = (split.test_from.date() - DAY).days  # type: ignore[union-attr]
    assert 200 <= valid_from <= 220
    assert 245 <= test_from <= 265
    assert "the only time column" in str(made)
    assert _extract(tmp_path).columns["sold"].role == "time"
    assert made.warnings == ()


def test_two_time_columns_warn_and_a_birthday_does_not_count(tmp_path: Path):
    days = [DAY + datetime.timedelta(days=i) for i in range(300)]
    _write_csv(tmp_path / "one" / "sales.csv", _rows(300) | {"sold": days, "paid": days})
    made = init(tmp_path / "one", targets=["y"])
    assert _split(tmp_path / "one")["kind"] == "stratified"
    assert any("sold, paid" in warning for warning in made.warnings)

    _write_csv(tmp_path / "two" / "people.csv", _rows(300) | {"date_of_birth": days})
    init(tmp_path / "two", targets=["y"])
    assert _split(tmp_path / "two")["kind"] == "stratified"


def test_a_column_of_train_and_test_is_a_given_split(tmp_path: Path):
    rows = _rows() | {"part": ["train" if i % 5 else "test" for i in range(120)]}
    _write_csv(tmp_path / "sales.csv", rows)
    init(tmp_path, targets=["y"])
    assert _split(tmp_path) == {"kind": "given", "column": "part"}
    assert "part" not in _extract(tmp_path).columns


def test_a_regression_has_a_random_split(tmp_path: Path):
    _write_csv(tmp_path / "sales.csv", _rows())
    init(tmp_path, targets=["amount"])
    assert _split(tmp_path)["kind"] == "random"
    assert _extract(tmp_path).targets["amount"].task == "regression"


def test_a_column_that_is_the_target_is_pointed_at(tmp_path: Path):
    rows = _rows() | {"double": [2 * (i % 2) for i in range(120)]}
    _write_csv(tmp_path / "sales.csv", rows)
    made = init(tmp_path, targets=["y"])
    assert any("double tells y almost exactly" in warning for warning in made.warnings)


def test_how_a_csv_is_written_is_declared(tmp_path: Path):
    rows = _rows()
    lines = [";".join(rows)]
    lines += [";".join(map(str, row)) for row in zip(*rows.values(), strict=True)]
    lines[3] = "NA;north;a;1"
    (tmp_path / "sales.csv").write_text("\n".join(lines) + "\n")
    init(tmp_path, targets=["y"])
    source = _extract(tmp_path).sources["sales"]
    assert (source.delimiter, source.nulls) == (";", ("NA",))
    assert _extract(tmp_path).columns["amount"].role == "numeric"


def test_several_tables_need_a_recipe_and_take_it(tmp_path: Path):
    """The recipe is the person's own; sources are named by hand or by their file."""
    rows = _rows()
    rows["shop"] = [i % 4 for i in range(120)]
    _write_csv(tmp_path / "sales.csv", rows)
    shops = {"shop": list(range(4)), "size": [10.5, 20.5, 30.5, 40.5]}
    pq.write_table(pa.table(shops), tmp_path / "shops.parquet")
    with pytest.raises(ConfigError, match=r"2 sources \(sales, shops\) and no recipe"):
        init(tmp_path, targets=["y"])

    (tmp_path / "join.sql").write_text(
        "SELECT s.row_id, s.amount, s.kind, p.size, s.y "
        "FROM sales s LEFT JOIN places p USING (shop)"
    )
    init(
        tmp_path,
        sources=["sales.csv", "places=shops.parquet"],
        targets=["y"],
        recipe=Path("join.sql"),
    )
    params = _extract(tmp_path)
    assert params.recipe == "join.sql"
    assert set(params.columns) == {"amount", "kind", "size"}
    assert not (tmp_path / "recipe.sql").exists()
    deps = yaml.safe_load(expected_pipeline(Project(tmp_path)))["stages"]["extract"]["deps"]
    assert deps == ["join.sql", "sales.csv", "shops.parquet"]


def test_json_a_folder_and_a_database_are_sources(tmp_path: Path):
    rows = _rows()
    records = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    json_project = tmp_path / "json"
    json_project.mkdir()
    (json_project / "sales.jsonl").write_text("\n".join(map(json.dumps, records)))
    init(json_project, targets=["y"])
    assert _extract(json_project).sources["sales"].kind == "json"

    parquet = tmp_path / "parquet" / "parts"
    parquet.mkdir(parents=True)
    for number in range(2):
        table = pa.table(rows).append_column("part", pa.array([number] * 120))
        pq.write_table(table, parquet / f"{number}.parquet")
    init(tmp_path / "parquet", sources=["parts"], targets=["y"])
    assert _extract(tmp_path / "parquet").sources["parts"].path == "parts/*.parquet"
    deps = yaml.safe_load((tmp_path / "parquet/dvc.yaml").read_text())["stages"]["extract"]["deps"]
    assert deps == ["parts", "recipe.sql"]

    database = tmp_path / "database"
    database.mkdir()
    connection = sqlite3.connect(database / "shop.sqlite")
    with connection:
        connection.execute("CREATE TABLE sales (nr INTEGER, amount REAL, kind TEXT, y INTEGER)")
        connection.executemany(
            "INSERT INTO sales VALUES (?, ?, ?, ?)",
            [(i, r["amount"], r["kind"], r["y"]) for i, r in enumerate(records)],
        )
    connection.close()
    with pytest.raises(ConfigError, match=r"name a table: `shop.sqlite::orders`"):
        init(database, sources=["shop.sqlite"], targets=["y"])
    init(database, sources=["shop.sqlite::sales"], targets=["y"], key=["nr"])
    assert _extract(database).key == ("nr",)
    assert "watermark" in yaml.safe_load((database / "dvc.yaml").read_text())["stages"]


def test_a_file_elsewhere_is_named_absolutely_and_not_copied(tmp_path: Path):
    _write_csv(tmp_path / "elsewhere" / "sales.csv", _rows())
    made = init(
        tmp_path / "project", sources=[str(tmp_path / "elsewhere/sales.csv")], targets=["y"]
    )
    assert _extract(tmp_path / "project").sources["sales"].path == str(
        tmp_path / "elsewhere/sales.csv"
    )
    assert any("lies outside the project" in warning for warning in made.warnings)
    assert not list((tmp_path / "project").rglob("*.csv"))


def test_no_target_asks_and_names_candidates(tmp_path: Path):
    _write_csv(tmp_path / "sales.csv", _rows())
    with pytest.raises(
        ConfigError, match=r"--target; likely, .*: y, kind, shop; all columns: amount,"
    ):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sales.csv"]


def test_a_wrong_target_names_the_nearest_and_nothing_is_written(tmp_path: Path):
    _write_csv(tmp_path / "sales.csv", _rows())
    with pytest.raises(DataError, match="nearest name: amount"):
        init(tmp_path, targets=["amuont"])
    assert [path.name for path in tmp_path.iterdir()] == ["sales.csv"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "holds no data file"),
        (["sale.csv"], "does not exist; nearest name: sales.csv"),
        (["deep"], r"kinds \['.csv', '.parquet'\]; give a pattern"),
        (["deep/a.csv", "a=deep/b.parquet"], "two sources would be called 'a'"),
        (["sales.xlsx"], "format of sales.xlsx is not told by its suffix"),
    ],
)
def test_sources_that_cannot_be_meant_are_refused(tmp_path: Path, sources: list[str], message: str):
    (tmp_path / "deep").mkdir()
    _write_csv(tmp_path / "deep/a.csv", _rows())
    pq.write_table(pa.table(_rows()), tmp_path / "deep/b.parquet")
    if sources:
        _write_csv(tmp_path / "sales.csv", _rows())
        (tmp_path / "sales.xlsx").write_text("")
    with pytest.raises(ConfigError, match=message):
        init(tmp_path, sources=sources, targets=["y"])


def test_a_recipe_outside_or_missing_is_refused(tmp_path: Path):
    _write_csv(tmp_path / "project" / "sales.csv", _rows())
    (tmp_path / "join.sql").write_text("SELECT 1")
    with pytest.raises(ConfigError, match=r"lies outside .*; copy it into the project"):
        init(tmp_path / "project", targets=["y"], recipe=tmp_path / "join.sql")
    with pytest.raises(ConfigError, match="does not exist; write one SELECT"):
        init(tmp_path / "project", targets=["y"], recipe=Path("join.sql"))


def test_nothing_is_overwritten_unless_forced(tmp_path: Path):
    _write_csv(tmp_path / "sales.csv", _rows())
    (tmp_path / "recipe.sql").write_text("-- mine\n")
    with pytest.raises(ConfigError, match=r"holds recipe.sql already; .* or --recipe recipe.sql"):
        init(tmp_path, targets=["y"])
    assert (tmp_path / "recipe.sql").read_text() == "-- mine\n"

    init(tmp_path, targets=["y"], force=True)
    assert "FROM sales" in (tmp_path / "recipe.sql").read_text()
    with pytest.raises(ConfigError, match="exists already: edit it, or give --force"):
        init(tmp_path, targets=["kind"])
    init(tmp_path, targets=["kind"], force=True)
    assert list(_extract(tmp_path).targets) == ["kind"]


def test_a_params_file_is_kept_and_completed(tmp_path: Path):
    _write_csv(tmp_path / "sales.csv", _rows())
    text = (
        "version: 1\nmodels: [baseline]\nextract: {sources: {sales: sales.csv}, targets: ['y']}\n"
    )
    (tmp_path / "params.yaml").write_text(text)
    (tmp_path / ".gitignore").write_text("*.tmp")

    made = init(tmp_path)

    assert (tmp_path / "params.yaml").read_text() == text
    assert "params.yaml" in made.kept
    assert (tmp_path / ".gitignore").read_text().startswith("*.tmp\n/.headrace/\n")
    locked = yaml.safe_load((tmp_path / "headrace.lock").read_text())["stages"]
    assert "baseline" in locked["train"]
    again = init(tmp_path)
    assert again.written == ()


def test_git_is_used_where_it_can_hold_the_pipeline(tmp_path: Path):
    """A subfolder of a repository is tracked; one whose dvc.yaml is ignored works without git."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in ("tracked", "ignored"):
        _write_csv(tmp_path / name / "sales.csv", _rows())
    (tmp_path / "ignored/.gitignore").write_text("/dvc.yaml\n/dvc.lock\n/data/\n")
    assert ".dvc/config.local" not in init(tmp_path / "tracked", targets=["y"]).written
    assert ".dvc/config.local" in init(tmp_path / "ignored", targets=["y"]).written
    assert "/data/extract" not in (tmp_path / "ignored/.gitignore").read_text()
    _write_csv(tmp_path.parent / f"{tmp_path.name}-alone" / "sales.csv", _rows())
    alone = init(tmp_path.parent / f"{tmp_path.name}-alone", targets=["y"])
    assert ".dvc/config.local" in alone.written


@pytest.mark.parametrize("value", ["yes", "No", "null", "1e3", "012", "12:30", "a: b", "x #y", ""])
def test_names_that_yaml_bends_are_quoted(value: str):
    assert yaml.safe_load(f"{{{scalar(value)}: 1}}") == {value: 1}
    assert scalar(value).startswith('"')


def test_columns_with_awkward_names_come_through(tmp_path: Path):
    names = ["on", "a: b", "x #1", "Größe", "{z}", "0x1", "it's"]
    rows: dict[str, list[object]] = {
        name: [i % 9 + k for i in range(120)] for k, name in enumerate(names)
    }
    _write_csv(tmp_path / "sales.csv", rows | {"y": [i % 2 for i in range(120)]})
    init(tmp_path, targets=["y"])
    assert set(_extract(tmp_path).columns) == set(names)
