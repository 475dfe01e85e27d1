"""The command line: every error is one line and an exit code; help is light."""

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headrace.cli import app
from headrace.commands.settings import read_settings
from headrace.commands.stage import call_stage
from headrace.errors import ConfigError
from headrace.params import Resources
from headrace.project import Project
from headrace.record import MemoryRecorder

HEADRACE = Path(sys.executable).with_name("headrace")


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [HEADRACE, *words], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("x,y\n1,0\n2,1\n")
    (tmp_path / "params.yaml").write_text(
        "version: 1\nmodels: [baseline]\n"
        "extract: {sources: {a: a.csv}, targets: [y], columns: {y: {role: target}}}\n"
        "reduce: {}\nencode: {}\ntrain: {baseline: {}}\nstack: {}\ndecide: {}\ninterpret: {}\n"
        "evaluate: {}\npublish: {}\n"
    )
    return tmp_path


def _edit(project: Path, old: str, new: str) -> None:
    path = project / "params.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_outside_a_project_the_way_in_is_named(tmp_path: Path):
    done = _run(tmp_path, "status")
    assert done.returncode == 2
    assert done.stderr.startswith("headrace: no params.yaml in ")
    assert "headrace init" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("reduce: {}", "reduces: {}", "unknown sections ['reduces']; nearest name: reduce"),
        ("reduce: {}", "reduce: {max_rel_eror: 0.1}", "nearest name: max_rel_error"),
        ("reduce: {}", "reduce: {max_rel_error: few}", "`reduce.max_rel_error` is 'few'"),
        ("reduce: {}", "reduce: {max_rel_error: 1e-6}", "write it with a point, like 1.0e-6"),
        ("encode: {}", "encode: {}\nencode: {}", "`encode` is set twice (first on line 5)"),
        ("version: 1", "version: 9", "`version` is 9; this headrace reads version 1"),
        ("[baseline]", "[baselin]", "baseline"),
        ("[baseline]", "[baseline, baseline]", "names 'baseline' twice"),
        ("[baseline]", "[]", "`models` must list at least one model"),
        ("extract:", "extracts:", "nearest name: extract"),
        ("targets: [y]", "targets: [y], folds: 1", "`extract.folds` is 1"),
        ("targets: [y]", "targets: [y], split: {kind: random, column: x}", "cannot take effect"),
    ],
)
def test_params_faults_end_in_one_line(project: Path, old: str, new: str, message: str):
    _edit(project, old, new)
    done = _run(project, "stage", "extract")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (project / "data").exists()


def test_a_missing_section_is_named(project: Path):
    (project / "params.yaml").write_text("version: 1\nmodels: [baseline]\n")
    done = _run(project, "stage", "extract")
    assert done.returncode == 2
    assert "section `extract` is missing" in done.stderr


@pytest.mark.parametrize(
    ("old", "message"),
    [
        ("stack: {}\n", "section `stack` is missing; for its defaults write `stack: {}`"),
        ("{baseline: {}}", "section `train.baseline` is missing"),
    ],
)
def test_a_missing_stage_section_is_named(project: Path, old: str, message: str):
    assert _run(project, "init").returncode == 0
    _edit(project, old, "{}" if "baseline" in old else "")
    done = _run(project, "repro")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("door", ["run", "repro", "why", "status"])
def test_a_mistyped_model_removes_and_starts_nothing(project: Path, door: str):
    made = _run(project, "init")
    assert made.returncode == 0, made.stderr
    (project / "data" / "train" / "baseline").mkdir(parents=True)
    _edit(project, "[baseline]", "[baselin]")
    done = _run(project, door)
    assert done.returncode == 2
    assert "nearest name: baseline" in done.stderr
    assert (project / "data" / "train" / "baseline").is_dir()


def test_an_unknown_stage_is_answered_with_the_nearest(project: Path):
    done = _run(project, "stage", "train@baselin")
    assert done.returncode == 2
    assert "nearest name: train@baseline" in done.stderr


def test_a_stage_without_its_input_says_how_to_make_it(project: Path):
    done = _run(project, "stage", "reduce")
    assert done.returncode == 5
    assert "headrace repro" in done.stderr


def test_a_budget_below_what_the_run_holds_is_refused_with_the_figure(project: Path):
    _edit(project, "version: 1", "version: 1\nresources: {memory_budget: 1MiB}")
    done = _run(project, "stage", "extract")
    assert done.returncode == 6
    assert "`resources.memory_budget` is 1.0 MiB" in done.stderr
    assert "set at least" in done.stderr


def test_other_code_than_the_lock_names_is_refused(project: Path):
    (project / "headrace.lock").write_text("headrace: 0.0.1\nstages: {extract: '0'}\n")
    done = _run(project, "stage", "extract")
    assert done.returncode == 2
    assert "headrace upgrade" in done.stderr


def test_a_failed_stage_leaves_word_for_whoever_started_it(project: Path):
    (project / "a.csv").unlink()
    done = _run(project, "stage", "extract")
    assert done.returncode == 3
    failure = (project / ".headrace" / "failures" / "extract.json").read_text()
    assert '"exit_code": 3' in failure
    assert "a.csv" in failure


def test_the_traceback_comes_only_when_asked_for(tmp_path: Path):
    assert "Traceback" not in _run(tmp_path, "status").stderr
    assert "Traceback" in _run(tmp_path, "--debug", "status").stderr


def test_a_folder_can_be_named(project: Path, tmp_path_factory: pytest.TempPathFactory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert "not a stage" in _run(elsewhere, "-C", str(project), "stage", "nothing").stderr
    done = _run(elsewhere, "-C", str(project / "missing"), "status")
    assert (done.returncode, "is not a folder" in done.stderr) == (2, True)


def test_help_loads_no_heavy_package():
    code = (
        "import sys, headrace.cli\n"
        "heavy = {'torch', 'mlflow', 'prefect', 'catboost', 'pandas', 'pyarrow', 'duckdb', 'dvc',"
        " 'numpy', 'sklearn', 'numba', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n"


def test_telemetry_is_off_before_any_tool_is_imported():
    code = "import os, headrace\nprint(os.environ['DO_NOT_TRACK'], os.environ['DVC_NO_ANALYTICS'])"
    env = {name: value for name, value in os.environ.items() if name not in ("DO_NOT_TRACK",)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["true", "true"]


@pytest.mark.parametrize("command", ["batch", "bench", "diagnose"])
@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("figures", "^--json figures is a folder; name a file in it, such as figures/out.json$"),
        ("nowhere/a.json", "^--json nowhere/a.json: the folder .*nowhere does not exist; make it"),
        (os.devnull, "is no regular file"),
    ],
)
def test_figures_that_cannot_be_written_are_refused_before_anything_is_measured(
    project: Path, monkeypatch: pytest.MonkeyPatch, command: str, file: str, told: str
):
    """The project has no encoded rows: whatever opens it first says that instead."""
    (project / "figures").mkdir()
    monkeypatch.chdir(project)
    done = CliRunner().invoke(app, [command, "--json", file])
    assert isinstance(done.exception, ConfigError)
    assert re.search(told, str(done.exception))


@pytest.mark.parametrize("stage", ["stack", "decide", "interpret", "evaluate", "publish"])
def test_every_stage_gets_the_folders_that_it_takes(
    project: Path, stage: str, monkeypatch: pytest.MonkeyPatch
):
    """The command calls the stage's function by its signature, each folder in its place."""
    module = import_module(f"headrace.stages.{stage}")
    signature = inspect.signature(getattr(module, stage))
    monkeypatch.setattr(module, stage, lambda *given, **named: signature.bind(*given, **named))
    own = Project(project)
    settings = read_settings(own)
    bound = call_stage(
        own, stage, settings, settings.section(stage), Resources(), MemoryRecorder(), None
    ).arguments

    made_by = {"table": "reduce", "encoded": "encode", "stack": "stack", "decisions": "decide"}
    made_by |= {"interpretation": "interpret", "out": stage}
    for name in made_by.keys() & bound.keys():
        assert bound[name] == own.data(made_by[name])
    assert bound["members"] == {"baseline": own.data("train@baseline")}
