"""A sample is a project of its own below .headrace; the project itself is not touched."""

import hashlib
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from headrace.commands.init import init
from headrace.commands.sample import sample
from headrace.commands.settings import read_settings
from headrace.commands.stage import run_stage
from headrace.errors import ConfigError, DataError
from headrace.project import Project
from headrace.stages.extract import extract

_PARAMS = """\
version: 1
models: [baseline]
extract:
  # what the rows are
  sources: {rows: "parts/*.csv"}
  recipe: recipe.sql
  targets: [target]
  split: {kind: random}
reduce: {max_rel_error: 0.0}
publish: {name: "012"}
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "params.yaml").write_text(_PARAMS)
    (tmp_path / "recipe.sql").write_text("SELECT * FROM rows\n")
    for part in range(2):
        _write_part(tmp_path, part)
    init(tmp_path)
    return Project(tmp_path)


def _write_part(root: Path, part: int) -> None:
    (root / "parts").mkdir(exist_ok=True)
    body = [f"{part * 1000 + i},{(i * 37) % 101 / 4},{i % 2}" for i in range(1000)]
    (root / "parts" / f"{part}.csv").write_text("\n".join(["nr,size,target", *body]) + "\n")


def _state(root: Path) -> dict[str, str]:
    """Digest of every file of the project but those below .headrace."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and ".headrace" not in path.parts
    }


def _numbers(project: Project) -> set[int]:
    """Extract ``project`` in this process and return the column ``nr`` of all its rows."""
    from headrace.params import Resources
    from headrace.record import MemoryRecorder

    extract(
        project.root,
        project.data("extract"),
        read_settings(project).section("extract"),  # type: ignore[arg-type]
        scratch=project.scratch,
        resources=Resources(memory_budget=512 << 20),
        recorder=MemoryRecorder(),
    )
    files = sorted(project.data("extract").rglob("*.parquet"))
    return {value for file in files for value in pq.read_table(file)["nr"].to_pylist()}


def test_the_workspace_is_a_project_and_the_project_stays(project: Project):
    before = _state(project.root)
    made = sample(project, 0.1)
    root = made.project.root
    assert root.parent == project.state / "samples"
    assert root.name.startswith("0.1-")
    assert made.num_files == 2
    settings = read_settings(made.project)
    assert settings.content["extract"]["sample"] == 0.1
    own = yaml.safe_load((root / "params.yaml").read_text())
    del own["extract"]["sample"]
    assert own == yaml.safe_load(_PARAMS)
    assert "# what the rows are" in (root / "params.yaml").read_text()
    for name in ("dvc.yaml", "headrace.lock", ".dvc/config", "recipe.sql"):
        assert (root / name).is_file()
    assert "no_scm = true" in (root / ".dvc/config.local").read_text()
    assert (root / "parts/0.csv").samefile(project.root / "parts/0.csv")
    assert "project of its own" in str(made)
    assert _state(project.root) == before


def test_rows_are_a_share_and_a_larger_sample_holds_a_smaller(project: Project):
    """Binomial share of 2000 rows: five standard deviations; the same rows every time."""
    few = _numbers(sample(project, 0.05).project)
    more = _numbers(sample(project, 0.3).project)
    assert abs(len(few) - 100) < 5 * (2000 * 0.05 * 0.95) ** 0.5
    assert abs(len(more) - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5
    assert few < more
    assert _numbers(sample(project, 0.05).project) == few


def test_a_second_look_takes_in_what_changed(project: Project):
    """Replaced, added and removed files; another model list stays in the same workspace."""
    first = sample(project, 0.1).project
    mark = first.root / "dvc.lock"
    mark.write_text("schema: '2.0'\n")
    (project.root / "parts/0.csv").unlink()
    _write_part(project.root, 1)
    replaced = project.root / "parts/1.new"
    replaced.write_text((project.root / "parts/1.csv").read_text() + "5000,1.5,1\n")
    replaced.replace(project.root / "parts/1.csv")
    _write_part(project.root, 2)
    project.params.write_text(_PARAMS.replace("[baseline]", "[baseline, catboost]"))

    second = sample(project, 0.1).project

    assert second.root == first.root
    assert mark.is_file()
    assert sorted(path.name for path in (second.root / "parts").iterdir()) == ["1.csv", "2.csv"]
    assert "5000,1.5,1" in (second.root / "parts/1.csv").read_text()
    lock = yaml.safe_load((second.root / "headrace.lock").read_text())
    assert {"baseline", "catboost"} <= set(lock["stages"]["train"])


def test_another_recipe_is_another_workspace(project: Project):
    first = sample(project, 0.1).project.root
    (project.root / "recipe.sql").write_text("SELECT * FROM rows WHERE size > 3\n")
    second = sample(project, 0.1).project.root
    assert first != second
    assert "WHERE" in (second / "recipe.sql").read_text()


def test_files_of_user_metrics_come_along(project: Project):
    """As they are now, each time; one that is not there is named."""
    entry = "{function: own/metrics.py:f, higher_is_better: true}"
    with project.params.open("a") as params:
        params.write(f"evaluate: {{user_metrics: {{f: {entry}}}}}\n")
    with pytest.raises(ConfigError, match=r"own/metrics.py does not exist, but params.yaml names"):
        sample(project, 0.2)
    (project.root / "own").mkdir()
    for text in ("f = 1\n", "f = 2\n"):
        (project.root / "own" / "metrics.py").write_text(text)
        copied = sample(project, 0.2).project.root / "own" / "metrics.py"
        assert copied.read_text() == text


def test_a_stage_runs_in_the_workspace(project: Project, monkeypatch: pytest.MonkeyPatch):
    """Code lock, journal and outs are the workspace's; the project has none of them after it."""
    workspace = sample(project, 0.2).project
    monkeypatch.chdir(workspace.root)
    monkeypatch.setattr("headrace.commands.stage.die_with_parent", lambda: None)
    run_stage(workspace, "extract")
    assert list(workspace.journal.glob("*.jsonl"))
    assert workspace.data("extract").is_dir()
    assert not project.journal.exists()
    assert not project.data("extract").exists()


def test_where_links_cannot_be_made_a_symbolic_one_serves(
    project: Project, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    workspace = sample(project, 0.2).project
    assert (workspace.root / "parts/0.csv").is_symlink()
    monkeypatch.undo()
    assert len(_numbers(workspace)) > 300


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 5.0])
def test_a_fraction_outside_is_refused(project: Project, fraction: float):
    with pytest.raises(ConfigError, match=r"give a share of the rows such as 0\.05"):
        sample(project, fraction)


def test_a_source_without_files_is_refused(project: Project):
    for path in (project.root / "parts").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no file for the sources"):
        sample(project, 0.1)
