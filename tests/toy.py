"""A small DVC project whose stages cost nothing: what the commands around the DAG are tried on."""

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from headrace.commands.pipeline import environment
from headrace.project import Project

STEP = """\
import json, os, pathlib, sys, time
name, out, *inputs = sys.argv[1:]
import yaml
value = yaml.safe_load(open("params.yaml"))
for part in name.split("@"):
    value = value[part]
time.sleep(value.get("sleep", 0))
pathlib.Path(f"pid-{name}").write_text(str(os.getpid())) if value.get("pid") else None
time.sleep(value.get("hang", 0))
if value.get("fail") is not None:
    sys.exit(value["fail"])
text = [str(value["value"])]
for folder in inputs:
    text += [path.read_text() for path in sorted(pathlib.Path(folder).rglob("x.txt"))]
pathlib.Path(out).mkdir(parents=True, exist_ok=True)
(pathlib.Path(out) / "x.txt").write_text(" ".join(text))
"""

PIPELINE = """\
stages:
  one:
    cmd: python step.py one data/one input.txt
    deps: [input.txt, step.py]
    params: [one]
    outs: [data/one]
  train:
    matrix:
      model: ${models}
    cmd: python step.py train@${item.model} data/train/${item.model} data/one
    deps: [data/one, step.py]
    params:
    - train.${item.model}
    outs:
    - data/train/${item.model}
  last:
    cmd: python step.py last data/last data/train
    deps: [data/train, step.py]
    params: [models, last]
    outs: [data/last]
"""

PARAMS = """\
version: 1
resources: {threads: 2, memory_budget: 1GiB}
models: [a, b]
one: {value: 1}
train:
  a: {value: 2, lr: 0.1}
  b: {value: 3}
last: {value: 4}
"""
STAGES = ("one", "train@a", "train@b", "last")


def make_toy(folder: Path, *, params: str = PARAMS) -> Project:
    """Make the toy in ``folder``: one → train@a, train@b → last; nothing has run yet."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=folder, check=True
    )
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "params.yaml").write_text(params)
    (folder / "step.py").write_text(STEP)
    (folder / "input.txt").write_text("0")
    return Project(folder)


def edit(path: Path, old: str, new: str) -> None:
    """Replace ``old``, which must be there, by ``new``."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def repro_toy(project: Project) -> None:
    """Bring the toy up to date with DVC alone."""
    subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "--quiet"],
        cwd=project.root,
        env=environment(),
        check=True,
    )


@functools.cache
def shared_prefect_home() -> Path:
    """One Prefect database for all tests of a process: making it takes seconds."""
    folder = tempfile.mkdtemp(prefix="headrace-prefect-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
