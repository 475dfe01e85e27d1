"""The space that ``headrace search MODEL`` looks through: section ``search.MODEL`` of params.yaml.

A parameter of the model, by its path below ``train.MODEL``, stands beside a list of choices or a
range. All is checked before anything is fitted: a parameter that the model does not have, and every
choice or end of a range that it refuses. What is refused only beside other settings (momentum
without sgd, say) fails the trials that meet, and no others.

What decides on which rows a model is scored (``bag``, ``stop_rows``) is no part of a space, for the
scores could not be compared; nor is ``seed``, for the best of many seeds is luck.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import ValidationError, model_validator

from headrace.errors import ConfigError
from headrace.params import Section, describe_fault, parse_section

Point: TypeAlias = dict[str, Any]  # path of a parameter -> its value

_FIXED = {
    "bag": "it decides on which rows a model is scored, so scores could not be compared",
    "stop_rows": "it decides on which rows a model is scored, so scores could not be compared",
    "seed": "the best of many seeds is luck; keep one, and tell the spread over seeds beside it",
}
_DIGITS = 6  # of a number drawn from a range: more say nothing and make params.yaml hard to read


class Range(Section):
    """Numbers from ``low`` to ``high``, both included."""

    low: int | float
    high: int | float
    log: bool = False  # equal factors are equally likely, not equal distances
    step: int | float | None = None  # from one value to the next; None: 1 for int, any for float
    type: Literal["int", "float"] | None = None  # None: int if low, high and step are whole

    @model_validator(mode="after")
    def _range_holds_something(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}; low must be the smaller")
        if self.log and self.low <= 0:
            raise ValueError(f"log is true and low is {self.low}; a log range starts above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; leave one out")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError(f"step is {self.step}; it must be above 0 and at most high - low")
        if self.type == "int" and not all(isinstance(one, int) for one in self._numbers):
            raise ValueError("type is int, but low, high or step is not written as a whole number")
        return self

    @property
    def _numbers(self) -> list[int | float]:
        return [one for one in (self.low, self.high, self.step) if one is not None]

    @property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.type != "float" and all(isinstance(one, int) for one in self._numbers)

    @property
    def num_values(self) -> int | None:
        """How many values the range has; None if it is continuous."""
        if self.step is None and not self.is_whole:
            return None
        return math.floor((self.high - self.low) / (self.step or 1) + 1e-9) + 1

    def value(self, number: int) -> int | float:
        """Return the value at place ``number`` of a range that is not continuous."""
        found = self.low + number * (self.step or 1)
        return self.rounded(found)

    def draw(self, rng: np.random.Generator) -> int | float:
        """Return a random value."""
        if self.num_values is not None and not self.log:
            return self.value(int(rng.integers(self.num_values)))
        share = rng.random()
        if self.log:
            found = math.exp(math.log(self.low) + share * math.log(self.high / self.low))
        else:
            found = self.low + share * (self.high - self.low)
        return self.rounded(found)

    def rounded(self, value: float) -> int | float:
        """Return ``value`` with few digits, within the range."""
        few = round(value) if self.is_whole else float(f"{value:.{_DIGITS}g}")
        inside = min(max(few, self.low), self.high)
        return int(inside) if self.is_whole else float(inside)


@dataclass(frozen=True)
class Space:
    """What is tried: per parameter a range, or the choices in their order."""

    model: str
    params: Mapping[str, Range | tuple[Any, ...]]

    @property
    def num_points(self) -> int | None:
        """How many points the space has; None if a range is continuous."""
        sizes = [_size(one) for one in self.params.values()]
        return None if None in sizes else math.prod(size for size in sizes if size is not None)

    def require_grid(self) -> int:
        """Return the number of points.

        Raises:
            ConfigError: if a range is continuous, naming all that are.
        """
        endless = [name for name, one in self.params.items() if _size(one) is None]
        if endless:
            named = ", ".join(f"`search.{self.model}.{name}`" for name in endless)
            raise ConfigError(
                f"a grid needs values to step through, and {named} is a continuous range; give it "
                f"a `step` or a list of choices, or search with --method random or tpe"
            )
        assert self.num_points is not None
        return self.num_points

    def point(self, number: int) -> Point:
        """Return one point of a grid; the last parameter changes fastest."""
        values: Point = {}
        for name, one in reversed([*self.params.items()]):
            number, place = divmod(number, _size(one) or 1)
            values[name] = one.value(place) if isinstance(one, Range) else one[place]
        return {name: values[name] for name in self.params}

    def draw(self, rng: np.random.Generator) -> Point:
        """Return a random point."""
        return {
            name: one.draw(rng) if isinstance(one, Range) else one[int(rng.integers(len(one)))]
            for name, one in self.params.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the space as JSON values."""
        return {
            name: one.model_dump(mode="json") if isinstance(one, Range) else list(one)
            for name, one in self.params.items()
        }


def read_space(
    raw: object, model: str, kind: type[Section], base: Mapping[str, Any], path: Path
) -> Space:
    """Check section ``search.MODEL`` of params.yaml, which lies at ``path``.

    ``kind`` is the section of the model and ``base`` what params.yaml says there.

    Raises:
        ConfigError: with every parameter that the model does not have, with the nearest name, and
            every value that it refuses.
    """
    key = f"search.{model}"
    if not isinstance(raw, Mapping) or not raw:
        raise ConfigError(
            f"{path}: section `{key}` says nothing to search; name parameters of {model}, each "
            f"with a list of choices or a range, such as `{next(iter(kind.model_fields))}: "
            f"[…]` or `{{low: 1, high: 8}}`"
        )
    params = {str(name): _read_one(one, f"{key}.{name}", path) for name, one in raw.items()}
    faults = [
        fault
        for name, one in params.items()
        for fault in (_fixed(name, key) or _refused(name, one, key, kind, base))
    ]
    if faults:
        raise ConfigError(f"{path}: {'; '.join(dict.fromkeys(faults))}")
    return Space(model, params)


def with_point(base: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """Return what params.yaml says of a model, with the values of ``point`` in their places.

    >>> with_point({"lr": 1, "plateau": {"factor": 2}}, {"plateau.patience": 3})
    {'lr': 1, 'plateau': {'factor': 2, 'patience': 3}}
    """
    changed = dict(base)
    for name, value in point.items():
        first, _, rest = name.partition(".")
        if rest:
            below = changed.get(first)
            value = with_point(below if isinstance(below, Mapping) else {}, {rest: value})
        changed[first] = value
    return changed


def value_at(section: Mapping[str, Any], name: str) -> Any:
    """Return the value at a path of a dumped section; None where there is none."""
    first, _, rest = name.partition(".")
    value = section.get(first)
    if not rest:
        return value
    return value_at(value, rest) if isinstance(value, Mapping) else None


def _size(one: Range | Sequence[Any]) -> int | None:
    if isinstance(one, Range):
        return None if one.log and not one.is_whole else one.num_values
    return len(one)


def _read_one(raw: object, key: str, path: Path) -> Range | tuple[Any, ...]:
    if isinstance(raw, Mapping):
        return parse_section(Range, raw, key=key, path=path)
    if not isinstance(raw, list) or not raw:
        raise ConfigError(
            f"{path}: `{key}` is {raw!r}; give a list of choices such as [1, 2], or a range such "
            f"as {{low: 1, high: 8}}"
        )
    twice = [one for place, one in enumerate(raw) if one in raw[:place]]
    if twice:
        raise ConfigError(f"{path}: `{key}` names {twice[0]!r} twice; keep one")
    return tuple(raw)


def _fixed(name: str, key: str) -> list[str]:
    return [f"`{key}.{name}` cannot be searched: {_FIXED[name]}"] if name in _FIXED else []


def _refused(
    name: str,
    one: Range | tuple[Any, ...],
    key: str,
    kind: type[Section],
    base: Mapping[str, Any],
) -> Iterator[str]:
    """Say which values of one parameter no model of this kind can have."""
    values = (one.low, one.high) if isinstance(one, Range) else one
    own = tuple(name.split("."))
    for value in values:
        value = one.rounded(value) if isinstance(one, Range) else value
        try:
            kind.model_validate(with_point(base, {name: value}))
        except ValidationError as error:
            for fault in error.errors():
                is_rule = fault["type"] == "value_error" and isinstance(fault["input"], Mapping)
                if fault["loc"][: len(own)] == own and not is_rule:
                    yield describe_fault(fault, kind, key)
