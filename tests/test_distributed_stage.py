"""torchrun runs the stage: one journal, one result, and a run that lost a rank resumes alone."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from headrace.commands.failure import read_failure
from headrace.project import Project

ROOT = Path(__file__).parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
PARAMS = """\
version: 1
models: [baseline, nn]
extract:
  sources: {rows: rows.csv}
  key: [id]
  targets: {y: {task: regression}, late: {task: binary}}
  columns: {label: {role: category}}
reduce: {}
encode: {}
train:
  baseline: {}
  nn: {device: cpu, batch_rows: 64, members: 1, bins: 16, hidden_sizes: [16], dropout: 0.0,
       max_epochs: 6, checkpoint_minutes: 0.0}
stack: {}
decide: {}
interpret: {}
evaluate: {}
publish: {}
"""
pytestmark = pytest.mark.slow


def _start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(folder: Path, *words: str, code: int = 0) -> tuple[str, str]:
    process = _start(folder, *words)
    out, err = process.communicate(timeout=180)
    assert process.returncode == code, out + err
    return out, err


def _events(folder: Path) -> list[dict]:
    files = sorted(Project(folder).journal.glob("*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def _predictions(folder: Path) -> dict[str, np.ndarray]:
    paths = sorted((folder / "data/train/nn").rglob("*.parquet"))
    assert len(paths) == 2
    return {p.name: pq.read_table(p).column("prediction").to_numpy() for p in paths}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project up to encode."""
    folder = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    x, label = rng.normal(0, 1, 3000), rng.integers(0, 3, 3000)
    y = 2 * x + (label == 1) + rng.normal(0, 0.2, 3000)
    lines = [
        f"{i},{a:.4f},{'abc'[b]},{c:.4f},{int(c > 0)}"
        for i, (a, b, c) in enumerate(zip(x, label, y, strict=True))
    ]
    (folder / "rows.csv").write_text("\n".join(["id,x,label,y,late", *lines, ""]))
    (folder / "params.yaml").write_text(PARAMS)
    stages = "from headrace.cli import app\nfor s in ('extract', 'reduce', 'encode'):\n"
    _run(folder, "-c", f"{stages}    app(['stage', s], standalone_mode=False)")
    return folder


@pytest.fixture(scope="module")
def alone(encoded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same, with train@nn run by one process."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    shutil.copytree(encoded, folder)
    _run(folder, "-m", "headrace", "stage", "train@nn")
    return folder


def test_two_ranks_run_the_stage_as_one(encoded: Path, alone: Path, tmp_path: Path):
    folder = tmp_path / "project"
    shutil.copytree(encoded, folder)
    before = len(_events(folder))
    out, _ = _run(folder, *TORCHRUN, "-m", "headrace", "stage", "train@nn")
    told = _events(folder)[before:]

    assert out.count("nn learnt y, late; predicted rows") == out.count("\n") == 1
    assert [event["event"] for event in told].count("stage_open") == 1
    ranks = [e["values"] for e in told if "fold-0/ranks" in e.get("values", {})]
    assert [values["fold-0/ranks"] for values in ranks] == [2]
    assert [e["status"] for e in told if e["event"] == "stage_close"] == ["finished"]
    assert not list(Project(folder).checkpoints.rglob("*.ckpt"))
    for name, expected in _predictions(alone).items():
        np.testing.assert_allclose(_predictions(folder)[name], expected, rtol=1e-3, atol=1e-4)


def test_a_killed_rank_ends_the_stage_and_one_process_resumes_it(
    encoded: Path, alone: Path, tmp_path: Path
):
    folder = tmp_path / "project"
    shutil.copytree(encoded, folder)
    torchrun = _start(folder, *TORCHRUN, "-m", "headrace", "stage", "train@nn")
    while not list(Project(folder).checkpoints.rglob("before.ckpt")):
        assert torchrun.poll() is None, torchrun.communicate()
        time.sleep(0.02)
    workers = psutil.Process(torchrun.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == "1").kill()
    _, err = torchrun.communicate(timeout=60)
    failure = read_failure(Project(folder), "train@nn")

    assert torchrun.returncode != 0
    if "headrace: rank 1 of 2 ended without a word" in err:
        assert failure.message.startswith("rank 1 of 2 ended without a word: killed")
    else:  # torchrun ended rank 0 before it had noticed
        assert "Signal 9 (SIGKILL) received" in err
    assert not (folder / "data/train/nn").exists()

    before = len(_events(folder))
    _run(folder, "-m", "headrace", "stage", "train@nn")
    notes = [event["text"] for event in _events(folder)[before:] if event["event"] == "note"]
    assert notes[0].startswith("fold-0: Resumed in epoch")
    assert "written by 2 ranks and goes on with 1" in notes[1]
    for name, expected in _predictions(alone).items():
        np.testing.assert_allclose(_predictions(folder)[name], expected, rtol=1e-3, atol=1e-4)
