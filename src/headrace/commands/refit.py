"""Fitting a model outside of the pipeline: in a scratch folder, with its predictions in memory.

What the stages do, without their outs: ``data/`` and dvc.lock stay as they are. The fits resume
from the checkpoints of their scratch folder, as those of a stage do.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from headrace.commands.pipeline import changes, read_dag
from headrace.data.predictions import Predictions, read_predictions
from headrace.data.table import Table, open_table
from headrace.models.bagging import BaggedModel, FitPlan
from headrace.models.protocol import SECOND_LEVEL
from headrace.params import Resources, Section
from headrace.project import EMBEDDING_CATBOOST, PIPELINE, Project
from headrace.record import Recorder, Scalar
from headrace.stages.train import fit_all, predictions_of

_PROGRESS_S = 0.2


@dataclass(frozen=True)
class Inputs:
    """What a model is fitted on: folders as the stages write them, and the cache of frames."""

    table: Path
    encoded: Path
    cache: Path
    network: Path | None = None  # out of train@nn, for a model that it feeds

    @property
    def folders(self) -> list[Path]:
        """The folders that the result depends on."""
        return [self.table, self.encoded, *([self.network] if self.network else [])]


def project_inputs(project: Project, model: str) -> Inputs:
    """Return what the stage of ``model`` reads in ``project``."""
    network = project.data("train@nn") if model in SECOND_LEVEL else None
    return Inputs(project.data("reduce"), project.data("encode"), project.cache, network)


def warn_of_stale(project: Project, stages: Sequence[str], console: Console) -> None:
    """Say which of ``stages``, whose outs are read, are not up to date with params.yaml.

    Raises:
        DependencyError: if DVC cannot tell, because a stage is running.
    """
    if not (project.root / PIPELINE).is_file() or not (project.root / ".dvc").is_dir():
        return
    changed = changes(project, read_dag(project))
    if stale := [stage for stage in stages if stage in changed]:
        verb = "is" if len(stale) == 1 else "are"
        told = (
            f"warning: {', '.join(stale)} {verb} not up to date (`headrace why` says what changed)"
        )
        console.print(f"{told}; fitted is what lies in data/", markup=False, highlight=False)


def refit(
    inputs: Inputs,
    model: str,
    params: Section,
    plans: tuple[FitPlan, ...],
    scratch: Path,
    *,
    split: str,
    resources: Resources,
    recorder: Recorder,
) -> dict[str, Predictions]:
    """Fit ``model`` as ``plans`` say and predict, per target, the rows of ``split``.

    Train rows, which only a bag predicts, are each predicted by the fit that has not seen its fold.
    """
    table = open_table(inputs.table)
    if model in SECOND_LEVEL:
        return _second_level(inputs, table, params, scratch, split, resources, recorder)
    fits = fit_all(plans, params, model, table, scratch / "fits", resources, recorder)
    members = {plan.name: fitted for plan, fitted in fits}
    whole = members[""] if "" in members else BaggedModel(members)
    found = predictions_of(whole, plans, model, table, inputs.encoded, (split,), recorder)
    return {one.target: one for one in found}


def _second_level(
    inputs: Inputs,
    table: Table,
    params: Section,
    scratch: Path,
    split: str,
    resources: Resources,
    recorder: Recorder,
) -> dict[str, Predictions]:
    from headrace.models.embedding_catboost import EmbeddingCatboostParams
    from headrace.stages.embedding_catboost import embedding_catboost

    assert isinstance(params, EmbeddingCatboostParams)
    assert inputs.network is not None
    out = scratch / EMBEDDING_CATBOOST
    embedding_catboost(
        inputs.table,
        inputs.encoded,
        inputs.network,
        out,
        params,
        cache=inputs.cache,
        checkpoints=scratch / "fits",
        resources=resources,
        recorder=recorder,
    )
    return {
        target.name: read_predictions(out, target).of_split(split)
        for target in table.contract.targets
    }


class Hushed:
    """A recorder for one of many fits: it tells warnings, each once, and how far the fit is."""

    def __init__(
        self, *, on_warning: Callable[[str], None], on_progress: Callable[[str], None]
    ) -> None:
        self._on_warning = on_warning
        self._on_progress = on_progress
        self._told: set[str] = set()
        self._progress_told = 0.0

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Keep nothing."""

    def metrics(self, values: Mapping[str, float], *, step: int | None = None) -> None:
        """Keep nothing."""

    def file(self, path: Path, *, folder: str = "") -> None:
        """Keep nothing."""

    def dataset(self, name: str, *, path: Path, digest: str, num_rows: int, context: str) -> None:
        """Keep nothing."""

    def note(self, text: str) -> None:
        """Keep nothing."""

    def warn(self, text: str) -> None:
        """Tell a warning that was not told before."""
        if text not in self._told:
            self._told.add(text)
            self._on_warning(text)

    def progress(self, done: int, total: int | None, *, unit: str, detail: str = "") -> None:
        """Tell how far the fit is, at most five times a second."""
        now = time.monotonic()
        if now - self._progress_told >= _PROGRESS_S:
            self._progress_told = now
            whole = "" if total is None else f" of {total:,}"
            self._on_progress(f"{done:,}{whole} {unit}{f', {detail}' if detail else ''}")


def told_on(status: Status, name: str) -> Callable[[str], None]:
    """Return what tells, on the last line of a terminal, how far ``name`` is."""
    return lambda far: status.update(f"{name}: {far}")


def say_nothing(_: str) -> None:
    """Listen to a recorder of which nobody wants to hear."""
