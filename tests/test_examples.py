"""The small examples: init completes them, and they end in the figures their README names."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from headrace.commands.forecast import forecast
from headrace.commands.init import init
from headrace.commands.pipeline import environment
from headrace.commands.settings import read_settings
from headrace.params import Resources
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.stages.extract import extract

EXAMPLES = Path(__file__).parents[1] / "examples"
# DVC's own use of a library that has moved on.
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")


def _copy(name: str, folder: Path) -> Project:
    """Copy what the repository has of an example: not what a run of it left behind."""
    root = folder / name
    root.mkdir()
    for path in sorted((EXAMPLES / name).iterdir()):
        if path.is_file() and path.name not in ("dvc.yaml", "dvc.lock", "headrace.lock"):
            shutil.copy(path, root)
    return Project(root)


def _extract(project: Project) -> MemoryRecorder:
    recorder = MemoryRecorder()
    extract(
        project.root,
        project.data("extract"),
        read_settings(project).section("extract"),  # type: ignore[arg-type]
        scratch=project.scratch,
        resources=Resources(memory_budget=512 << 20),
        recorder=recorder,
    )
    return recorder


def _report(project: Project) -> dict[str, object]:
    report: dict[str, object] = json.loads((project.data("extract") / "extract.json").read_text())
    return report


@pytest.mark.parametrize("name", ["water", "adult"])
def test_init_completes_an_example_and_a_forecast_fits(name: str, tmp_path: Path):
    project = _copy(name, tmp_path)
    before = project.params.read_text()
    made = init(project.root)
    assert project.params.read_text() == before
    assert {"dvc.yaml", "headrace.lock", ".dvc/config", ".dvc/config.local"} <= set(made.written)
    assert ".gitignore" not in made.written
    told = forecast(project)
    told.require_fit()
    assert told.shape.num_rows == pytest.approx({"water": 3276, "adult": 48_842}[name], rel=0.02)


@pytest.mark.parametrize("name", ["water", "adult"])
def test_the_readme_names_the_data_by_digest_and_licence(name: str):
    """The files are those the licence note speaks of."""
    from hashlib import sha256

    readme = (EXAMPLES / name / "README.md").read_text()
    assert "creativecommons.org" in readme
    for path in (EXAMPLES / name).glob("*.csv*"):
        assert sha256(path.read_bytes()).hexdigest() in readme
        assert path.stat().st_size < 700_000


def test_water_has_all_its_rows_and_what_is_missing(tmp_path: Path):
    """Counts of the published table: 1998 and 1278 of the classes, 491, 781 and 162 missing."""
    project = _copy("water", tmp_path)
    _extract(project)
    report = _report(project)
    assert report["rows"] == {"recipe": 3276, "without_target": 0, "kept": 3276}
    classes = report["classes"]["Potability"]  # type: ignore[index]
    assert sum(split["0"] for split in classes.values()) == 1998
    assert sum(split["1"] for split in classes.values()) == 1278
    for split in ("train", "valid", "test"):
        share = classes[split]["1"] / sum(classes[split].values())
        assert share == pytest.approx(0.39, abs=0.005)


def test_adult_keeps_its_given_split_and_one_spelling_of_the_classes(tmp_path: Path):
    """The test file is the test split, whole; its classes have lost their full stop."""
    project = _copy("adult", tmp_path)
    recorder = _extract(project)
    report = _report(project)
    classes = report["classes"]["income"]  # type: ignore[index]
    assert classes["test"] == {"<=50K": 12_435, ">50K": 3846}
    learnt = {label: classes["train"][label] + classes["valid"][label] for label in classes["test"]}
    assert learnt == {"<=50K": 24_720, ">50K": 7841}
    assert classes["valid"][">50K"] / 7841 == pytest.approx(0.2, abs=0.02)
    profile = json.loads((project.data("extract") / "profile.json").read_text())
    assert profile["native_country"]["distinct"] == 41
    assert profile["workclass"]["nulls"] > 1000  # of `?`
    assert all(not top["value"].startswith(" ") for top in profile["education"]["top"])
    assert recorder.warnings == []


@pytest.mark.slow
def test_water_runs_to_its_end_with_honest_intervals(tmp_path: Path):
    """By DVC, as a person runs it: nothing beats the others by more than chance, all beat 0.5."""
    project = _copy("water", tmp_path)
    init(project.root)
    _repro(project)

    of_model = _metrics(project)["Potability"]
    for model in ("catboost", "nn", "stack"):
        auc = of_model[model]["roc_auc"]
        assert 0.60 < auc["value"] < 0.72
        assert 0.5 < auc["ci_low"] < auc["value"] < auc["ci_high"]
        assert 0.06 < auc["ci_high"] - auc["ci_low"] < 0.12
    assert of_model["baseline"]["roc_auc"]["value"] == 0.5
    assert (project.data("publish") / "package.json").is_file()

    again = _repro(project)
    assert again.count("didn't change, skipping") == 11
    assert {one.state for one in forecast(project).stages} == {"fresh"}


@pytest.mark.slow
def test_adult_comes_near_what_others_report(tmp_path: Path):
    """On adult.test: CatBoost 0.926, a plain network 0.905 (Gorishniy et al. 2021).

    Quickened to a tenth of the defaults' time; benchmarks/quality.py has their figures.
    """
    project = _copy("adult", tmp_path)
    quick = {"members": 2, "bins": 48, "batch_rows": 1024, "max_epochs": 6, "weight_average": 0.95}
    _quicken(project, nn=quick, catboost={"iterations": 300, "max_ctr_complexity": 1})
    init(project.root)
    _repro(project)
    of_model = _metrics(project)["income"]
    assert of_model["catboost"]["roc_auc"]["value"] == pytest.approx(0.926, abs=0.004)
    assert of_model["catboost"]["accuracy"]["value"] == pytest.approx(0.872, abs=0.006)
    assert of_model["nn"]["roc_auc"]["value"] > 0.91
    assert of_model["stack"]["roc_auc"]["value"] > 0.924


def _shared(name: str) -> Path:
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("HEADRACE_SHARED_DATA", default)) / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; HEADRACE_SHARED_DATA names where {name} is")
    return folder


@pytest.mark.slow
@pytest.mark.real
def test_movielens_beats_the_mean(tmp_path: Path):
    """The factorization is as good as its README says; all beat the mean beyond their intervals.

    Others report .944 for biases alone and .934 for SVD, over folds of their own (Surprise).
    """
    project = _copy("movielens", tmp_path)
    (project.root / "ml-100k").symlink_to(_shared("movielens_100k"))
    quick = {"bag": "none", "iterations": 200, "max_ctr_complexity": 1}
    _quicken(project, factorization={"bag": "none"}, catboost=quick)
    init(project.root)
    _repro(project)
    of_model = _metrics(project)["rating"]
    assert of_model["baseline"]["rmse"]["value"] == pytest.approx(1.154, abs=0.005)
    assert of_model["factorization"]["rmse"]["value"] <= 0.945
    for model in ("factorization", "catboost", "stack"):
        assert of_model[model]["rmse"]["ci_high"] < of_model["baseline"]["rmse"]["ci_low"]


@pytest.mark.slow
@pytest.mark.real
def test_car_sharing_learns_both_targets(tmp_path: Path):
    """Both beat the mean and the majority, beyond their intervals."""
    project = _copy("car_sharing", tmp_path)
    (project.root / "raw").symlink_to(_shared("car_sharing"))
    quick = {"max_epochs": 30, "members": 2, "learning_rate": 0.004}
    _quicken(project, nn=quick, catboost={"iterations": 200})
    init(project.root)
    _repro(project)
    metrics = _metrics(project)
    for target, metric in (("target_reg", "rmse"), ("target_class", "log_loss")):
        of_model = metrics[target]
        best = min(of_model[model][metric]["ci_high"] for model in ("catboost", "nn", "stack"))
        assert best < of_model["baseline"][metric]["ci_low"]


def _quicken(project: Project, **changes: dict[str, object]) -> None:
    """Give sections of ``train`` in params.yaml smaller settings."""
    content = yaml.safe_load(project.params.read_text())
    for model, settings in changes.items():
        content["train"][model] |= settings
    project.params.write_text(yaml.safe_dump(content, sort_keys=False))


def _repro(project: Project) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dvc", "repro"],
        cwd=project.root,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _metrics(project: Project) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    metrics: dict[str, dict[str, dict[str, dict[str, float]]]] = json.loads(
        (project.data("evaluate") / "metrics.json").read_text()
    )
    return metrics
