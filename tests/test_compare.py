"""``headrace compare``: models of several runs on the same rows, paired from kept resamples."""

import io
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from headrace.commands.compare import compare, print_compared, seed_sentences
from headrace.commands.stage import model_settings
from headrace.errors import ConfigError, DataError
from headrace.evaluation.resamples import RESAMPLES
from headrace.evaluation.seed_noise import SeedNoise, is_inside, seed_noise
from headrace.models.catboost import CatboostParams
from headrace.params import Resources
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import read_json
from headrace.tracking.history import find_run, kept_file, list_runs, read_run, run_path
from headrace.tracking.journal import open_run
from headrace.tracking.location import connect, find_store, prepare_store
from headrace.tracking.replica import replicate
from tests.evaluation_case import DELAY, LATE, Case

PARAMS = EvaluateParams(num_resamples=400)


def tell(root, case, *, params=PARAMS, settings=None, name="work"):
    """Evaluate ``case`` in a run of the journal of ``root``; return the run's id."""
    work = root / name
    shutil.rmtree(work, ignore_errors=True)
    table, members = case.write(work)
    told = {"resources": Resources(threads=1)}
    stack(table, members, work / "stack", StackParams(num_resamples=200), **told,
          recorder=MemoryRecorder())  # fmt: skip
    run = open_run(Project(root).journal, kind="flow")
    for model, values in (settings or {}).items():
        train = run.stage(f"train@{model}")
        train.params(values)
        train.close("finished", exit_code=0)
    stage = run.stage("evaluate", on_warning=lambda _: None)
    evaluate(table, members, work / "stack", work / "evaluate", params, **told, recorder=stage)
    stage.close("finished", exit_code=0)
    run.results(read_json(work / "evaluate" / "metrics.json"), tied_with_best={"late": ["sharp"]})
    run.close("finished")
    return run.run_id


def changed(case, model, scale, seed):
    """Give ``model`` of ``case`` other errors on the same rows."""
    rng = np.random.default_rng(seed)
    for split in case._noise[model]:
        case._noise[model][split] = rng.normal(0, scale, case.num_rows)
    return case


def printed(found):
    text = io.StringIO()
    print_compared(found, Console(file=text, width=200))
    return text.getvalue()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two runs on the same rows; in the second the model ``sharp`` is far worse."""
    root = tmp_path_factory.mktemp("project")
    tell(root, Case(targets=(LATE,)))
    tell(root, changed(Case(targets=(LATE,)), "sharp", 6.0, 5))
    return root


def test_models_of_two_runs_are_paired_and_sorted(two):
    """One entry per model and run, best first; what says the same in both is there once."""
    (found,) = compare(Project(two), ["1", "last"], target=None, metric=None)
    names = [one.name for one in found.entries]
    assert "plain 0001+0002" in names
    assert {"sharp 0001", "sharp 0002"} <= set(names)
    values = [one.values["roc_auc"].value for one in found.entries]
    assert values == sorted(values, reverse=True)
    pair = next(p for p in found.pairs if {p.first, p.second} == {"sharp 0001", "sharp 0002"})
    assert pair.p_holm < 0.05
    assert found.ranks["sharp 0002"] == "worse"
    text = printed([found])
    assert "late: 600 test rows in 30 days, 95 % intervals; best first by ROC-AUC" in text
    assert "unpaired" not in text
    assert re.search(r"sharp 0001 .*(best|tied)", text)


def test_pairing_across_runs_is_pairing_within_one(two):
    """The difference of two models of one run is that of comparison.json."""
    (found,) = compare(Project(two), ["1"], target="late", metric="brier")
    told = read_json(two / "work" / "evaluate" / "comparison.json")  # of the second run
    (second,) = compare(Project(two), ["2"], target="late", metric="brier")
    stated = {
        frozenset((p["first"], p["second"])): p for p in told["targets"]["late"]["pairs"]["brier"]
    }
    for pair in second.pairs:
        key = frozenset((pair.first.split()[0], pair.second.split()[0]))
        width = stated[key]["difference"]["ci_high"] - stated[key]["difference"]["ci_low"]
        assert pair.difference.high - pair.difference.low == pytest.approx(width, rel=1e-6)
        assert pair.p_holm == pytest.approx(stated[key]["p_holm"])
        assert pair.detectable == pytest.approx(stated[key]["smallest_detectable"], rel=1e-6)
    assert found.primary == "brier"


def test_other_rows_are_refused_with_counts_and_digests(two, tmp_path):
    """Scores of different rows cannot be compared; nor with other labels."""
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    tell(root, Case(targets=(LATE,), seed=9, num_rows=500))
    with pytest.raises(
        DataError, match=r"run 0001 was evaluated on 600 test rows .* run 0003 on 500 other ones"
    ):
        compare(Project(root), ["1", "3"], target=None, metric=None)
    case = Case(targets=(LATE,))
    case.labels["test"]["late"][:3] = 1 - case.labels["test"]["late"][:3]
    tell(root, case)
    assert seed_sentences(Project(root)) == []  # the others are left out
    with pytest.raises(DataError, match="same test rows, but other labels or weights of 'late'"):
        compare(Project(root), ["1", "4"], target=None, metric=None)


def test_lost_or_other_resamples_are_compared_unpaired_and_said(two, tmp_path):
    """A plain warning; the interval of the difference is wider than the paired one."""
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    project = Project(root)
    (paired,) = compare(project, ["1", "2"], target=None, metric=None)
    run = read_run(run_path(project.journal, list_runs(project.journal)[1]))
    (kept,) = [
        kept_file(project.journal, event.data["sha256"])
        for event in run.stages[-1].of_kind("file")
        if event.data["name"] == RESAMPLES
    ]
    kept.unlink()
    (found,) = compare(project, ["1", "2"], target=None, metric=None)
    text = printed([found])
    assert "run 0002: its resamples are gone" in text
    assert "yes, unpaired" in text or "no, unpaired" in text
    assert len(found.entries) == len(paired.entries) + 1  # nothing says that plain is the same
    tell(root, Case(targets=(LATE,)), params=EvaluateParams(num_resamples=400, seed=1))
    (found,) = compare(project, ["1", "3"], target=None, metric=None)
    assert "other resamples (seed: 0 and 1)" in printed([found])
    wide = next(p for p in found.pairs if {p.first, p.second} == {"sharp 0001", "sharp 0003"})
    assert wide.difference.value == 0
    assert wide.p_value == 1
    assert wide.difference.high > 0


def test_runs_that_differ_by_seed_are_replicates(tmp_path):
    """Their spread is told; a gain inside it is called so, one beyond it is not."""
    for seed in range(3):
        case = changed(Case(targets=(DELAY,)), "sharp", 1.0, seed)
        settings = {
            "sharp": {"settings/seed": str(seed), "settings/depth": "6"},
            "plain": {"settings/seed": "0"},
        }
        tell(tmp_path, case, settings=settings)
    (found,) = compare(Project(tmp_path), ["1", "2", "3"], target=None, metric="rmse")
    values = [e.values["rmse"].value for e in found.entries if e.model == "sharp"]
    noise = found.noise["sharp 0001"]
    assert (noise.num_seeds, noise.low, noise.high) == (3, min(values), max(values))
    assert "plain 0001+0002+0003" not in found.noise
    text = printed([found])
    assert "sharp: RMSE over 3 seeds has a standard deviation of" in text
    lines = text.splitlines()
    assert any(
        "sharp 000" in line and "− sharp" in line and "inside seed noise" in line for line in lines
    )
    assert not any("plain" in line and "− sharp" in line and "inside" in line for line in lines)


def test_settings_that_differ_by_more_than_the_seed_are_no_replicates(tmp_path):
    """Another depth is another model."""
    for number, depth in enumerate(("6", "8")):
        case = changed(Case(targets=(DELAY,)), "sharp", 1.0, number)
        told = {"sharp": {"settings/seed": str(number), "settings/depth": depth}}
        tell(tmp_path, case, settings=told)
    (found,) = compare(Project(tmp_path), ["1", "2"], target=None, metric=None)
    assert found.noise == {}
    assert seed_sentences(Project(tmp_path)) == []


def test_too_few_resamples_for_so_many_pairs_are_said(two, tmp_path):
    """Whoever names many runs learns why nothing is told apart, and what would do."""
    assert "cannot tell" not in printed(compare(Project(two), ["1", "2"], target=None, metric=None))
    few = EvaluateParams(num_resamples=200)
    for scale in (2.0, 3.0):
        tell(tmp_path, changed(Case(targets=(LATE,)), "sharp", scale, 3), params=few)
    text = printed(compare(Project(tmp_path), ["1", "2"], target=None, metric=None))
    assert "200 resamples cannot tell any pair of 5 models apart" in text
    assert "set `evaluate.num_resamples` to 399 or more" in text


def test_wrong_names_are_told_with_what_there_is(two):
    """Run, target and metric."""
    project = Project(two)
    with pytest.raises(ConfigError, match="no run '7'"):
        compare(project, ["7"], target=None, metric=None)
    with pytest.raises(ConfigError, match="'lat' is not among the targets"):
        compare(project, ["1"], target="lat", metric=None)
    with pytest.raises(ConfigError, match="'auc' is no metric of 'late'"):
        compare(project, ["1"], target=None, metric="auc")


def test_a_run_without_an_evaluation_is_refused(tmp_path):
    """A run that only extracted."""
    run = open_run(Project(tmp_path).journal, kind="flow")
    run.stage("extract").close("finished", exit_code=0)
    run.close("finished")
    with pytest.raises(DataError, match="has no evaluation in the journal"):
        compare(Project(tmp_path), ["last"], target=None, metric=None)
    assert seed_sentences(Project(tmp_path)) == []


def test_a_run_is_found_by_the_beginning_of_its_id(two, tmp_path):
    """Unless several begin like that."""
    first, _ = list_runs(Project(two).journal)
    (found,) = compare(Project(two), [first[:20]], target=None, metric=None)
    assert {one.runs for one in found.entries} == {("0001",)}
    moment = first.split("-")[1]
    for end in ("aaaaaaaa", "bbbbbbbb"):
        (tmp_path / f"0003-{moment}-{end}.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match="2 runs begin with '0003-"):
        find_run(tmp_path, f"0003-{moment}")


def test_an_evaluation_that_was_reused_is_that_of_its_maker(two, tmp_path):
    """The run that reused it has no stage of its own."""
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    project = Project(root)
    first, _ = list_runs(project.journal)
    run = open_run(project.journal, kind="repro")
    run.state(lineage="l", stage_keys={}, unchanged={"evaluate": first})
    run.close("finished")
    (found,) = compare(project, ["1", "3"], target=None, metric=None)
    assert {one.runs for one in found.entries} == {("0001", "0003")}


def test_runs_of_another_folder_come_from_mlflow(two, tmp_path, monkeypatch):
    """By MLflow's run id, of the parent or a child; what the journal here lacks is downloaded."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "copy"
    shutil.copytree(two, root)
    project = Project(root)
    store = find_store(root)
    prepare_store(store)
    assert replicate(project.journal, store, experiment="e").problem == ""
    client = connect(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "e"]
    runs = {
        (run.data.tags["headrace.run_id"], run.info.run_name): run.info.run_id
        for run in client.search_runs([experiment.experiment_id])
    }
    first, second = list_runs(project.journal)
    (here,) = compare(project, [runs[first, first], second], target=None, metric=None)
    run_path(project.journal, first).unlink()
    (found,) = compare(project, [runs[first, "evaluate"], second], target=None, metric=None)
    assert found.pairs == here.pairs
    with pytest.raises(ConfigError, match="has no run ffff"):
        compare(project, ["f" * 32], target=None, metric=None)


def test_settings_are_those_of_the_section():
    """Every one by name, the seed among them, in JSON."""
    told = model_settings(CatboostParams(seed=4))
    assert told["settings/seed"] == "4"
    assert json.loads(told["settings/iterations"]) == CatboostParams().iterations


def test_the_noise_of_a_difference_adds_up():
    """Two deviations of it; a model without replicates adds none."""
    one = seed_noise([0.0, 1.0, 2.0])
    assert one == SeedNoise(3, 1.0, 0.0, 2.0)
    assert is_inside(1.9, one, None)
    assert not is_inside(2.1, one, None)
    assert is_inside(-2.8, one, one)
    assert not is_inside(2.9, one, one)
    assert not is_inside(0.0, None, None)
    assert seed_noise([1.0]) is None
