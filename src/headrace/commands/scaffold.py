"""What dvc.yaml and headrace.lock of a project look like; ``init`` and ``upgrade`` write them.

A stage's code is one of its dependencies. In the source tree dvc.yaml lists the modules that the
stage runs; a project that uses the installed package has headrace.lock instead, with one digest a
stage, which DVC reads as parameters.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from headrace import __version__
from headrace.lineage import PACKAGE, code_digest, code_files, stage_modules
from headrace.models.protocol import KINDS
from headrace.project import CODE_LOCK, EMBEDDING_CATBOOST

_EVALUATE = "data/evaluate"
_SHA256 = "sha256:"
_HEADER = """\
# The pipeline: the only list of stages. `dvc repro` (or `headrace repro`) and the flow of
# `headrace run` both read it. Code dependencies are written by `headrace upgrade`.
"""


def pipeline_text(
    *,
    inputs: Sequence[str],
    metric_files: Sequence[str],
    example: bool,
    databases: bool,
    models: Sequence[str],
    embedding_catboost: bool,
    source: bool,
) -> str:
    """Return the text of dvc.yaml.

    Args:
        inputs: files and folders that ``extract`` reads, relative to the project, recipe included.
        metric_files: files of ``evaluate.user_metrics``, relative to the project.
        example: whether a ``raw`` stage materialises the example.
        databases: whether a ``watermark`` stage looks into databases.
        models: the models to train; only their kinds' code matters here.
        embedding_catboost: whether the stage of that name fits trees on what ``nn`` says.
        source: whether code is listed file by file (source tree) or stands in headrace.lock.
    """
    stages: dict[str, Any] = {}
    if example:
        stages["raw"] = _stage("raw", deps=[], outs=["data/raw"])
    if databases:
        stages["watermark"] = _stage(
            "watermark", deps=[], outs=["data/watermark"], params=["extract"], always_changed=True
        )
    watermark = ["data/watermark"] if databases else []
    stages["extract"] = _stage("extract", deps=[*inputs, *watermark], outs=["data/extract"])
    stages["reduce"] = _stage("reduce", deps=["data/extract"], outs=["data/reduce"])
    stages["encode"] = _stage("encode", deps=["data/reduce"], outs=["data/encode"])
    stages["train"] = {
        "matrix": {"model": "${models}"},
        **_stage(
            "train@${item.model}",
            deps=["data/reduce", "data/encode"],
            outs=["data/train/${item.model}"],
            params=["train.${item.model}"],
        ),
    }
    if embedding_catboost:
        stages[EMBEDDING_CATBOOST] = _stage(
            EMBEDDING_CATBOOST,
            deps=["data/reduce", "data/encode", "data/train/nn"],
            outs=[f"data/train/{EMBEDDING_CATBOOST}"],
        )
    stages["stack"] = _stage(
        "stack", deps=["data/reduce", "data/train"], outs=["data/stack"], params=["models", "stack"]
    )
    stages["decide"] = _stage(
        "decide",
        deps=["data/reduce", "data/train", "data/stack"],
        outs=["data/decide"],
        params=["models", "decide"],
    )
    stages["interpret"] = _stage(
        "interpret",
        deps=["data/reduce", "data/encode", "data/train", "data/stack"],
        outs=["data/interpret"],
        params=["models", "interpret"],
    )
    stages["evaluate"] = _stage(
        "evaluate",
        deps=[
            "data/extract/profile.json",
            "data/reduce",
            "data/train",
            "data/stack",
            "data/decide",
            "data/interpret",
            *metric_files,
        ],
        outs=[f"{_EVALUATE}/{name}" for name in EVALUATE_OUTS],
        params=["models", "evaluate"],
        metrics=[{f"{_EVALUATE}/metrics.json": {"cache": False}}],
    )
    stages["publish"] = _stage(
        "publish",
        deps=["data/reduce", "data/encode", "data/train", "data/stack", "data/decide"],
        outs=["data/publish"],
        params=["models", "publish"],
    )
    for name, stage in stages.items():
        if source:
            stage["deps"] = [*stage["deps"], *_code_paths(name, models)]
        else:
            key = "train.${item.model}" if name == "train" else name
            stage["params"] = [*stage["params"], {CODE_LOCK: [f"stages.{key}"]}]
    # One template for all plot files: whatever targets and models there are, they are x over y.
    pipeline = {"plots": [{f"{_EVALUATE}/plots": {"x": "x", "y": "y"}}], "stages": stages}
    text: str = yaml.safe_dump(pipeline, sort_keys=False, width=100, allow_unicode=True)
    return _HEADER + text


EVALUATE_OUTS = (
    "checks.json",
    "comparison.json",
    "decisions.json",
    "errors.json",
    "figures",
    "manifest.json",
    "pairs.csv",
    "plots",
    "report.html",
    "resamples.parquet",
)


def code_lock_text(stages: Sequence[str]) -> str:
    """Return the text of headrace.lock: one code digest per stage, per kind of model for ``train``.

    Kinds that are not trained now are named, too, so that ``models`` can be edited freely.
    """
    digests: dict[str, Any] = {name: _lock_digest(name) for name in stages}
    digests["train"] = {name: _lock_digest(f"train@{name}") for name in KINDS}
    content = {"headrace": __version__, "stages": dict(sorted(digests.items()))}
    text: str = yaml.safe_dump(content, sort_keys=False)
    return (
        "# Digests of the installed code, stage by stage; refreshed by `headrace upgrade`.\n" + text
    )


def locked_digest(content: Any, stage: str) -> str | None:
    """Return the digest that headrace.lock (parsed) names for ``stage``, if it names one."""
    found = content.get("stages") or {}
    for part in stage.split("@"):
        found = found.get(part) if isinstance(found, dict) else None
    return found.removeprefix(_SHA256) if isinstance(found, str) else None


def _lock_digest(stage: str) -> str:
    # The prefix keeps a digest such as 0b59... from being taken for a number by YAML readers.
    return f"{_SHA256}{code_digest(*stage_modules(stage))}"


def _stage(
    name: str,
    *,
    deps: Sequence[str],
    outs: Sequence[str],
    params: Sequence[str] | None = None,
    metrics: Sequence[Any] = (),
    always_changed: bool = False,
) -> dict[str, Any]:
    stage: dict[str, Any] = {
        "cmd": f"headrace stage {name}",
        "deps": list(deps),
        "params": list(params or [name]),
        "outs": list(outs),
    }
    if metrics:
        stage["metrics"] = list(metrics)
    if always_changed:
        stage["always_changed"] = True
    return stage


def _code_paths(stage: str, models: Sequence[str]) -> list[str]:
    """Paths of the code of ``stage`` as dvc.yaml of the source tree lists them."""
    if stage != "train":
        return [_path(file) for file in code_files(*stage_modules(stage))]
    # A matrix has one list of dependencies for all its models: the model's own module is templated,
    # what any of them imports is shared. So a change in the training loop reruns all models.
    own = {PACKAGE / "models" / f"{model}.py" for model in models}
    shared = set(code_files(*(m for model in models for m in stage_modules(f"train@{model}"))))
    prefix = _path(PACKAGE / "models")
    return [*sorted(_path(file) for file in shared - own), f"{prefix}/${{item.model}}.py"]


def _path(file: Path) -> str:
    return file.relative_to(PACKAGE.parents[1]).as_posix()


# --- the folder around the pipeline --------------------------------------------------------------

DVC_CONFIG = """\
[core]
    analytics = false
    check_update = false
[cache]
    type = "hardlink,copy"
"""
DVC_GITIGNORE = "/config.local\n/tmp\n/cache\n"
DVC_IGNORE = """\
# Not data: DVC need not look inside.
/.venv
/.headrace
/.prefect
/mlruns
"""
_IGNORED = (
    "/.headrace/",
    "/.prefect/",
    "/.venv/",
    "/mlflow.db*",
    "/mlruns/",
    "/catboost_info/",
    *(f"/data/{stage}" for stage in ("extract", "reduce", "encode", "train", "stack")),
    *(f"/data/{stage}" for stage in ("decide", "interpret", "publish")),
    "/data/watermark",
    f"/{_EVALUATE}/*",
    f"!/{_EVALUATE}/metrics.json",
)


def gitignore_text(present: str) -> str:
    """Return ``present``, the text of a .gitignore, with the lines that a project needs added."""
    known = {line.strip() for line in present.splitlines()}
    missing = [line for line in _IGNORED if line not in known]
    if "/data/" in known:  # all of it is out of git already
        missing = [line for line in missing if "/data" not in line]
    if not missing:
        return present
    start = present if not present or present.endswith("\n") else f"{present}\n"
    return start + "\n".join(missing) + "\n"


def dvc_files(*, with_git: bool) -> dict[str, str]:
    """Return the files that make a folder a DVC project, by relative path.

    They are what ``dvc init`` writes (``--subdir`` or ``--no-scm`` as needed), with telemetry off
    and outs linked instead of copied. Without git the ignored local settings say so.
    """
    files = {
        ".dvc/config": DVC_CONFIG,
        ".dvc/.gitignore": DVC_GITIGNORE,
        ".dvcignore": DVC_IGNORE,
    }
    if not with_git:
        files[".dvc/config.local"] = "[core]\n    no_scm = true\n"
    return files
