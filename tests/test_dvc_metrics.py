"""What DVC makes of the files of ``evaluate``: metrics show and diff, and specs of plots."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from headrace.commands.scaffold import pipeline_text
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import read_json, write_json
from tests.evaluation_case import LATE, Case

METRICS = "data/evaluate/metrics.json"
PLOTS = "data/evaluate/plots"


def git(root, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True)


def dvc(root, *arguments):
    """Run dvc without looking into settings of this user; return what it prints."""
    env = {**os.environ, "DVC_NO_ANALYTICS": "true", "DVC_GLOBAL_CONFIG_DIR": str(root / "none")}
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A committed folder with the outs of evaluate, and dvc.yaml's own entries for them."""
    root = tmp_path_factory.mktemp("project")
    table, members = Case(targets=(LATE,)).write(root / "work")
    told = {"resources": Resources(threads=1), "recorder": MemoryRecorder()}
    stack(table, members, root / "work/stack", StackParams(num_resamples=200), **told)
    params = EvaluateParams(num_resamples=200)
    evaluate(table, members, root / "work/stack", root / "data/evaluate", params, **told)
    whole = yaml.safe_load(
        pipeline_text(
            inputs=["a.csv"],
            metric_files=[],
            example=False,
            databases=False,
            models=["baseline"],
            embedding_catboost=False,
            source=False,
        )
    )
    (metrics,) = whole["stages"]["evaluate"]["metrics"]
    (root / "dvc.yaml").write_text(
        yaml.safe_dump({"plots": whole["plots"], "metrics": list(metrics)})
    )
    git(root, "init", "-q")
    dvc(root, "init", "-q")
    git(root, "add", "dvc.yaml", ".dvc", "data")
    git(root, "commit", "-qm", "one")
    return root


def test_metrics_show_lists_every_model_with_its_interval(project):
    """Nested names as columns: target, model, metric, value and bounds."""
    shown = json.loads(dvc(project, "metrics", "show", "--json"))[""]["data"][METRICS]["data"]
    written = read_json(project / METRICS)["late"]
    assert {
        model: {
            metric: {part: number for part, number in score.items() if number is not None}
            for metric, score in scores.items()
        }
        for model, scores in written.items()
    } == shown["late"]
    text = dvc(project, "metrics", "show", "--md")
    assert "late.sharp.roc_auc.value" in text
    assert "late.sharp.roc_auc.ci_low" in text


def test_metrics_diff_shows_what_moved_and_by_how_much(project):
    """Between the commit and the files: the changed number alone."""
    path = project / METRICS
    before = path.read_bytes()
    content = read_json(path)
    content["late"]["sharp"]["roc_auc"]["value"] += 0.125
    write_json(path, content)
    told = json.loads(dvc(project, "metrics", "diff", "--json"))[METRICS]
    path.write_bytes(before)
    assert list(told) == ["late.sharp.roc_auc.value"]
    assert told["late.sharp.roc_auc.value"]["diff"] == pytest.approx(0.125)
    assert json.loads(dvc(project, "metrics", "diff", "--json")) == {}


def test_every_plot_file_gives_a_spec_with_its_points(project):
    """Vega specs of x over y, one for each file, with data in them."""
    files = sorted(path.name for path in (project / PLOTS).glob("*.csv"))
    shown = json.loads(dvc(project, "plots", "show", "--json"))["data"]
    plots = {name.rpartition("/")[2]: specs for name, specs in shown.items()}
    assert sorted(plots) == files
    for name, (spec,) in plots.items():
        content = spec["content"]
        assert content["$schema"].startswith("https://vega.github.io/schema/vega-lite/"), name
        assert "<DVC_METRIC" not in json.dumps(content), name
        points = [(float(point["x"]), float(point["y"])) for point in content["data"]["values"]]
        lines = (project / PLOTS / name).read_text().splitlines()[1:]
        assert points == [tuple(map(float, line.split(","))) for line in lines], name
