"""Metrics of one's own: a plain numpy function of (truth, prediction, weights), in a project file.

It is called once for the rows and once for each resample, with that resample's counts as weights:
a row drawn twice weighs double, one not drawn weighs 0. So the interval and paired differences are
those of any other metric, and the price is known: ``num_resamples`` + 1 calls for each model and
target. Only one call runs at a time, as a function may not bear more.

A function that fails, or has no finite value for the rows themselves, ends the stage: a metric that
somebody asked for is never left out in silence. Without a finite value on a resample it counts as
undefined there, as any metric does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from headrace.errors import ConfigError, nearest
from headrace.evaluation.bootstrap import Resampling, Scored, Units, counts
from headrace.evaluation.metrics import METRICS, Metric, Sample
from headrace.evaluation.streaming import NEEDS_ROWS
from headrace.params import Section
from headrace.schema import Target

Floats: TypeAlias = npt.NDArray[np.float64]
Function: TypeAlias = Callable[[Floats, Floats, Floats], float]

_KEY = "evaluate.user_metrics"
_CHUNK = 16  # resamples whose counts are held at a time


class UserMetricParams(Section):
    """One entry of ``evaluate.user_metrics``: where the function is, and which way is better."""

    # FILE.py:FUNCTION, the file inside the project
    function: Annotated[str, Field(pattern=r"^[^:]+\.py:[A-Za-z_][A-Za-z0-9_]*$")]
    higher_is_better: bool
    targets: Annotated[tuple[str, ...], Field(strict=False)] = ()  # none named: all

    @field_validator("function")
    @classmethod
    def _file_is_inside(cls, function: str) -> str:
        path = Path(function.rpartition(":")[0])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{path} must lie inside the project, where DVC and git track it")
        return function

    @property
    def file(self) -> str:
        """The file that defines the function, relative to the project."""
        return self.function.rpartition(":")[0]


@dataclass(frozen=True)
class UserMetric:
    """A metric and the function that computes it; ``source`` is where params.yaml says it is."""

    metric: Metric
    function: Function
    source: str


def refuse_names(names: Iterable[str]) -> None:
    """Check that no user metric is called like one that there is; for params.

    Raises:
        ValueError: with the names.
    """
    known = {metric.name for metrics in METRICS.values() for metric in metrics}
    if taken := sorted(known.intersection(names)):
        raise ValueError(f"{', '.join(taken)}: headrace has metrics of these names; choose others")


def load_user_metrics(
    root: Path, params: Mapping[str, UserMetricParams], targets: Sequence[Target]
) -> dict[str, tuple[UserMetric, ...]]:
    """Return the user's metrics of each target; their files are relative to ``root``.

    Raises:
        ConfigError: a file or function that is not there, a file that fails, or an unknown target.
    """
    names = [target.name for target in targets]
    found: dict[str, tuple[UserMetric, ...]] = dict.fromkeys(names, ())
    modules: dict[str, ModuleType] = {}
    for name, one in params.items():
        if unknown := [target for target in one.targets if target not in names]:
            raise ConfigError(
                f"`{_KEY}.{name}.targets`: there is no target {unknown[0]!r}"
                f"{nearest(unknown[0], names)}; targets: {', '.join(names)}"
            )
        if one.file not in modules:
            modules[one.file] = _module(root / one.file, f"`{_KEY}.{name}`")
        loaded = _loaded(name, one, modules[one.file])
        for target in one.targets or names:
            found[target] = (*found[target], loaded)
    return found


def score_user_metrics(
    metrics: Sequence[UserMetric],
    scored: Scored,
    sample: Sample,
    units: Units,
    resampling: Resampling,
    *,
    who: str,
) -> Scored:
    """Return ``scored`` with the user's metrics; ``who`` is model and target, for messages.

    Raises:
        ConfigError: a function that fails, or that has no finite value for the rows.
    """
    if not metrics:
        return scored
    weight = np.ones(len(sample.truth)) if sample.weight is None else sample.weight
    points = {one.metric.name: _value(one, sample, weight, who=who) for one in metrics}
    for one in metrics:
        if not np.isfinite(points[one.metric.name]):
            raise ConfigError(
                f"{_called(one)} gave {points[one.metric.name]} for {who}, {len(weight)} rows; a "
                f"metric needs a finite value there: mend it, or name its `targets`"
            )
    values = {name: np.empty(resampling.num_resamples) for name in points}
    for first in range(0, resampling.num_resamples, _CHUNK):
        num_resamples = min(_CHUNK, resampling.num_resamples - first)
        drawn = counts(units, resampling, first=first, num_resamples=num_resamples)
        for number, count_U in enumerate(drawn, start=first):
            drawn_weight = count_U[units.of_row] * weight
            for one in metrics:
                told = f"{who}, resample {number}"
                values[one.metric.name][number] = _value(one, sample, drawn_weight, who=told)
    return replace(
        scored, points={**scored.points, **points}, resamples={**scored.resamples, **values}
    )


def without_rows(metrics: Sequence[UserMetric], scored: Scored) -> Scored:
    """Return ``scored`` with the user's metrics as undefined: a stream has no rows to give."""
    names = [one.metric.name for one in metrics]
    num_resamples = len(next(iter(scored.resamples.values())))
    return replace(
        scored,
        points={**scored.points, **dict.fromkeys(names, np.nan)},
        resamples={**scored.resamples, **dict.fromkeys(names, np.full(num_resamples, np.nan))},
        no_interval={**scored.no_interval, **dict.fromkeys(names, NEEDS_ROWS)},
    )


def _module(path: Path, key: str) -> ModuleType:
    """Run the file as a module; no compiled copy is left beside it."""
    if not path.is_file():
        raise ConfigError(f"{key}: {path} does not exist; write the function into it")
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:  # whatever the user's file does
        raise ConfigError(f"{key}: {path} fails: {type(error).__name__}: {error}") from error
    return module


def _loaded(name: str, params: UserMetricParams, module: ModuleType) -> UserMetric:
    wanted = params.function.rpartition(":")[2]
    function: Any = getattr(module, wanted, None)
    if not callable(function):
        defined = [key for key, value in vars(module).items() if callable(value)]
        raise ConfigError(
            f"`{_KEY}.{name}`: {params.file} has no function {wanted!r}{nearest(wanted, defined)}"
        )
    told = (function.__doc__ or "").strip().partition("\n")[0]
    metric = Metric(
        name,
        name,
        params.higher_is_better,
        told or f"of {params.function}",
        f"{params.function} gave no finite value",
    )
    return UserMetric(metric, function, params.function)


def _value(one: UserMetric, sample: Sample, weight: Floats, *, who: str) -> float:
    arrays = [_read_only(values) for values in (sample.truth, sample.prediction, weight)]
    try:
        with np.errstate(all="ignore"):  # of an undefined value the result tells
            found = one.function(*arrays)
        return float(found)
    except Exception as error:  # whatever the user's function does
        raise ConfigError(
            f"{_called(one)} failed for {who}: {type(error).__name__}: {error}; it takes truth, "
            f"prediction and weights and returns one number, NaN where it is not defined"
        ) from error


def _read_only(values: Floats) -> Floats:
    view = values.view()
    view.flags.writeable = False
    return view


def _called(one: UserMetric) -> str:
    return f"the user metric {one.metric.name!r} ({one.source})"
