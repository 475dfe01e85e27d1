"""Weighted and class-balanced sampling, as pure arithmetic like ``order``.

Rows come with replacement, so an epoch has as many places as one says, by default as many as the
set has rows. Which row stands at a place is a function of (seed, epoch, place): restarting costs
nothing, and ranks and workers divide the places as they do in any order.

``weighted``: the sum of all weights is cut into as many equal strata as there are places, the
strata come in random order, and each draws one point from its own. So a row's expected count is
its share of the weights times the places, and its count is never 2 or more away from that; with
equal weights every row comes once. Points drawn evenly (one offset for all strata) would bring the
distance below 1, but then rows whose weights repeat with a pattern come and go together: of two
classes that alternate in the table an epoch could hold one alone. In memory: a sum per 64 rows.

``balanced``: the classes of one target in turn, so any run of places holds each class equally
often, to within one. Each class goes through its rows in random order, and through all of them
before any comes again, over epochs too. Rows without a label never come; classes without rows
neither. In memory: a ``Selection`` per class, and per batch a little time for each class.

Rows are drawn by their weight, so weights must not count again in the loss.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.data.encoder import open_encoder
from headrace.data.order import Places, key_word, permuted
from headrace.data.selection import Selection
from headrace.data.shards import Shards, open_shards
from headrace.errors import ConfigError, DataError, nearest
from headrace.kernels.order import WEIGHT_ROWS, cycled, draw_weighted, weight_sums

Weights: TypeAlias = Sequence[npt.NDArray[np.float32]]  # of each shard, in order

_FEW_ROWS = 256  # up to here a class draws its whole order anew for each batch
_DRAW, _CLASS = 3, 4  # what a key is for


class Sampling(Protocol):
    """Which rows come when; like a ``RowOrder``, with row numbers of the whole split."""

    kind: str
    num_rows: int

    def rows(self, epoch: int, start: int, stop: int) -> Places:
        """Return the rows that stand at the places ``start`` to ``stop`` of an epoch."""
        ...


class WeightedOrder:
    """Rows come in proportion to their weight; one of weight 0 never comes.

    Args:
        weights: opens the weights, float32 of every row, an array per shard (mapped files, say);
            called again in each process.
        seed: of the draws.
        chosen: the rows to draw from; all if None.
        num_rows: places of an epoch; as many as there are rows to draw from if None.
        name: what messages call the rows.

    Raises:
        DataError: if a weight is negative or not finite, or if there is none above 0.
        ConfigError: if ``num_rows`` is below 1.
    """

    kind = "weighted"

    def __init__(
        self,
        weights: Callable[[], Weights],
        *,
        seed: int,
        chosen: Selection | None = None,
        num_rows: int | None = None,
        name: str = "the rows",
    ) -> None:
        self._seed = seed
        self._open = weights
        self._weights = list[npt.NDArray[np.float32]]()
        self._addresses = np.empty(0, np.uint64)
        self._words = np.zeros(0, np.uint64) if chosen is None else chosen.words()
        addresses = self._opened()
        sizes = [len(part) for part in self._weights]
        self._starts = _starts(sizes)
        self._blocks = _starts([-(-size // WEIGHT_ROWS) for size in sizes])
        self.num_rows = _places(num_rows, sum(sizes) if chosen is None else len(chosen))
        sums = np.empty(int(self._blocks[-1]))
        for shard, address in enumerate(addresses):
            first = int(self._starts[shard])
            _refuse_bad(self._weights[shard], first, chosen, name)
            begin, end = self._blocks[shard : shard + 2].tolist()
            weight_sums(address, sizes[shard], first, self._words, sums[begin:end])
        self._sums = np.concatenate([np.zeros(1), np.cumsum(sums)])
        if not self._sums[-1] > 0:
            raise DataError(
                f"all weights of {name} are 0, so none of them can be drawn; correct the weight "
                f"column in the recipe, or sample without weights"
            )

    def rows(self, epoch: int, start: int, stop: int) -> Places:
        """Return the rows that stand at the places ``start`` to ``stop`` of an epoch."""
        places = np.arange(start, stop, dtype=np.int64)
        strata = permuted(places, self.num_rows, (self._seed, epoch, 0))
        out = np.empty(len(places), np.int64)
        draw_weighted(
            places,
            strata,
            key_word((self._seed, epoch, _DRAW)),
            self.num_rows,
            self._sums,
            self._blocks,
            self._starts,
            self._opened(),
            self._words,
            out,
        )
        return out

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": [], "_addresses": np.empty(0, np.uint64)}

    def _opened(self) -> npt.NDArray[np.uint64]:
        if not self._weights:
            self._weights = [np.ascontiguousarray(part, np.float32) for part in self._open()]
            self._addresses = np.array([part.ctypes.data for part in self._weights], np.uint64)
        return self._addresses


class BalancedOrder:
    """Rows of each class equally often.

    Args:
        classes: the rows of each class; those without rows do not take part.
        seed: of the order within each class.
        num_rows: places of an epoch; as many as there are rows in all classes if None.
        name: what messages call the classes.

    Raises:
        DataError: if fewer than two classes have rows.
        ConfigError: if ``num_rows`` is below 1.
    """

    kind = "balanced"

    def __init__(
        self,
        classes: Sequence[Selection],
        *,
        seed: int,
        num_rows: int | None = None,
        name: str = "the classes",
    ) -> None:
        self.classes = [rows for rows in classes if len(rows)]
        if len(self.classes) < 2:
            raise DataError(
                f"{name} cannot be balanced: the classes have {[len(rows) for rows in classes]} "
                f"rows, and two of them must have some; read other rows or another target"
            )
        self._seed = seed
        self.num_rows = _places(num_rows, sum(len(rows) for rows in self.classes))

    def rows(self, epoch: int, start: int, stop: int) -> Places:
        """Return the rows that stand at the places ``start`` to ``stop`` of an epoch."""
        first = epoch * self.num_rows + start  # epochs are cut from one endless round of classes
        out = np.empty(stop - start, np.int64)
        for number, members in enumerate(self.classes):
            lead = (number - first) % len(self.classes)
            mine = out[lead :: len(self.classes)]
            draw = (first + lead) // len(self.classes)
            mine[:] = members.rows(self._drawn(number, len(members), draw, len(mine)))
        return out

    def _drawn(self, number: int, num_rows: int, first: int, count: int) -> Places:
        key = (self._seed, _CLASS + number)
        if num_rows <= _FEW_ROWS:
            out = np.empty(count, np.int64)
            cycled(first, num_rows, key_word(key), out)
            return out
        parts = [np.empty(0, np.int64)]
        stop = first + count
        while first < stop:
            cycle, place = divmod(first, num_rows)
            end = min(num_rows, place + stop - first)
            parts.append(permuted(np.arange(place, end), num_rows, (*key, cycle)))
            first += end - place
        return np.concatenate(parts)


@dataclass(frozen=True)
class MappedColumn:
    """Opens one column of a split, an array per shard; for a process of its own to call."""

    folder: Path
    split: str
    name: str

    def __call__(self) -> Sequence[npt.NDArray[Any]]:
        """Return the column of each shard, mapped and checked."""
        shards = open_shards(self.folder, self.split)
        return [shards.column(self.name, shard) for shard in range(len(shards.sizes))]


def sampled(
    sampling: str,
    shards: Shards,
    *,
    seed: int,
    chosen: Selection | None = None,
    num_rows: int | None = None,
) -> Sampling:
    """Return the order that ``sampling`` names: ``weighted``, or ``balanced:TARGET``.

    ``chosen``: the rows to draw from, all if None; ``num_rows``: places of an epoch.

    Raises:
        ConfigError: if there is no such sampling, or the target is unknown or has no classes.
        DataError: if the weights or the classes do not allow it.
    """
    kind, _, target = sampling.partition(":")
    name = f"split {shards.split!r} of {shards.folder}"
    if kind == "weighted" and not target:
        weights = MappedColumn(shards.folder, shards.split, "weight")
        return WeightedOrder(weights, seed=seed, chosen=chosen, num_rows=num_rows, name=name)
    if kind != "balanced" or not target:
        raise ConfigError(
            f"sampling is {sampling!r}; it must be 'weighted', or 'balanced:' and the name of a "
            f"target with classes"
        )
    classes = _classes(shards, target, chosen)
    return BalancedOrder(classes, seed=seed, num_rows=num_rows, name=f"target {target!r} in {name}")


def _classes(shards: Shards, name: str, chosen: Selection | None) -> list[Selection]:
    targets = open_encoder(shards.folder).targets
    place = next((i for i, target in enumerate(targets) if target.name == name), None)
    with_classes = [target.name for target in targets if target.labels]
    if place is None or not targets[place].labels:
        what = "is not there" if place is None else "is a regression and has no classes"
        raise ConfigError(
            f"sampling is 'balanced:{name}', but that target {what}; targets with classes in "
            f"{shards.folder}: {', '.join(with_classes) or 'none'}{nearest(name, with_classes)}"
        )
    num_classes = len(targets[place].labels)
    code = np.full(shards.num_rows, -1, np.min_scalar_type(-num_classes))
    first = 0
    for shard, size in enumerate(shards.sizes):
        value = shards.column("targets", shard)[:, place]
        code[first : first + size] = np.where(np.isnan(value), -1, value)
        first += size
    if chosen is not None:
        code[~chosen.mask(0, len(code))] = -1
    return [Selection.from_mask(code == number) for number in range(num_classes)]


def _refuse_bad(
    weight: npt.NDArray[np.float32], first: int, chosen: Selection | None, name: str
) -> None:
    is_bad = ~((weight >= 0) & (weight < np.inf))
    if chosen is not None and is_bad.any():
        is_bad &= chosen.mask(first, first + len(weight))
    if is_bad.any():
        row = int(np.flatnonzero(is_bad)[0])
        raise DataError(
            f"{int(is_bad.sum())} weights of {name} cannot be used, the first of them "
            f"{weight[row]} in row {first + row}; a weight is a finite number of at least 0: "
            f"correct the weight column in the recipe"
        )


def _places(asked: int | None, num_rows: int) -> int:
    if asked is not None and asked < 1:
        raise ConfigError(f"an epoch of {asked} rows was asked for; it must be at least 1")
    return num_rows if asked is None else asked


def _starts(sizes: Sequence[int]) -> Places:
    return np.array([*accumulate(sizes, initial=0)], np.int64)
