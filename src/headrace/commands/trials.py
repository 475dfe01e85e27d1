"""The trials of one search: what each tries, and what is kept of it.

A trial is a folder ``trial-0007`` below that of the search: ``point.json`` before it is fitted,
``result.json`` when it has ended. So a search that was killed knows what was under way, and takes
it up with the checkpoints beside it. The first trial is params.yaml as it is, what the others have
to beat.

What a trial tries is a pure function of the seed, its number and the trials before it, whether or
not the search was stopped in between: a sampler that is seeded once would start over with the same
points. TPE is Optuna's, told all finished trials anew each time; there is no second store.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from headrace.commands.space import Point, Range, Space
from headrace.errors import ConfigError
from headrace.storage import canonical_json, read_json, write_json

if TYPE_CHECKING:
    import optuna

Method = Literal["grid", "random", "tpe"]
METHODS: tuple[Method, ...] = ("tpe", "random", "grid")

POINT, RESULT = "point.json", "result.json"
_REDRAWS = 1000  # until a point is new; a small space may be used up
_MOST_GRID_POINTS = 1_000_000
_FORMAT = 1


@dataclass(frozen=True)
class Trial:
    """One trial that has ended: its point, and its score or what stopped it.

    ``resamples`` (B,) of the score are the same draws for every trial, which pairs them; None
    stands for one without a value.
    """

    number: int
    point: Point
    state: Literal["finished", "failed"]
    seconds: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    resamples: tuple[float | None, ...] = ()
    error: str = ""

    @property
    def name(self) -> str:
        """Name of its folder and of its run."""
        return trial_name(self.number)


def trial_name(number: int) -> str:
    """Return the name of a trial.

    >>> trial_name(7)
    'trial-0007'
    """
    return f"trial-{number:04d}"


def write_point(folder: Path, point: Point) -> None:
    """Keep what a trial tries, before it is tried."""
    write_json(folder / POINT, {"format": _FORMAT, "point": point})


def write_trial(folder: Path, trial: Trial) -> None:
    """Keep what became of a trial."""
    write_json(folder / RESULT, {"format": _FORMAT, **asdict(trial)})


def read_trials(search: Path, space: Space) -> tuple[list[Trial], dict[int, Point]]:
    """Return the trials that have ended, in their order, and the points of those that have not."""

    def in_order(point: Point) -> Point:  # JSON has them by name
        return {name: point[name] for name in space.params}

    ended: list[Trial] = []
    begun: dict[int, Point] = {}
    for folder in sorted(search.glob("trial-*")):
        if (folder / RESULT).is_file():
            content = read_json(folder / RESULT)
            del content["format"]
            resamples, point = tuple(content["resamples"]), in_order(content["point"])
            ended.append(Trial(**content | {"resamples": resamples, "point": point}))
        elif (folder / POINT).is_file():
            number = int(folder.name.removeprefix("trial-"))
            begun[number] = in_order(read_json(folder / POINT)["point"])
    return ended, begun


def propose(
    space: Space,
    method: Method,
    number: int,
    ended: Sequence[Trial],
    *,
    seed: int,
    is_higher_better: bool,
) -> Point | None:
    """Return the point of trial ``number`` (from 1), None if every point has been tried.

    Raises:
        ConfigError: a grid of a space that is continuous, or of too many points.
    """
    tried = {canonical_json(trial.point) for trial in ended}
    if method == "grid":
        return _next_of_grid(space, tried, seed=seed)
    rng = np.random.default_rng([seed, number])
    if method == "tpe":
        found = _by_tpe(space, ended, seed=int(rng.integers(2**32)), is_higher=is_higher_better)
        if canonical_json(found) not in tried:
            return found
    for _ in range(_REDRAWS):
        found = space.draw(rng)
        if canonical_json(found) not in tried:
            return found
    return None


def _next_of_grid(space: Space, tried: set[str], *, seed: int) -> Point | None:
    """Return the next point in a random order, so that a grid cut short still covers the space."""
    num_points = space.require_grid()
    if num_points > _MOST_GRID_POINTS:
        raise ConfigError(
            f"the grid of `search.{space.model}` has {num_points:,} points, and at most "
            f"{_MOST_GRID_POINTS:,} are stepped through; search with --method random or tpe"
        )
    for number in np.random.default_rng(seed).permutation(num_points).tolist():
        point = space.point(number)
        if canonical_json(point) not in tried:
            return point
    return None


def _by_tpe(space: Space, ended: Sequence[Trial], *, seed: int, is_higher: bool) -> Point:
    import optuna

    with _quiet():
        study = optuna.create_study(
            direction="maximize" if is_higher else "minimize",
            sampler=optuna.samplers.TPESampler(seed=seed),
        )
        distributions = {name: _distribution(one) for name, one in space.params.items()}
        for trial in ended:
            if (told := _as_told(space, trial, distributions)) is not None:
                study.add_trial(told)
        asked = study.ask(distributions).params
    point: Point = {}
    for name, one in space.params.items():
        point[name] = one.rounded(asked[name]) if isinstance(one, Range) else one[asked[name]]
    return point


def _distribution(one: Range | tuple[Any, ...]) -> "optuna.distributions.BaseDistribution":
    """Return the distribution of one parameter; a choice goes by its place in the list."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(one, Range):
        return CategoricalDistribution(range(len(one)))
    high = one.high
    if one.step is not None and one.num_values is not None:
        high = one.value(one.num_values - 1)
    if one.is_whole:
        return IntDistribution(int(one.low), int(high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(float(one.low), float(high), log=one.log, step=one.step)


def _as_told(
    space: Space,
    trial: Trial,
    distributions: "Mapping[str, optuna.distributions.BaseDistribution]",
) -> "optuna.trial.FrozenTrial | None":
    """Return a trial as Optuna knows it; None if it failed or lies outside the space."""
    import optuna

    if trial.value is None:
        return None
    values: dict[str, Any] = {}
    for name, one in space.params.items():
        value = trial.point[name]
        if isinstance(one, Range):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not one.low <= value <= one.high:
                return None
            values[name] = value
        elif value in one:
            values[name] = one.index(value)
        else:
            return None
    return optuna.trial.create_trial(
        params=values, distributions=dict(distributions), value=trial.value
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's remarks off the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def method_of(name: str) -> Method:
    """Return the method called ``name``.

    Raises:
        ConfigError: if there is none.
    """
    if name not in METHODS:
        raise ConfigError(f"--method {name}: there are the methods {', '.join(METHODS)}")
    return name
