"""``headrace upgrade`` writes what follows from code and params; what a person added stays."""

from pathlib import Path

import pytest
import yaml

import headrace.commands.scaffold as scaffold
from headrace.commands.checks import require_settings
from headrace.commands.init import init
from headrace.commands.pipeline import read_dag
from headrace.commands.upgrade import expected_pipeline, is_source_tree, upgrade
from headrace.errors import ConfigError
from headrace.models.protocol import KINDS
from headrace.project import Project

ROOT = Path(__file__).parents[1]
_PARAMS = """\
version: 1
models: [baseline, catboost]
extract:
  sources: {rows: rows.csv, parts: "parts/*.csv", loose: "*.parquet"}
  recipe: join.sql
  targets: [target]
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "params.yaml").write_text(_PARAMS)
    for name in ("b.parquet", "a.parquet"):
        (tmp_path / name).touch()
    init(tmp_path)
    return Project(tmp_path)


def _stages(project: Project) -> dict[str, dict[str, object]]:
    stages: dict[str, dict[str, object]] = yaml.safe_load((project.root / "dvc.yaml").read_text())[
        "stages"
    ]
    return stages


def test_a_fresh_project_needs_nothing(project: Project):
    done = upgrade(project)
    assert done.written == ()
    assert "nothing to upgrade" in str(done)


def test_patterns_become_folders_or_the_files_of_today(project: Project):
    """A folder tells of new files; the project's own folder cannot be an input, for it has outs."""
    assert _stages(project)["extract"]["deps"] == [
        "a.parquet", "b.parquet", "join.sql", "parts", "rows.csv",
    ]  # fmt: skip


def test_other_code_names_the_stages_that_rerun(project: Project, monkeypatch: pytest.MonkeyPatch):
    """One module of reduce and of one model changes: those two stages, no others."""
    real = scaffold.code_digest

    def changed(*modules: str) -> str:
        has_changed = {"headrace.stages.reduce", "headrace.models.catboost"} & set(modules)
        # These read models of every kind; keep the case to one stage and one model.
        reads_all = {"headrace.stages.interpret", "headrace.stages.publish"} & set(modules)
        return "other" if has_changed and not reads_all else real(*modules)

    monkeypatch.setattr(scaffold, "code_digest", changed)
    done = upgrade(project)
    assert done.written == ("headrace.lock",)
    assert done.stages == ("reduce", "train@catboost")
    assert "run again: reduce, train@catboost" in str(done)
    assert upgrade(project).written == ()


def test_another_list_of_models_or_sources_reaches_the_files(project: Project):
    project.params.write_text(
        _PARAMS.replace("[baseline, catboost]", "[baseline]").replace('parts: "parts/*.csv", ', "")
    )
    done = upgrade(project)
    assert done.written == ("dvc.yaml",)
    assert done.stages == ("extract",)
    assert "parts" not in _stages(project)["extract"]["deps"]  # type: ignore[operator]
    lock = yaml.safe_load((project.root / "headrace.lock").read_text())
    assert list(lock["stages"]["train"]) == list(KINDS)  # so `models` can be edited freely


def test_what_was_added_by_hand_stays(project: Project):
    """Declared needs, descriptions, comments and stages of one's own; ours are put right."""
    path = project.root / "dvc.yaml"
    text = path.read_text()
    text = text.replace(
        "  reduce:\n", "  # mine\n  reduce:\n    desc: narrow\n    meta: {threads: 1}\n"
    )
    text = text.replace(
        "    - data/extract\n    params:\n    - reduce\n", "    params:\n    - reduce\n"
    )
    text += "  mine:\n    cmd: echo hello\n"
    text = text.replace("plots:\n", "plots:\n- mine.csv: {x: a, y: b}\n", 1)
    path.write_text(text)

    done = upgrade(project)

    stages = _stages(project)
    assert done.stages == ("reduce",)
    assert stages["reduce"]["deps"] == ["data/extract"]
    assert (stages["reduce"]["desc"], stages["reduce"]["meta"]) == ("narrow", {"threads": 1})
    assert stages["mine"] == {"cmd": "echo hello"}
    assert "# mine" in path.read_text()
    plots = yaml.safe_load(path.read_text())["plots"]
    assert [list(plot) for plot in plots] == [["mine.csv"], ["data/evaluate/plots"]]
    assert upgrade(project).written == ()


def test_a_pipeline_from_before_gets_what_is_new(project: Project):
    """An older dvc.yaml without a stage, a field or plots has them afterwards."""
    path = project.root / "dvc.yaml"
    whole = yaml.safe_load(path.read_text())
    old = {"stages": {k: v for k, v in whole["stages"].items() if k != "publish"}}
    path.write_text(yaml.safe_dump(old))
    assert upgrade(project).stages == ("publish",)
    assert yaml.safe_load(path.read_text()) == whole


def test_a_database_brings_its_watermark_and_takes_it_away(project: Project):
    database = _PARAMS.replace("rows: rows.csv", "rows: {path: shop.sqlite, table: orders}")
    project.params.write_text(database)
    upgrade(project)
    stages = _stages(project)
    assert stages["watermark"]["always_changed"] is True
    assert "data/watermark" in stages["extract"]["deps"]  # type: ignore[operator]
    assert "shop.sqlite" not in stages["extract"]["deps"]  # type: ignore[operator]
    project.params.write_text(_PARAMS)
    upgrade(project)
    assert "watermark" not in _stages(project)


def test_a_newer_version_of_params_is_refused(project: Project):
    project.params.write_text(_PARAMS.replace("version: 1", "version: 2"))
    with pytest.raises(ConfigError, match="`version` is 2; this headrace reads version 1"):
        upgrade(project)


def test_a_broken_pipeline_is_named(project: Project):
    (project.root / "dvc.yaml").write_text("stages: [1, 2\n")
    with pytest.raises(ConfigError, match=r"dvc.yaml is not a pipeline .* delete it and run"):
        upgrade(project)


def test_a_source_tree_lists_code_file_by_file(project: Project):
    """With the code in the project, DVC tracks the modules themselves and there is no lock."""
    marker = project.root / "src" / "headrace" / "lineage.py"
    marker.parent.mkdir(parents=True)
    marker.touch()
    assert is_source_tree(project)
    stages = yaml.safe_load(expected_pipeline(project))["stages"]
    reduce = stages["reduce"]
    assert "src/headrace/stages/reduce.py" in reduce["deps"]
    assert "src/headrace/stages/evaluate.py" not in reduce["deps"]
    assert reduce["params"] == ["reduce"]
    assert "src/headrace/models/${item.model}.py" in stages["train"]["deps"]


@pytest.mark.skipif(not (ROOT / "dvc.yaml").is_file(), reason="a tree without its pipeline")
def test_the_pipeline_of_this_repository_lists_the_code_it_runs():
    """What `headrace upgrade` would write is what is committed."""
    assert (ROOT / "dvc.yaml").read_text() == expected_pipeline(Project(ROOT))


def test_an_interval_of_the_metrics_asks_no_model_again():
    """Evaluate reads what interpret wrote; neither reaches back to train."""
    dag = read_dag(Project(ROOT))

    assert set(dag.downstream(["interpret"])) == {"evaluate"}
    assert "interpret" not in dag.downstream(["evaluate"])


def test_a_section_embedding_catboost_is_a_stage_after_nn(project: Project):
    """Its model lies among those that the stages after it read; without it nothing does."""
    sections = "".join(
        f"{name}: {{}}\n"
        for name in ("reduce", "encode", "stack", "decide", "interpret", "evaluate")
    )
    plain = _PARAMS.replace("[baseline, catboost]", "[nn, catboost]")
    plain += f"{sections}publish: {{}}\ntrain: {{nn: {{}}, catboost: {{}}}}\n"
    project.params.write_text(f"{plain}embedding_catboost: {{}}\n")
    with pytest.raises(ConfigError, match=r"params.yaml has embedding_catboost, dvc.yaml has not"):
        require_settings(project)
    done = upgrade(project)
    dag = read_dag(project)
    stage = dag.by_name["embedding_catboost"]

    assert done.stages == ("embedding_catboost",)
    require_settings(project)
    assert set(stage.upstream) == {"reduce", "encode", "train@nn"}
    assert stage.outs == ("data/train/embedding_catboost",)
    assert project.data("embedding_catboost") == project.root / stage.outs[0]
    assert set(dag.downstream(["embedding_catboost"])) == {
        "stack",
        "decide",
        "interpret",
        "evaluate",
        "publish",
    }
    digests = yaml.safe_load((project.root / "headrace.lock").read_text())["stages"]
    assert {"embedding_catboost", "stack", "train"} < set(digests)

    project.params.write_text(plain)
    with pytest.raises(ConfigError, match=r"dvc.yaml has embedding_catboost, params.yaml has not"):
        require_settings(project)
    upgrade(project)
    assert "embedding_catboost" not in read_dag(project).by_name


def test_embedding_catboost_needs_nn_and_is_no_model_of_the_list(project: Project):
    project.params.write_text(f"{_PARAMS}embedding_catboost: {{}}\n")
    with pytest.raises(ConfigError, match="`models` lists baseline, catboost; add nn there"):
        upgrade(project)
    project.params.write_text(_PARAMS.replace("[baseline", "[embedding_catboost"))
    with pytest.raises(ConfigError, match="is no entry of `models` but a stage of its own"):
        upgrade(project)


def test_files_of_user_metrics_are_dependencies_of_evaluate_alone(project: Project):
    """So a change of one runs that stage again, and no other but what follows it."""
    entry = "{function: own/metrics.py:f, higher_is_better: true}"
    metrics = f"evaluate: {{user_metrics: {{f: {entry}}}}}\n"
    (project.root / "params.yaml").write_text(_PARAMS + metrics)
    done = upgrade(project)
    assert done.stages == ("evaluate",)
    with_it = [name for name, one in _stages(project).items() if "own/metrics.py" in one["deps"]]
    assert with_it == ["evaluate"]
