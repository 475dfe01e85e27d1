"""``headrace sync``: the published model in MLflow's registry, once, and usable on raw rows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from headrace.commands.sync import complete_last_run, sync, sync_or_defer
from headrace.errors import DependencyError, IntegrityError
from headrace.models.package import load_package
from headrace.project import Project
from headrace.stages.publish import PublishParams
from headrace.tracking.journal import list_runs, open_run, read_run, run_path
from headrace.tracking.location import (
    as_current,
    connect,
    find_store,
    prepare_store,
    quiet,
    repair_location,
)
from tests.published_case import Case, make_case, publish_case, raw_rows

pytestmark = pytest.mark.slow
NAME = "flights"
PARAMS = f"""\
version: 1
models: [baseline, catboost]
extract:
  sources: {{flights: {{path: flights.csv}}}}
  targets: {{late: {{task: binary}}}}
publish: {{name: {NAME}}}
"""


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("synced"), name=NAME)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a fresh store, made once: MLflow needs seconds for it."""
    project = tmp_path_factory.mktemp("empty-store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        prepare_store(find_store(project))
    return project


@pytest.fixture
def project(case: Case, tmp_path: Path, empty_store: Path, monkeypatch) -> Project:
    """A project whose model is published by a run of the journal."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = shutil.copytree(empty_store, tmp_path / "my project")
    repair_location(root)
    (root / "params.yaml").write_text(PARAMS)
    made = Project(root)
    shutil.copytree(case.package, made.data("publish"))
    tell_publish(made, case.published.digest)
    monkeypatch.chdir(root)
    return made


def tell_publish(project: Project, digest: str) -> str:
    """Write a run that published the package with ``digest``; return its id."""
    run = open_run(project.journal, kind="flow")
    stage = run.stage("publish")
    stage.params({"package": digest})
    stage.close("finished", exit_code=0)
    run.close("finished")
    return run.run_id


def versions(project: Project) -> list:
    client = connect(find_store(project.root))
    return sorted(client.search_model_versions(f"name = '{NAME}'"), key=lambda v: int(v.version))


def test_the_package_is_registered_as_challenger_with_its_run(project: Project, case) -> None:
    """Version 1, the alias, the run that made it, signature and example."""
    done = sync(project)
    client = connect(find_store(project.root))
    version = client.get_model_version_by_alias(NAME, "challenger")
    (run_id,) = list_runs(project.journal)

    assert str(version.version) == "1"
    assert (done.registered.version, done.registered.is_new) == ("1", True)
    assert client.get_run(version.run_id).info.run_name == run_id
    assert version.tags["headrace.package"] == case.published.digest
    assert done.replicated.sent == 1
    assert "version 1 (new) is the challenger: models:/flights/1" in str(done)
    with quiet(), as_current(find_store(project.root)):
        from mlflow.models import get_model_info

        info = get_model_info(f"models:/{NAME}@challenger")
    assert [column.name for column in info.signature.inputs] == [
        "distance", "seats", "is_weekend", "carrier", "gate",
    ]  # fmt: skip
    assert "late_probability_true" in [column.name for column in info.signature.outputs]
    assert info.saved_input_example_info is not None
    assert sorted(path.name for path in project.root.iterdir()) == [
        ".headrace", "data", "mlflow.db", "mlruns", "params.yaml",
    ]  # fmt: skip


LOAD = """
import sys
import pandas as pd
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
model.predict(pd.read_pickle(sys.argv[3])).to_pickle(sys.argv[4])
import headrace
print(headrace.__file__)
"""


def test_mlflow_loads_the_model_and_predicts_raw_rows(project: Project, tmp_path) -> None:
    """In a process of its own, with the code in the model; nulls and new labels included."""
    done = sync(project)
    rows = raw_rows(20).to_pandas()
    rows.loc[3, "carrier"] = "ZZ"
    rows.loc[4, ["carrier", "distance", "gate"]] = None
    rows["seats"] = rows["seats"].astype("float64")
    rows.loc[5, "seats"] = None
    rows.to_pickle(tmp_path / "rows.pickle")
    command = [sys.executable, "-W", "error::FutureWarning", "-c", LOAD]
    command += [find_store(project.root).uri, done.registered.uri]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        [*command, str(tmp_path / "rows.pickle"), str(tmp_path / "out.pickle")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.strip() == ""
    assert "mlruns" in ran.stdout, "the library came from elsewhere than the model"
    found = pd.read_pickle(tmp_path / "out.pickle")
    expected = load_package(project.data("publish")).predict(rows).to_pandas()
    pd.testing.assert_frame_equal(found, expected)


def test_a_package_has_one_version_however_often_it_is_synced(project: Project) -> None:
    """Again at once changes nothing; the challenger stays."""
    sync(project)
    again = sync(project)

    assert (again.registered.version, again.registered.is_new) == ("1", False)
    assert len(versions(project)) == 1
    assert again.replicated.sent == 0


def test_another_package_is_another_version_and_takes_the_alias(project, case, tmp_path) -> None:
    """And the first package, when it is published again, takes it back."""
    sync(project)
    first = project.data("publish").rename(tmp_path / "first")
    section = PublishParams(name=NAME, example_rows=3)
    publish_case(case.root, case.members, project.data("publish"), section)
    assert sync(project).registered.version == "2"
    shutil.rmtree(project.data("publish"))
    first.rename(project.data("publish"))
    back = sync(project)

    assert (back.registered.version, back.registered.is_new) == ("1", False)
    client = connect(find_store(project.root))
    assert str(client.get_model_version_by_alias(NAME, "challenger").version) == "1"


@pytest.mark.parametrize("step", ["log_model_artifacts", "finalize_logged_model",
                                  "create_registered_model", "create_model_version",
                                  "set_registered_model_alias"])  # fmt: skip
def test_a_cut_registration_is_taken_up_again(project: Project, monkeypatch, step: str) -> None:
    """Cut at each step: the next sync leaves one version, one ready model, one alias."""
    from mlflow import MlflowClient

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError("cut")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, cut)
        with pytest.raises(DependencyError, match="stays in the journal"):
            sync(project)
        assert "stays in the journal" in sync_or_defer(project)
    sync(project)

    client = connect(find_store(project.root))
    experiment = client.get_experiment_by_name(NAME).experiment_id
    assert [str(model.status) for model in client.search_logged_models([experiment])] == ["READY"]
    assert len(versions(project)) == 1
    assert str(client.get_model_version_by_alias(NAME, "challenger").version) == "1"


def test_the_model_survives_moving_the_folder(project: Project, tmp_path: Path) -> None:
    """After a move the registered model still loads."""
    uri = sync(project).registered.uri
    moved = project.root.rename(tmp_path / "moved")
    os.chdir(moved)
    sync(Project(moved))
    with quiet(), as_current(find_store(moved)):
        import mlflow.pyfunc

        found = mlflow.pyfunc.load_model(uri).predict(raw_rows(4).to_pandas())

    assert len(found) == 4


def test_without_a_package_only_runs_are_sent(project: Project) -> None:
    """Before the first publish there is nothing to register."""
    shutil.rmtree(project.data("publish"))
    done = sync(project)

    assert done.registered is None
    assert "no model is published yet" in str(done)


def test_a_damaged_package_is_not_registered(project: Project) -> None:
    """What would not load is not offered to anyone."""
    (project.data("publish") / "contract.json").write_text("{}")

    with pytest.raises(IntegrityError, match=r"contract\.json has"):
        sync(project)


@pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # in DVC's own code
@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "stopped"])
def test_a_run_of_plain_dvc_is_completed_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, is_whole: bool
) -> None:
    """After dvc has ended, the newest run gets lineage and results, and keeps its end.

    But if stages are still to be run, dvc was stopped between two: then nothing is claimed.
    """
    found = {} if is_whole else {"publish": ["deleted outs"]}
    monkeypatch.setattr("headrace.commands.sync.changes", lambda *_: found)
    run = open_run(project.journal, kind="dvc")
    run.stage("extract").close("finished", exit_code=0)
    run.close("finished")
    ended = read_run(run_path(project.journal, run.run_id)).closed
    (project.root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  extract: {cmd: a}\n  publish: {cmd: b}\n"
    )
    (project.root / "dvc.yaml").write_text(
        "stages:\n  extract: {cmd: a, outs: [data/extract]}\n"
        "  publish: {cmd: b, outs: [data/publish]}\n"
    )
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=project.root, check=True
    )
    (project.data("evaluate")).mkdir(parents=True)
    (project.data("evaluate") / "metrics.json").write_text('{"late": {}}')
    (project.data("evaluate") / "comparison.json").write_text(
        '{"targets": {"late": {"tied_with_best": ["nn"]}}}'
    )
    complete_last_run(project)
    complete_last_run(project)

    told = read_run(run_path(project.journal, run.run_id))
    if not is_whole:
        assert (told.status, told.lineage, told.results) == ("interrupted", None, None)
        return
    first = list_runs(project.journal)[0]
    assert told.lineage is not None
    assert len(told.lineage) == 64
    assert dict(told.reused) == {"publish": first}
    assert told.results == {"late": {}}
    assert told.tied_with_best == {"late": ["nn"]}
    assert (told.status, told.closed) == ("finished", ended)
    assert len([event for event in told.events if event.kind == "lineage"]) == 1
