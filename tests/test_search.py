"""Searching settings: the space is checked first, trials resume, ties and luck are told."""

import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from headrace.commands.budget import Budget, parse_duration
from headrace.commands.refit import refit, warn_of_stale
from headrace.commands.search import FRAGMENT, SUMMARY, open_search, search
from headrace.commands.space import Range, Space, read_space, with_point
from headrace.commands.stage import Guard, run_stage
from headrace.commands.trials import Trial, propose
from headrace.errors import ConfigError, DataError, ResourceError, Stopped
from headrace.evaluation.bootstrap import Resampling, Scored, Units
from headrace.evaluation.metrics import metric_of
from headrace.evaluation.tuning import rank_trials
from headrace.models import baseline
from headrace.models.baseline import BaselineParams
from headrace.models.nn import NnParams
from headrace.params import read_yaml
from headrace.project import Project
from headrace.storage import read_json
from headrace.tracking.history import list_runs, read_run, run_path
from tests.train_case import DELAY, LATE, make_case

PATH = Path("params.yaml")
PARAMS = """\
version: 1
models: [baseline, nn]
extract: {sources: {a: a.csv}, targets: [delay]}
train:
  baseline: {kind: linear}
  nn: {bag: none, hidden_sizes: [8], max_epochs: 3, batch_rows: 64, device: cpu}
search:
  baseline:
    penalty: {low: 1.0e-6, high: 1.0, log: true}
    kind: [linear, prior]
  nn:
    learning_rate: [0.01, 0.003]
stack: {num_resamples: 200}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    make_case(root / "data", num_train=300, targets=(DELAY, LATE))
    return root


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose stages up to ``encode`` have run, with a state of its own."""
    (tmp_path / "data").symlink_to(made / "data")
    (tmp_path / "params.yaml").write_text(PARAMS)
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def edit(project: Project, old: str, new: str) -> None:
    text = project.params.read_text()
    assert old in text
    project.params.write_text(text.replace(old, new))


def look(project: Project, model: str = "baseline", **options) -> tuple[dict, str]:
    """Search, and return the summary and what was printed."""
    asked = {"method": "tpe", "trials": 4, "budget_s": None, "target": None, "seed": 0}
    asked |= options
    console = Console(file=io.StringIO(), width=200)
    search(project, model, **asked, wait=False, console=console)
    chosen = {name: asked[name] for name in ("method", "target", "seed")}
    folder = open_search(project, model, **chosen).folder
    return read_json(folder / SUMMARY), console.file.getvalue()


def space_of(raw, kind=NnParams, base=None) -> Space:
    return read_space(raw, "nn", kind, base or {}, PATH)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"droput": [0.1]}, "`search.nn.droput` is not a known parameter; nearest name: dropout"),
        ({"plateau.patienc": [1]}, "`search.nn.plateau.patienc` is not a known parameter; nearest"),
        ({"dropout": [0.1, 1.5]}, "`search.nn.dropout` is 1.5: input should be less than 1"),
        (
            {"dropout": {"low": 0.0, "high": 2.0}},
            "`search.nn.dropout` is 2.0: input should be less",
        ),
        ({"optimiser": ["adam", "adamz"]}, "`search.nn.optimiser` is 'adamz'"),
        (
            {"max_epochs": {"low": 1.5, "high": 3.5}},
            "`search.nn.max_epochs` is 1.5: input should be",
        ),
        (
            {"bag": ["folds", "none"]},
            "`search.nn.bag` cannot be searched: it decides on which rows",
        ),
        ({"seed": [1, 2]}, "`search.nn.seed` cannot be searched: the best of many seeds is luck"),
        ({"dropout": []}, "`search.nn.dropout` is []; give a list of choices"),
        ({"dropout": 0.1}, "`search.nn.dropout` is 0.1; give a list of choices"),
        ({"dropout": [0.1, 0.1]}, "`search.nn.dropout` names 0.1 twice"),
        ({"dropout": {"low": 0.3, "high": 0.1}}, "low is 0.3 and high is 0.1; low must be the"),
        ({"dropout": {"low": 0.0, "high": 0.1, "log": True}}, "a log range starts above 0"),
        ({"dropout": {"low": 0.0, "high": 0.2, "step": 0.5}}, "step is 0.5; it must be above 0"),
        ({"dropout": {"low": 0.1, "high": 0.2, "type": "int"}}, "type is int, but low, high"),
        ({"dropout": {"low": 0.1, "hgh": 0.2}}, "`search.nn.dropout.hgh` is not a known"),
        (None, "section `search.nn` says nothing to search"),
    ],
)
def test_a_space_that_the_model_does_not_have_is_refused(raw, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        space_of(raw)


def test_all_faults_of_a_space_are_told_at_once():
    with pytest.raises(ConfigError, match=r"dropout` is 2.*max_epochs` is 0"):
        space_of({"dropout": [2], "max_epochs": [0, 1]})


def test_what_only_goes_beside_other_settings_is_no_fault_of_the_space():
    """Momentum is for sgd: with adamw, the default, it fails a trial and not the search."""
    space = space_of({"momentum": [0.5, 0.9], "optimiser": ["adamw", "sgd"]})
    assert space.num_points == 4


def test_a_grid_steps_through_every_point_once():
    space = space_of(
        {
            "optimiser": ["adam", "sgd"],
            "max_epochs": {"low": 1, "high": 7, "step": 3},
            "dropout": {"low": 0.0, "high": 0.25, "step": 0.1},
        }
    )
    points = [space.point(number) for number in range(space.require_grid())]

    assert len(points) == 2 * 3 * 3
    assert len({str(point) for point in points}) == 18
    assert {point["max_epochs"] for point in points} == {1, 4, 7}
    assert {point["dropout"] for point in points} == {0.0, 0.1, 0.2}


def test_a_grid_of_a_continuous_range_is_refused():
    space = space_of({"learning_rate": {"low": 1.0e-4, "high": 0.1, "log": True}, "members": [1]})
    with pytest.raises(ConfigError, match=r"`search.nn.learning_rate` is a continuous range"):
        space.require_grid()


def test_log_ranges_are_drawn_by_their_logarithm():
    one = Range(low=1.0e-4, high=1.0, log=True)
    rng = np.random.default_rng(0)
    drawn = np.array([one.draw(rng) for _ in range(2000)])

    assert abs((drawn < 1.0e-2).mean() - 0.5) < 0.04  # linear: 1 %
    assert drawn.min() >= 1.0e-4
    assert drawn.max() <= 1.0


def test_paths_reach_into_sections():
    base = {"plateau": {"factor": 0.5}, "dropout": 0.1}
    assert with_point(base, {"plateau.patience": 3}) == {
        "plateau": {"factor": 0.5, "patience": 3},
        "dropout": 0.1,
    }
    assert base == {"plateau": {"factor": 0.5}, "dropout": 0.1}


SPACE = Space("nn", {"a": Range(low=0.0, high=1.0), "b": ("x", [1, 2]), "c": Range(low=1, high=3)})


def loss(point) -> float:
    return abs(point["a"] - 0.3) + (point["b"] == "x") + point["c"] / 3


def run_out(method: str, count: int, ended=()) -> list[Trial]:
    trials = list(ended)
    for number in range(len(trials) + 1, count + 1):
        point = propose(SPACE, method, number, trials, seed=5, is_higher_better=False)
        trials.append(Trial(number, point, "finished", 1.0, loss(point)))
    return trials


@pytest.mark.parametrize("method", ["random", "tpe"])
def test_what_a_trial_tries_does_not_depend_on_stops(method: str):
    """A sampler that is seeded once would begin again with the same points."""
    whole = run_out(method, 14)
    resumed = run_out(method, 14, ended=whole[:6])

    assert [one.point for one in resumed] == [one.point for one in whole]
    assert len({str(one.point) for one in whole}) == 14


def test_tpe_learns_where_random_does_not():
    found = {
        method: np.mean([loss(t.point) for t in run_out(method, 60)[30:]])
        for method in ("random", "tpe")
    }
    assert found["tpe"] < 0.8 * found["random"]


def test_tpe_maximises_where_higher_is_better():
    trials = []
    for number in range(1, 31):
        point = propose(SPACE, "tpe", number, trials, seed=5, is_higher_better=True)
        trials.append(Trial(number, point, "finished", 1.0, -loss(point)))
    assert np.mean([loss(t.point) for t in trials[20:]]) < 0.9


@pytest.mark.parametrize("method", ["grid", "random", "tpe"])
def test_a_small_space_is_used_up_once(method: str):
    space = Space("nn", {"b": ("x", "y"), "c": Range(low=1, high=3)})
    trials: list[Trial] = []
    while (
        point := propose(space, method, len(trials) + 1, trials, seed=0, is_higher_better=True)
    ) is not None:
        trials.append(Trial(len(trials) + 1, point, "finished", 1.0, 0.5))

    assert len(trials) == 6
    assert len({str(one.point) for one in trials}) == 6


def test_a_trial_outside_the_space_or_failed_teaches_nothing():
    known = [
        Trial(0, {"a": 7.0, "b": None, "c": 9}, "finished", 1.0, 0.1),
        Trial(1, {"a": 0.5, "b": "x", "c": 1}, "failed", 1.0),
    ]
    with_both = propose(SPACE, "tpe", 2, known, seed=0, is_higher_better=False)
    assert with_both == propose(SPACE, "tpe", 2, [], seed=0, is_higher_better=False)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("2h5s", 7205)]
)
def test_a_duration_is_read(text: str, seconds: int):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "0m", "m", "5m2h", "-1s"])
def test_what_is_no_duration_is_refused(text: str):
    with pytest.raises(ConfigError, match="write 90s, 30m or 1h30m"):
        parse_duration(text)


def test_a_budget_begins_nothing_that_will_not_end_in_time():
    assert Budget(10).has_time([])
    assert not Budget(-1).has_time([])
    assert Budget(10).has_time([1, 9, 8])
    assert not Budget(10).has_time([11, 12, 1])
    assert Budget(None).has_time([1e9])


def standings(values, noise, *, name="rmse", seed=0):
    """Rank trials whose resamples spread by ``noise`` around their values, each on its own."""
    rng = np.random.default_rng(seed)
    scored = {
        number: Scored({name: value}, {name: value + noise * rng.normal(0, 1, 4000)})
        for number, value in enumerate(values)
    }
    units = Units("row", np.arange(50), 50)
    task = "regression" if name == "rmse" else "binary"
    return rank_trials(scored, metric_of(task, name), units, Resampling(4000, 0.95, 0))


def test_trials_within_the_noise_of_their_difference_are_tied():
    found = standings([1.0, 1.1, 2.0], 0.1)  # a difference spreads by 0.14
    assert [one.number for one in found.of] == [0, 1, 2]
    assert [one.is_tied for one in found.of] == [True, True, False]
    assert [one.number for one in standings([0.6, 0.9, 0.7], 0.01, name="roc_auc").of] == [1, 2, 0]


def test_optimism_is_the_luck_of_the_best():
    """The best of k independent equal trials lies E[max of k normals] deviations too high."""
    assert standings([1.0] * 10, 0.1).optimism == pytest.approx(0.1 * 1.5388, rel=0.03)
    assert standings([0.7] * 3, 0.1, name="roc_auc").optimism == pytest.approx(0.0846, rel=0.05)
    assert standings([1.0], 0.1).optimism < 0.01
    assert standings([1.0, 9.0], 0.1).optimism < 0.01  # no choice to be lucky with


def test_a_search_finds_ranks_and_writes_the_best_settings(project: Project):
    before = project.params.read_text()
    found, printed = look(project, trials=7)
    trials = {one["number"]: one for one in found["trials"]}

    assert found["rows"] == "out-of-fold train rows"
    assert (found["metric"], found["num_trials"], found["num_failed"]) == ("rmse", 7, 0)
    assert trials[0]["params"] == {"penalty": 1.0e-4, "kind": "linear"}  # params.yaml as it is
    priors = [one for one in trials.values() if one["params"]["kind"] == "prior"]
    assert priors
    assert not any(one["tied"] for one in priors)
    best = trials[found["best"]]
    assert best["params"]["kind"] == "linear"
    assert best["value"] == min(one["value"] for one in trials.values())
    assert best["ci_low"] < best["value"] < best["ci_high"]
    assert "the best score of 7 trials is optimistic" in printed
    assert "test rows were not read" in printed
    assert project.params.read_text() == before

    folder = open_search(project, "baseline", method="tpe", target=None, seed=0).folder
    fragment = read_yaml(folder / FRAGMENT)
    assert fragment == {"train": {"baseline": best["params"]}}
    BaselineParams.model_validate(fragment["train"]["baseline"])


def test_scores_are_those_of_the_stage(project: Project, tmp_path: Path):
    """The first trial is the model as ``train@baseline`` would fit it: same out-of-fold values."""
    from headrace.data.predictions import read_predictions
    from headrace.params import Resources
    from headrace.record import MemoryRecorder
    from headrace.stages.train import train

    found = open_search(project, "baseline", method="tpe", target=None, seed=0)
    options = {"resources": Resources(), "recorder": MemoryRecorder()}
    held_out = refit(
        found.inputs,
        "baseline",
        found.section,
        found.plans,
        tmp_path / "scratch",
        split="train",
        **options,
    )
    train(
        found.inputs.table,
        found.inputs.encoded,
        tmp_path / "out",
        found.section,
        model="baseline",
        cache=found.inputs.cache,
        checkpoints=tmp_path / "checkpoints",
        **options,
    )
    of_stage = read_predictions(tmp_path / "out", LATE).of_split("train")

    order = np.argsort(held_out["late"].row_id)
    assert np.array_equal(held_out["late"].row_id[order], of_stage.row_id)
    assert np.array_equal(held_out["late"].values[order], of_stage.values)


def test_the_journal_has_one_run_with_a_stage_per_trial(project: Project):
    look(project, trials=2)
    look(project, trials=4)  # goes on in the same run
    (run_id,) = list_runs(project.journal)
    run = read_run(run_path(project.journal, run_id))

    assert (run.kind, run.status) == ("search", "finished")
    assert [stage.stage for stage in run.stages] == [f"trial-000{n}" for n in range(4)]
    assert {stage.status for stage in run.stages} == {"finished"}
    assert run.stages[0].params == {"penalty": 1.0e-4, "kind": "linear"}
    assert set(run.stages[0].last_metrics) == {
        f"delay/out_of_fold_rmse{end}" for end in ("", "_ci_low", "_ci_high")
    }
    assert not any(
        event.data["context"] == "test" for one in run.stages for event in one.of_kind("dataset")
    )


def test_a_trial_that_fails_is_told_and_ends_nothing(project: Project, monkeypatch):
    fit = baseline.fit

    def fails_for_priors(views, params, **options):
        if params.kind == "prior":
            raise RuntimeError("no priors today")
        return fit(views, params, **options)

    monkeypatch.setattr(baseline, "fit", fails_for_priors)
    found, printed = look(project, trials=6)
    failed = [one for one in found["trials"] if one["state"] == "failed"]

    assert found["num_failed"] == len(failed) >= 1
    assert all("no priors today" in one["error"] for one in failed)
    assert f"{len(failed)} of 6 trials failed" in printed
    (run_id,) = list_runs(project.journal)
    stages = read_run(run_path(project.journal, run_id)).stages
    assert sorted(stage.status for stage in stages) == sorted(
        ["failed"] * len(failed) + ["finished"] * (6 - len(failed))
    )
    assert look(project, trials=6)[0] == found  # nothing is tried again


def test_a_search_whose_trials_all_fail_says_why(project: Project, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(baseline, "fit", fails)
    with pytest.raises(DataError, match=r"all 2 trials failed; the first: .*broken.*; mend that"):
        look(project, trials=2)
    with pytest.raises(DataError, match=r"all 10 trials failed"):
        look(project, trials=None, budget_s=600.0)


def test_a_trial_that_takes_too_much_memory_is_not_tried_again(project: Project, monkeypatch):
    """It ends the search, as it would end a stage, and the next call goes on after it."""
    fit, calls = baseline.fit, []

    def grows(views, params, **options):
        calls.append(params)
        if len(calls) == 6:  # five fits a trial
            monkeypatch.setattr(Guard, "is_stopping", True)
            raise ResourceError("the run held too much")
        return fit(views, params, **options)

    monkeypatch.setattr(baseline, "fit", grows)
    with pytest.raises(ResourceError, match="the run held too much"):
        look(project, trials=3)
    monkeypatch.setattr(Guard, "is_stopping", False)
    found, printed = look(project, trials=3)
    assert [one["state"] for one in found["trials"]] == ["finished", "failed", "finished"]
    assert "going on with 2 trials" in printed


def test_a_stopped_search_goes_on_to_the_same_result(project: Project, monkeypatch):
    whole, _ = look(project, trials=5, seed=3)
    for path in (project.state, project.journal):
        assert path.is_dir()
    project.state.rename(project.root / "whole")

    fit, calls = baseline.fit, []

    def stops_in_third_trial(views, params, **options):
        calls.append(params)
        if len(calls) == 13:  # five fits a trial
            os.kill(os.getpid(), signal.SIGTERM)
        return fit(views, params, **options)

    with monkeypatch.context() as patch:
        patch.setattr(baseline, "fit", stops_in_third_trial)
        with pytest.raises(Stopped, match="search of baseline was stopped; run again to resume"):
            look(project, trials=5, seed=3)
    (run_id,) = list_runs(project.journal)
    run = read_run(run_path(project.journal, run_id))
    assert run.status == "interrupted"
    assert run.stages[-1].status == "stopped"

    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(
            baseline,
            "fit",
            lambda views, params, **options: calls.append(params) or fit(views, params, **options),
        )
        resumed, printed = look(project, trials=5, seed=3)
    assert "going on with 2 trials, 1 unfinished" in printed
    assert len(calls) == 3 * 5 - 2  # two fits of the interrupted trial were kept
    assert read_run(run_path(project.journal, run_id)).status == "finished"
    for one in (*whole["trials"], *resumed["trials"]):
        one.pop("seconds")
    assert resumed["trials"] == whole["trials"]
    assert resumed["best"] == whole["best"]


def test_a_trial_without_out_of_fold_rows_is_scored_on_valid_rows(project: Project):
    found, _ = look(project, "nn", method="grid", trials=9, target="late")

    assert found["rows"] == "valid rows"
    assert (found["metric"], found["target"], found["num_trials"]) == ("roc_auc", "late", 3)
    points = [one["params"]["learning_rate"] for one in found["trials"]]
    assert points[0] == NnParams().learning_rate
    assert sorted(points[1:]) == [0.003, 0.01]


def test_a_model_that_has_seen_valid_labels_is_not_scored_on_them(project: Project):
    edit(project, "bag: none,", "bag: none, stop_rows: valid,")
    with pytest.raises(ConfigError, match=r"`train.nn.stop_rows` is valid, so that trials would"):
        look(project, "nn")


@pytest.mark.slow
def test_a_second_level_model_is_searched_on_valid_rows(project: Project):
    """Its networks are those of the project; what is searched is how trees use them."""
    section = "{hidden_sizes: [16], max_epochs: 3, batch_rows: 64, device: cpu}"
    edit(
        project,
        "{bag: none, hidden_sizes: [8], max_epochs: 3, batch_rows: 64, device: cpu}",
        section,
    )
    edit(project, "search:", "embedding_catboost: {iterations: 20, depth: 2, device: cpu}\nsearch:")
    edit(
        project,
        "  nn:\n    learning_rate",
        "  embedding_catboost: {depth: [3]}\n  nn:\n    learning_rate",
    )
    data = project.root / "data"
    made = data.resolve()
    data.unlink()
    data.mkdir()
    for name in ("reduce", "encode"):
        (data / name).symlink_to(made / name)
    run_stage(project, "train@nn")
    found, _ = look(project, "embedding_catboost", method="grid", target="late")

    assert found["rows"] == "valid rows"
    assert [one["params"]["depth"] for one in found["trials"]] == [2, 3]
    assert all(one["value"] > 0.7 for one in found["trials"])


def test_another_setting_is_another_search(project: Project):
    first = open_search(project, "baseline", method="tpe", target=None, seed=0)
    assert (
        open_search(project, "baseline", method="tpe", target=None, seed=1).folder != first.folder
    )
    assert (
        open_search(project, "baseline", method="tpe", target="late", seed=0).folder != first.folder
    )
    edit(project, "high: 1.0,", "high: 2.0,")
    assert (
        open_search(project, "baseline", method="tpe", target=None, seed=0).folder != first.folder
    )


def test_inputs_that_are_not_up_to_date_are_named(tmp_path: Path):
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=tmp_path, check=True
    )
    (tmp_path / "a.txt").write_text("new")
    (tmp_path / "dvc.yaml").write_text(
        "stages: {reduce: {cmd: 'true'}, encode: {cmd: 'true', deps: [a.txt]}}"
    )
    console = Console(file=io.StringIO(), width=200)
    warn_of_stale(Project(tmp_path), ["encode"], console)
    assert console.file.getvalue().startswith("warning: encode is not up to date")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "basline"}, "nearest name: baseline"),
        ({"model": "catboost"}, "section `search.catboost` says nothing to search"),
        ({"target": "dely"}, "no target 'dely'; nearest name: delay"),
        ({"trials": 0}, "--trials is 0; at least 1 is needed"),
        ({"method": "grid"}, "`search.baseline.penalty` is a continuous range"),
    ],
)
def test_wrong_questions_are_refused(project: Project, options, message: str):
    with pytest.raises((ConfigError, DataError), match=re.escape(message)):
        look(project, **options)
    assert not (project.state / "search").exists()


def test_params_yaml_is_checked_with_its_spaces(project: Project):
    """Every command names a wrong space, not only the search."""
    from headrace.commands.settings import read_settings

    edit(project, "kind: [linear, prior]", "kind: [linear, priro]")
    with pytest.raises(ConfigError, match=r"`search.baseline.kind` is 'priro'"):
        read_settings(project)
