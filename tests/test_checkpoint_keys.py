"""Which checkpoints a stage uses: its own key's; others it names, or refuses, with what differs."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.commands.checkpoints import (
    checkpoint_folder,
    remove_checkpoints,
    require_resumable,
)
from headrace.commands.init import init
from headrace.commands.stage import run_stage
from headrace.errors import ConfigError, Stopped
from headrace.project import Project
from headrace.record import MemoryRecorder
from headrace.tracking.journal import StageJournal
from headrace.training.checkpoint import GIVEN, NEWEST, Checkpoints
from tests.train_case import tree_bytes

STAGE = "train@nn"
ENTRY = {
    "stage": STAGE,
    "inputs": {"data/reduce": "r1", "data/encode": "e1"},
    "parameters": {"train.nn": {"learning_rate": 0.001, "seed": 0}},
    "code": {"models/nn.py": "c1", "training/loop.py": "c2"},
}


def entry(**changes):
    return {
        "stage": STAGE,
        "inputs": ENTRY["inputs"] | changes.get("inputs", {}),
        "parameters": {"train.nn": ENTRY["parameters"]["train.nn"] | changes.get("nn", {})},
        "code": ENTRY["code"] | changes.get("code", {}),
    }


def ask(root: Path, of=ENTRY, *, resume=None):
    """Return the folder for the key of ``of``, and what was said."""
    recorder = MemoryRecorder()
    folder = checkpoint_folder(Project(root), STAGE, of, resume=resume, recorder=recorder)
    return folder, recorder.warnings


def leave(root: Path, of=ENTRY, *, age_s: float = 0.0, epoch: int = 1) -> Path:
    """Leave a checkpoint of the key of ``of``, as a killed run does."""
    folder, _ = ask(root, of)
    checkpoints = Checkpoints(folder, signature="s", recorder=MemoryRecorder())
    checkpoints.save({"epoch": epoch})
    before = (folder / NEWEST).stat().st_mtime - age_s
    os.utime(folder / NEWEST, (before, before))
    return folder


def test_the_same_key_has_the_same_folder_and_says_nothing(tmp_path):
    folder = leave(tmp_path)
    leave(tmp_path, entry(nn={"seed": 1}))

    assert ask(tmp_path) == (folder, [])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"nn": {"learning_rate": 0.01}}, "parameter train.nn.learning_rate 0.001 → 0.01"),
        ({"nn": {"dropout": 0.1}}, "parameter train.nn.dropout not set → 0.1"),
        ({"inputs": {"data/encode": "e2"}}, "input data/encode changed"),
        (
            {"code": {"models/nn.py": "c9"}, "nn": {"seed": 2}},
            "parameter train.nn.seed 0 → 2; code models/nn.py changed",
        ),
        (
            {"code": {f"data/{name}.py": "new" for name in "abcdef"}},
            "code data/a.py changed; code data/b.py changed; code data/c.py changed; "
            "code data/d.py changed; and 2 more",
        ),
    ],
)
def test_another_key_is_named_in_one_line_with_what_differs(tmp_path, changes, told):
    other = leave(tmp_path)
    folder, warnings = ask(tmp_path, entry(**changes))

    assert folder != other
    assert warnings == [
        f"checkpoint {other.relative_to(tmp_path)} is not used, and training starts fresh: {told}"
    ]


def test_one_without_its_key_is_named_too(tmp_path):
    other = leave(tmp_path)
    (other / "key.json").unlink()
    _, (warning,) = ask(tmp_path, entry(nn={"seed": 1}))

    assert "fresh: no key.json beside it says with which data, parameters and code" in warning


def test_of_other_keys_the_newest_stays(tmp_path):
    kept = [leave(tmp_path, entry(nn={"seed": seed}), age_s=100 - seed) for seed in (1, 3, 2)]
    own, warnings = ask(tmp_path)

    assert "train.nn.seed 3 → 0" in warnings[0]
    assert sorted(own.parent.iterdir()) == sorted([own, kept[1]])


def test_a_given_checkpoint_of_the_same_key_is_copied_in(tmp_path):
    there = shutil.copytree(leave(tmp_path, epoch=5), tmp_path / "kept")
    for given in (there, there / NEWEST):
        folder, warnings = ask(tmp_path, resume=given)

        assert warnings == []
        assert (folder / GIVEN).read_bytes() == (there / NEWEST).read_bytes()


def test_a_given_checkpoint_of_another_key_is_refused(tmp_path):
    other = leave(tmp_path)
    with pytest.raises(ConfigError) as caught:
        ask(tmp_path, entry(nn={"learning_rate": 0.01}), resume=other)

    assert str(caught.value) == (
        f"--resume {other / NEWEST} is refused, for it belongs to another stage key: parameter "
        f"train.nn.learning_rate 0.001 → 0.01. Undo that, or run without --resume to start fresh"
    )
    assert not list(other.parent.rglob(GIVEN))


@pytest.mark.parametrize("given", ["", "fold-1", f"fold-1/{NEWEST}"])
def test_a_given_checkpoint_of_a_bag_brings_the_fits_that_are_finished(tmp_path, given):
    there = tmp_path / "kept"
    shutil.copytree(leave(tmp_path), there)
    (there / "fold-0" / "fitted").mkdir(parents=True)
    (there / "fold-0" / "fitted" / "model.json").write_text("whole")
    (there / "fold-1").mkdir()
    shutil.move(there / NEWEST, there / "fold-1" / NEWEST)
    folder, warnings = ask(tmp_path, resume=there / given)

    assert warnings == []
    assert (folder / "fold-0" / "fitted" / "model.json").read_text() == "whole"
    assert (folder / "fold-1" / GIVEN).read_bytes() == (there / "fold-1" / NEWEST).read_bytes()
    assert not (folder / GIVEN).exists()


@pytest.mark.parametrize("given", ["", "fold-1", f"fold-1/weight-decay-1e-02/{NEWEST}"])
def test_a_given_checkpoint_of_a_search_within_a_bag_is_the_newest_of_it(tmp_path, given):
    """Trials of a fit have folders of their own; those before it are tried again."""
    there = tmp_path / "kept"
    shutil.copytree(leave(tmp_path), there)
    earlier, running = (there / "fold-1" / f"weight-decay-1e-0{n}" for n in (1, 2))
    for trial, age_s in ((earlier, 100), (running, 0)):
        trial.mkdir(parents=True)
        shutil.copy(there / NEWEST, trial)
        os.utime(trial / NEWEST, (1e9 - age_s, 1e9 - age_s))
    (there / NEWEST).unlink()
    folder, warnings = ask(tmp_path, resume=there / given)

    assert warnings == []
    assert [path.relative_to(folder) for path in folder.rglob(GIVEN)] == [
        running.relative_to(there) / GIVEN
    ]


def test_a_given_checkpoint_must_be_there_and_have_its_key(tmp_path):
    with pytest.raises(ConfigError, match="nowhere is not there"):
        ask(tmp_path, resume=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds neither newest\.ckpt nor before\.ckpt"):
        ask(tmp_path, resume=tmp_path)
    alone = shutil.copy(leave(tmp_path) / NEWEST, tmp_path / "alone.ckpt")
    with pytest.raises(ConfigError) as caught:
        ask(tmp_path, resume=Path(alone))
    assert str(caught.value) == (
        f"--resume {alone} is refused: no key.json beside it says with which data, parameters and "
        f"code it was made; give a checkpoint together with the key.json of the folder it was "
        f"written to, or run without --resume to start fresh"
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"stage": "train@nn", "inputs": 1}'])
def test_a_damaged_key_is_no_key(tmp_path, text):
    there = shutil.copytree(leave(tmp_path), tmp_path / "kept")
    (there / "key.json").write_text(text)
    with pytest.raises(ConfigError, match=r"is refused: no key\.json beside it says"):
        ask(tmp_path, resume=there)


def test_a_given_checkpoint_of_another_stage_names_both(tmp_path):
    there = shutil.copytree(leave(tmp_path), tmp_path / "kept")
    key = there / "key.json"
    key.write_text(key.read_text().replace(STAGE, "train@other"))
    with pytest.raises(ConfigError, match=r"it is of stage train@other, not train@nn$"):
        ask(tmp_path, resume=there)


def test_a_given_checkpoint_beside_those_of_the_keys_is_used_and_stays(tmp_path):
    """By hand under a name of one's own, or under a name like a key's: both lie in the way."""
    own = leave(tmp_path, epoch=5)
    for name in ("good", "0123456789abcdef"):
        given = shutil.copytree(own, own.parent / name)
        os.utime(given / NEWEST, (1, 1))  # others are newer
        content = (given / NEWEST).read_bytes()
        leave(tmp_path, entry(nn={"seed": 1}))
        folder, warnings = ask(tmp_path, resume=given)

        assert warnings == []
        assert (given / NEWEST).read_bytes() == (folder / GIVEN).read_bytes() == content
        remove_checkpoints(folder, resume=given)
        assert list(own.parent.iterdir()) == [given]
        shutil.copytree(given, own)
        shutil.rmtree(given)


def test_after_a_stage_nothing_is_left_but_what_was_put_there_by_hand(tmp_path):
    own = leave(tmp_path)
    leave(tmp_path, entry(nn={"seed": 1}))
    remove_checkpoints(own, resume=own / NEWEST)
    assert not own.parent.exists()
    by_hand = shutil.copytree(leave(tmp_path), own.parent / "good")
    remove_checkpoints(own, resume=None)
    assert list(own.parent.iterdir()) == [by_hand]


def test_a_stage_that_takes_no_checkpoint_says_which_do():
    require_resumable("train@nn", ["train@nn"])
    with pytest.raises(ConfigError, match=r"stage encode does not .*those that do: train@nn"):
        require_resumable("encode", ["train@nn"])
    with pytest.raises(ConfigError, match="no stage here does"):
        require_resumable("train@baseline", [])


_PARAMS = """\
version: 1
models: [baseline, nn]
extract:
  sources: {rows: rows.csv}
  recipe: recipe.sql
  targets: [target]
  split: {kind: random}
reduce: {}
encode: {}
train: {baseline: {}, nn: {max_epochs: 3, hidden_sizes: [8], batch_rows: 64, device: cpu}}
publish: {name: toy}
"""


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose stages up to ``encode`` have run."""
    root = tmp_path_factory.mktemp("project")
    rows = [f"{i},{(i * 37) % 101 / 4},{(i * 37) % 101 > 50:d}" for i in range(1500)]
    (root / "rows.csv").write_text("\n".join(["nr,size,target", *rows]) + "\n")
    (root / "params.yaml").write_text(_PARAMS)
    (root / "recipe.sql").write_text("SELECT * FROM rows\n")
    init(root)
    for stage in ("extract", "reduce", "encode"):
        run_stage(Project(root), stage)
    return root


@pytest.fixture
def project(encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    root = shutil.copytree(encoded, tmp_path / "project")
    monkeypatch.chdir(root)
    return Project(root)


def stop_in_second_epoch(project: Project, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the stage, send it SIGTERM in its second epoch, and return its checkpoints' folder."""
    seen: list[int] = []
    progress = StageJournal.progress

    def told(self, done, total, *, unit, detail=""):
        progress(self, done, total, unit=unit, detail=detail)
        seen.append(done)
        if seen[-3:] == [1, 1, 1]:  # told at the end of the first epoch, then after each batch
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(StageJournal, "progress", told)
        with pytest.raises(Stopped, match="stage train@nn was stopped; run again to resume"):
            run_stage(project, STAGE)
    (folder,) = (project.checkpoints / STAGE).iterdir()
    return folder


def edit(project: Project, old: str, new: str) -> None:
    text = project.params.read_text()
    assert old in text
    project.params.write_text(text.replace(old, new))


def journal_of(project: Project) -> str:
    return "".join(path.read_text() for path in sorted(project.journal.rglob("*.jsonl")))


@pytest.mark.slow
def test_a_stopped_stage_resumes_at_its_batch_to_the_same_files(encoded, project, monkeypatch):
    """The interval is a minute, so without the checkpoint of the signal it would start anew."""
    run_stage(project, STAGE)
    whole = tree_bytes(project.data(STAGE))
    shutil.rmtree(project.data(STAGE))
    stop_in_second_epoch(project, monkeypatch)
    assert not project.data(STAGE).exists()
    run_stage(project, STAGE)

    assert "Resumed in epoch 2 after 2 batches" in journal_of(project)
    assert tree_bytes(project.data(STAGE)) == whole
    assert not project.checkpoints.joinpath(STAGE).exists()


@pytest.mark.slow
def test_a_run_with_another_parameter_starts_fresh_and_says_so(project, monkeypatch, capsys):
    folder = stop_in_second_epoch(project, monkeypatch)
    edit(project, "max_epochs: 3", "max_epochs: 2")
    run_stage(project, STAGE)

    said = (
        f"checkpoint {folder.relative_to(project.root)} is not used, and training starts fresh: "
        f"parameter train.nn.max_epochs 3 → 2"
    )
    assert [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert "Resumed" not in journal_of(project)


@pytest.mark.slow
def test_resume_at_the_command_line_is_used_or_refused(project, monkeypatch, tmp_path):
    kept = shutil.copytree(stop_in_second_epoch(project, monkeypatch), tmp_path / "kept")
    shutil.rmtree(project.checkpoints)
    edit(project, "batch_rows: 64", "batch_rows: 128")
    refused = headrace("stage", STAGE, "--resume", "../kept")
    elsewhere = headrace("stage", "train@baseline", "--resume", "../kept")
    edit(project, "batch_rows: 128", "batch_rows: 64")
    good = shutil.copytree(kept, project.checkpoints / STAGE / "good")
    used = headrace("stage", STAGE, "--resume", str(good.relative_to(project.root)))

    assert refused.returncode == elsewhere.returncode == 2
    assert "parameter train.nn.batch_rows 64 → 128" in refused.stderr
    assert "stage train@baseline does not take a checkpoint" in elsewhere.stderr
    assert refused.stderr.count("\n") == elsewhere.stderr.count("\n") == 1
    assert used.returncode == 0, used.stderr
    assert "Resumed in epoch 2 after 2 batches" in journal_of(project)
    assert (good / "fold-0" / NEWEST).is_file()
    assert list(good.parent.iterdir()) == [good]  # the run's own are gone


def headrace(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from headrace.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
