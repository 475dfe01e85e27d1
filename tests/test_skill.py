"""The out-of-bag estimate: all that learns is inside the loop, and what was done is kept."""

import io
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from headrace.commands import skill as command
from headrace.commands.settings import read_settings
from headrace.commands.skill import SUMMARY, count_workers, open_job, run_refit, skill
from headrace.data.encoder import open_encoder
from headrace.data.resample import draw_units, write_resample
from headrace.data.table import open_table
from headrace.errors import ConfigError, DataError, Stopped
from headrace.evaluation.metrics import METRICS
from headrace.evaluation.skill import skill_of
from headrace.models import baseline, protocol
from headrace.models.protocol import Kind
from headrace.params import Resources
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.schema import Target
from headrace.stages.encode import EncodeParams, encode
from headrace.storage import read_json
from headrace.tracking.history import list_runs, read_run, run_path
from tests.encode_tables import write_table
from tests.selected_kind import choose_inputs
from tests.train_case import DELAY, LATE, QUICK, encode_only, make_case

PARAMS = """\
version: 1
resources: {{threads: {threads}}}
models: [{model}]
extract: {{sources: {{a: a.csv}}, targets: [delay]}}
train:
  {model}: {section}
"""
Y = Target(name="y", task="binary", labels=("0", "1"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("skill")
    make_case(root / "data", num_train=300, targets=(DELAY, LATE))
    shutil.rmtree(root / "data" / "encode")  # no refit may look at what all rows taught
    return root


def project_of(root: Path, data: Path, model: str, section: str, *, threads: int = 1) -> Project:
    root.mkdir(exist_ok=True)
    (root / "data").symlink_to(data)
    text = PARAMS.format(model=model, section=section, threads=threads)
    (root / "params.yaml").write_text(text)
    return Project(root)


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return project_of(tmp_path, made / "data", "baseline", "{kind: linear}")


def estimate(project: Project, model: str = "baseline", **options) -> tuple[dict, str]:
    """Estimate, and return the summary and what was printed."""
    asked = {"refits": 3, "budget_s": None, "seed": 0} | options
    console = Console(file=io.StringIO(), width=200)
    skill(project, model, **asked, wait=False, console=console)
    job, _ = open_job(project, model, seed=asked["seed"], resources=Resources())
    return read_json(job.folder / SUMMARY), console.file.getvalue()


def without_seconds(summary: dict) -> dict:
    refits = [{**one, "seconds": 0} for one in summary["refits"]]
    return summary | {"refits": refits}


def test_as_many_units_are_drawn_as_there_are():
    counts = draw_units(10_000, seed=3, number=5)
    assert counts.sum() == 10_000
    assert abs((counts == 0).mean() - np.exp(-1)) < 0.015
    assert not np.array_equal(counts, draw_units(10_000, seed=3, number=6))


def test_a_resample_holds_each_row_once_and_weighs_it(made: Path, tmp_path: Path):
    """Rows drawn are train rows under their own id and fold; the others are the test rows."""
    source = open_table(made / "data" / "reduce")
    rows = source.read("train", ["row_id", "fold", "distance"])
    counts = draw_units(rows.num_rows, seed=0, number=0)
    table = write_resample(source, counts, tmp_path / "table", with_valid=True)

    assert table.contract.weight == "bootstrap_weight"
    learnt = table.read("train", ["row_id", "fold", "distance", "bootstrap_weight"])
    assert learnt.drop_columns("bootstrap_weight").equals(rows.filter(pa.array(counts > 0)))
    assert learnt["bootstrap_weight"].to_pylist() == counts[counts > 0].tolist()
    judged = table.read("test", ["row_id", "fold", "bootstrap_weight"])
    assert judged["row_id"].to_pylist() == rows["row_id"].to_numpy()[counts == 0].tolist()
    assert judged["fold"].null_count == judged.num_rows
    assert set(judged["bootstrap_weight"].to_pylist()) == {1.0}
    assert table.num_rows("valid") == source.num_rows("valid")


def test_weights_of_its_own_are_multiplied(tmp_path: Path):
    make_case(tmp_path, num_train=100, targets=(DELAY,), weight=True)
    source = open_table(tmp_path / "reduce")
    own = source.read("train", ["importance"])["importance"].to_numpy()
    counts = draw_units(100, seed=0, number=0)
    table = write_resample(source, counts, tmp_path / "table", with_valid=False)

    found = {s: table.read(s, ["importance"])["importance"].to_numpy() for s in ("train", "test")}
    assert np.array_equal(found["train"], (own * counts)[counts > 0])
    assert np.array_equal(found["test"], own[counts == 0])
    assert table.contract.weight == "importance"
    assert table.num_rows("valid") == 0


def test_the_encoder_learns_from_the_sample_alone(tmp_path: Path):
    """Mean, spread and labels are those of the rows drawn; a label only out of bag is unknown."""
    make_case(tmp_path, num_train=200, targets=(DELAY,))
    source = open_table(tmp_path / "reduce")
    rows = source.read("train", ["distance", "gate"])
    gates = rows["gate"].to_numpy(zero_copy_only=False)
    counts = draw_units(200, seed=0, number=0)
    counts[gates == 3] = 0
    table = write_resample(source, counts, tmp_path / "table", with_valid=False)
    encode(
        table.folder,
        tmp_path / "encoded",
        EncodeParams(),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    encoder = open_encoder(tmp_path / "encoded")

    distance = rows["distance"].to_numpy()
    scale = next(one for one in encoder.scales if one.name == "distance")
    assert scale.mean == pytest.approx(distance[counts > 0].mean())
    assert scale.mean != pytest.approx(distance.mean(), rel=1e-6)
    gate = next(one for one in encoder.categories if one.name == "gate")
    assert "3" not in gate.labels
    assert (
        "3"
        in next(c for c in open_encoder(tmp_path / "encode").categories if c.name == "gate").labels
    )


def noise(num_rows: int, num_inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_rows, num_inputs)), rng.integers(0, 2, num_rows)


def write_noise(folder: Path, x: np.ndarray, y: np.ndarray) -> None:
    columns = {f"x{i}": pa.array(x[:, i]) for i in range(x.shape[1])}
    columns["y"] = pa.array([str(one) for one in y])
    roles = dict.fromkeys(columns, "numeric") | {"y": "target"}
    splits = {"train": columns, "valid": {n: c.slice(0, 9) for n, c in columns.items()}}
    write_table(folder / "reduce", splits, roles=roles, targets=(Y,))
    encode_only(folder)


def test_preparing_outside_the_loop_is_optimistic_and_inside_is_not(tmp_path: Path, monkeypatch):
    """The labels are noise, so no recipe is better than AUC .5.

    The recipe keeps the 10 of 300 inputs that go best with the labels. Chosen once on all rows they
    have seen those that judge, and look good; chosen by each refit on its own rows they do not.
    Source of the example: Hastie, Tibshirani, Friedman 2009, section 7.10.2.
    """
    monkeypatch.setitem(protocol.KINDS, "selected", Kind("tests.selected_kind", "SelectedParams"))
    x, y = noise(100, 300, seed=1)
    write_noise(tmp_path / "all", x, y)
    chosen = choose_inputs(x, y.astype(float), np.ones(len(y)), 10) != 0
    write_noise(tmp_path / "chosen", x[:, chosen], y)

    found = {}
    for name in ("all", "chosen"):
        project = project_of(tmp_path / f"of-{name}", tmp_path / name, "selected", "{}")
        monkeypatch.chdir(project.root)
        summary, _ = estimate(project, "selected", refits=12)
        found[name] = summary["targets"]["y"]["roc_auc"]

    inside, outside = found["all"], found["chosen"]
    assert inside["ci_low"] < 0.5 < inside["ci_high"]
    assert abs(inside["mean"] - 0.5) < 0.07
    assert outside["ci_low"] > 0.6
    assert outside["mean"] > 0.75


def test_mean_spread_and_interval_are_those_of_the_refits():
    metric = METRICS["binary"][0]
    values = [0.1, 0.2, 0.4, None]
    found = skill_of(metric, values, confidence=0.5)
    assert found.mean == pytest.approx(0.7 / 3)
    assert found.deviation == pytest.approx(np.std(values[:3], ddof=1))
    assert (found.low, found.high) == (pytest.approx(0.15), pytest.approx(0.3))
    assert (found.num_refits, found.num_undefined) == (3, 1)
    assert skill_of(metric, [0.3], confidence=0.9).low is None
    assert skill_of(metric, [None], confidence=0.9).mean is None


def test_the_estimate_is_near_the_score_of_fresh_rows(project: Project):
    """A linear model of a linear world: out of bag it errs as much as its noise, and a bit more."""
    found, printed = estimate(project, refits=6)
    r2 = found["targets"]["delay"]["r2"]

    assert 0.75 < r2["ci_low"] <= r2["mean"] <= r2["ci_high"] < 0.98
    assert found["num_refits"] == 6
    assert found["num_failed"] == 0
    assert all(one["num_learnt"] + one["num_judged"] == 300 for one in found["refits"])
    assert np.mean([one["num_learnt"] for one in found["refits"]]) == pytest.approx(190, abs=8)
    assert "little more than their range" in printed
    assert "6 of 6 refits of baseline" in printed


def test_the_journal_has_the_estimate(project: Project):
    found, _ = estimate(project)
    (run_id,) = list_runs(project.journal)
    run = read_run(run_path(project.journal, run_id))
    (stage,) = run.stages

    assert (run.kind, run.status, stage.stage) == ("skill", "finished", "skill@baseline")
    told = stage.last_metrics
    assert told["delay/out_of_bag_rmse"] == found["targets"]["delay"]["rmse"]["mean"]
    assert told["late/out_of_bag_roc_auc_ci_low"] == found["targets"]["late"]["roc_auc"]["ci_low"]
    assert "delay/out_of_bag_rmse_deviation" in told


def test_more_refits_go_on_with_those_that_are_there(project: Project, monkeypatch):
    whole, _ = estimate(project, refits=4, seed=7)
    first = [one for one in whole["refits"] if one["number"] < 2]
    job, _ = open_job(project, "baseline", seed=7, resources=Resources())
    for number in (2, 3):
        (job.folder / f"refit-000{number}.json").unlink()
    again, printed = estimate(project, refits=4, seed=7)

    assert "going on with 2 refits" in printed
    assert again["refits"][:2] == first
    assert without_seconds(again) == without_seconds(whole)


def test_a_stopped_refit_goes_on_to_the_same_result(project: Project, monkeypatch):
    whole, _ = estimate(project, refits=2)
    project.state.rename(project.root / "whole")
    fit, calls = baseline.fit, []

    def stops(views, params, **options):
        calls.append(params)
        if len(calls) == 9:  # six fits a refit: a bag of five folds and the whole
            os.kill(os.getpid(), signal.SIGTERM)
        return fit(views, params, **options)

    monkeypatch.setattr(baseline, "fit", stops)
    with pytest.raises(Stopped, match="skill of baseline was stopped; run again to resume"):
        estimate(project, refits=2)
    (run_id,) = list_runs(project.journal)
    run = read_run(run_path(project.journal, run_id))
    assert (run.status, run.stages[0].status) == ("interrupted", "stopped")

    resumed, _ = estimate(project, refits=2)
    assert len(calls) == 9 + 12 - 8  # what was whole is kept, fits of the second refit too
    assert without_seconds(resumed) == without_seconds(whole)


def test_a_spent_budget_says_how_many_were_done(project: Project, monkeypatch):
    run = command.run_refit

    def slow(job, number, **options):
        time.sleep(0.3)
        return run(job, number, **options)

    monkeypatch.setattr(command, "run_refit", slow)
    found, printed = estimate(project, refits=50, budget_s=0.5)
    assert 1 <= found["num_refits"] < 10
    assert found["num_asked"] == 50
    assert f"the time is up, with {found['num_refits']} of 50 refits" in printed


def test_a_refit_that_fails_is_told_and_ends_nothing(project: Project, monkeypatch):
    fit, calls = baseline.fit, []

    def fails_once(views, params, **options):
        calls.append(params)
        if len(calls) == 2:
            raise RuntimeError("not this one")
        return fit(views, params, **options)

    monkeypatch.setattr(baseline, "fit", fails_once)
    found, printed = estimate(project, refits=3)
    assert (found["num_refits"], found["num_failed"]) == (2, 1)
    assert re.search(r"1 refits failed, first 0: .*not this one", printed)


def test_an_estimate_whose_refits_all_fail_says_why(project: Project, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(baseline, "fit", fails)
    with pytest.raises(DataError, match=r"skill of baseline: all 2 refits failed; .*broken"):
        estimate(project, refits=2)


def test_refits_side_by_side_are_those_one_after_another(made: Path, tmp_path: Path, monkeypatch):
    found = []
    for threads in (1, 2):
        root = tmp_path / f"threads-{threads}"
        project = project_of(root, made / "data", "baseline", "{kind: linear}", threads=threads)
        monkeypatch.chdir(root)
        resources = read_settings(project).resources
        job, _ = open_job(project, "baseline", seed=0, resources=resources)
        assert count_workers(job) == threads
        found.append(without_seconds(estimate(project, refits=3)[0]))
    assert found[0] == found[1]


def test_workers_are_as_many_as_threads_and_memory_allow(project: Project):
    job, _ = open_job(
        project, "baseline", seed=0, resources=Resources(threads=8, memory_budget="3GiB")
    )
    assert count_workers(job) == 4
    small = Resources(threads=8, memory_budget="100MiB")
    assert count_workers(open_job(project, "baseline", seed=0, resources=small)[0]) == 1


@pytest.mark.parametrize("model", ["catboost", "nn"])
def test_other_kinds_are_refitted_too(made: Path, tmp_path: Path, monkeypatch, model: str):
    quick = {"hidden_sizes": [16], "max_epochs": 5, "batch_rows": 64, "learning_rate": 0.02}
    settings = {**(quick if model == "nn" else QUICK[model]), "bag": "none", "device": "cpu"}
    section = str(settings).replace("'", "")
    project = project_of(tmp_path / "p", made / "data", model, section)
    monkeypatch.chdir(project.root)
    job, _ = open_job(project, model, seed=0, resources=Resources())
    found = run_refit(job, 0)
    assert found.error == ""
    assert found.metrics["late"]["roc_auc"] > 0.7


@pytest.mark.slow
def test_a_second_level_model_is_refitted_with_its_networks(
    made: Path, tmp_path: Path, monkeypatch
):
    """The networks that feed it are fitted on the sample too: data/train/nn is not there."""
    section = str({**QUICK["nn"], "device": "cpu"}).replace("'", "")
    project = project_of(tmp_path / "p", made / "data", "nn", section)
    with project.params.open("a") as file:
        file.write("embedding_catboost: {iterations: 20, depth: 3, device: cpu}\n")
    monkeypatch.chdir(project.root)
    job, _ = open_job(project, "embedding_catboost", seed=0, resources=Resources())
    found = run_refit(job, 0)
    assert found.error == ""
    assert found.metrics["late"]["roc_auc"] > 0.7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refits": 1}, "--refits is 1; a spread needs at least 2"),
        ({"model": "basline"}, "nearest name: baseline"),
    ],
)
def test_wrong_questions_are_refused(project: Project, options, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        estimate(project, **options)


def test_one_unit_is_too_few(tmp_path: Path, monkeypatch):
    """Rows of one day leave no day out of a sample."""
    from tests.evaluation_case import Case

    case = Case(num_days=1, noise={})
    case.write_table(tmp_path / "data" / "reduce")
    (tmp_path / "params.yaml").write_text(PARAMS.format(model="baseline", section="{}", threads=1))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"the train rows have 1 day; at least 2 are needed"):
        open_job(Project(tmp_path), "baseline", seed=0, resources=Resources())
