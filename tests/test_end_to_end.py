"""The main job on real data, as a person runs it: in a clone, through the command line.

Everything here runs the product from outside; numbers that are asserted are what the flights
example gives on CPU (see README), with room for another build of torch.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[1]
HEADRACE = Path(sys.executable).with_name("headrace")
pytestmark = pytest.mark.slow


def _clone(folder: Path) -> Path:
    """Copy what git tracks or would track, as a clone of its own with one commit."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    _git(folder, "init", "--quiet")
    _commit(folder, "start")
    return folder


def _git(folder: Path, *words: str) -> str:
    name = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", *name, *words], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout


def _commit(folder: Path, message: str) -> None:
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--allow-empty", "-m", message)


def _run(folder: Path, *words: str, code: int = 0) -> str:
    """Run headrace as in a shell where nothing is activated, on the code of this tree."""
    env = os.environ | {"PATH": "/usr/bin:/bin", "COLUMNS": "120"}
    done = subprocess.run(
        [HEADRACE, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    for noise in ("Traceback", "Warning", "ERROR", "locked"):
        assert noise not in said, said
    return said


def _out_bytes(folder: Path) -> dict[str, bytes]:
    data = folder / "data"
    files = [path for path in data.rglob("*") if path.is_file() and path.parent != data]
    return {path.relative_to(data).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def flights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = _clone(tmp_path_factory.mktemp("flights"))
    said = _run(folder, "run")
    (folder / ".headrace" / "said.txt").write_text(said)
    _commit(folder, "run")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_run_ends_with_the_comparison_and_the_way_on(flights: Path):
    said = (flights / ".headrace" / "said.txt").read_text()
    for wanted in ("ROC-AUC", "RMSE", "61 days", "lineage id", "report.html", "next:", "train@nn"):
        assert wanted in said
    assert "looked at: once" in said


def test_the_published_model_beats_the_prior_on_both_targets(flights: Path):
    compared = json.loads((flights / "data/evaluate/comparison.json").read_text())
    assert (compared["unit"], compared["num_units"]) == ("day", 61)
    golden = {"arr_delay": ("rmse", 37.8, 0.6), "late": ("roc_auc", 0.690, 0.010)}
    for target, (metric, expected, tolerance) in golden.items():
        entry = compared["targets"][target]
        chosen = entry["models"][entry["chosen"]][metric]
        assert chosen["value"] == pytest.approx(expected, abs=tolerance)
        assert chosen["ci_low"] < chosen["value"] < chosen["ci_high"]
        against = entry["models"]["baseline"][metric]["difference"]
        assert not against["ci_low"] <= 0 <= against["ci_high"]
        assert entry["models"]["baseline"][metric]["verdict"] == "worse"


def test_every_stage_kept_the_memory_budget(flights: Path):
    budget = 2 << 30
    peaks = {}
    for path in (flights / ".headrace/journal").glob("*.jsonl"):
        for line in path.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "stage_close":
                peaks[event["stage_run"].split(".")[0]] = event["peak_bytes"]
    assert {"extract", "train@catboost", "train@nn", "publish"} <= set(peaks)
    assert all(0 < peak <= budget for peak in peaks.values()), peaks


def test_either_door_finds_nothing_to_do_afterwards(flights: Path):
    assert "nothing to do" in _run(flights, "repro")
    assert "skipped, data unchanged" in _run(flights, "run")
    assert "unchanged" in _run(flights, "why", "evaluate")


def test_a_changed_parameter_runs_only_what_depends_on_it(flights: Path):
    path = flights / "params.yaml"
    before = path.read_text()
    path.write_text(before.replace("num_resamples: 1000", "num_resamples: 400"))
    assert "evaluate.num_resamples" in _run(flights, "why", "evaluate")
    keys = yaml.safe_load((flights / "dvc.lock").read_text())["stages"]
    _run(flights, "repro")
    now = yaml.safe_load((flights / "dvc.lock").read_text())["stages"]
    assert {name for name in now if now[name] != keys[name]} == {"evaluate"}
    path.write_text(before)
    _run(flights, "repro")
    assert "skipped, data unchanged" in _run(flights, "run")


def test_new_rows_are_scored_in_their_order(flights: Path, tmp_path: Path):
    rows = pq.read_table(next((flights / "data/extract/test").glob("*.parquet"))).slice(0, 500)
    rows = rows.drop_columns(["row_id", "fold", "arr_delay", "late"])
    pyarrow.csv.write_csv(rows, tmp_path / "new.csv")
    said = _run(flights, "predict", str(tmp_path / "new.csv"), "-o", str(tmp_path / "out.parquet"))
    assert "500 rows" in said
    scored = pq.read_table(tmp_path / "out.parquet")
    assert scored.num_rows == 500


def test_two_clones_at_different_commits_have_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory,
):
    outs = []
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(ROOT / "examples" / "water", folder, dirs_exist_ok=True)
        for made in ("dvc.yaml", "dvc.lock", "headrace.lock", ".dvc", ".headrace"):
            shutil.rmtree(folder / made, ignore_errors=True)
            if (folder / made).is_file():
                (folder / made).unlink()
        _git(folder, "init", "--quiet")
        (folder / "NOTE").write_text(name)
        _commit(folder, name)
        _run(folder, "init")
        _commit(folder, f"{name} initialised")
        _run(folder, "repro")
        outs.append(_out_bytes(folder))
    assert set(outs[0]) == set(outs[1])
    assert [name for name in outs[0] if outs[0][name] != outs[1][name]] == []
