"""Bagging: which rows each model of a bag is fitted on, and their mean as one model.

By default each fold gets a model fitted on the other folds. It predicts the rows of its own fold,
so every train row has a prediction by a model that has not seen it (out-of-fold). One more model is
fitted on all folds. Rows outside train get the mean of that one, with weight 2/3, and of the folds'
models: these bring the gain of a bag, but each has seen only a part of the rows. (On the valid rows
of California housing, three seeds, a stack of two bags gains .0005 over halves.) A bag reads like
one model wherever models are used.

Within the rows it is fitted on, each model of a fold holds some back for early stopping, never
those it is scored on: the last fold of a time split, a whole fold of a grouped one, else a tenth of
the rows by a hash of their id, another tenth for each model. The model of all folds holds none
back: it is trained as long as the others were (the median), so it learns from every row, of a time
split also from the latest. Networks on California housing come to an RMSE of .435 by the folds'
models, of .434 with one that holds back a tenth, and of .431 with one of all rows.

Source of the scheme: Breiman 1996, "Bagging Predictors"; "cross-validated committees", Parmanto et
al. 1996.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from headrace.errors import DataError
from headrace.models.protocol import FittedModel, StopRows, TrainViews, Values
from headrace.schema import Contract

if TYPE_CHECKING:
    from headrace.data.encoder import EncodedBatch

Bag = Literal["folds", "bootstrap", "none"]

WHOLE = "whole"  # the member that is fitted on all folds
_WHOLE_SHARE = 2 / 3  # of its prediction in that of the bag
_STOP_SHARE = 0.1
# Seeds of the hashes: apart from each other and from those of a model's own samples.
_STOP_SEED, _DRAW_SEED = 1_000_003, 2_000_003


@dataclass(frozen=True)
class FitPlan:
    """One fit of a bag: its name, the rows it may look at, and the fold that it predicts."""

    name: str  # of its folder; empty for a model that is no bag
    views: TrainViews
    scored: int | None  # None: no train row


class BaggedModel:
    """Models of one kind, fitted on different rows; the prediction is their weighted mean."""

    def __init__(self, members: Mapping[str, FittedModel]) -> None:
        self.members = dict(members)
        first = next(iter(self.members.values()))
        self.kind = first.kind
        self.inputs = first.inputs

    @property
    def weights(self) -> Mapping[str, float]:
        """What each member counts in a prediction of rows outside train; they add up to 1."""
        num_others = len(self.members) - (WHOLE in self.members)
        each = (1.0 - _WHOLE_SHARE if WHOLE in self.members else 1.0) / num_others
        return {name: _WHOLE_SHARE if name == WHOLE else each for name in self.members}

    @property
    def summary(self) -> Mapping[str, Any]:
        """What each member says, by its name."""
        return {name: dict(member.summary) for name, member in self.members.items()}

    @property
    def tuned(self) -> Mapping[str, float]:
        """The median of what the members' stop rows settled."""
        told = [member.tuned for name, member in self.members.items() if name != WHOLE]
        return {name: float(np.median([one[name] for one in told])) for name in told[0]}

    def predict(self, rows: "EncodedBatch | pa.Table") -> Values:
        """Return the mean of the members' values or probabilities; see ``FittedModel``."""
        told = [member.predict(rows) for member in self.members.values()]
        weights = list(self.weights.values())
        return {
            target: np.average([one[target] for one in told], axis=0, weights=weights)
            for target in told[0]
        }

    def save(self, folder: Path) -> None:
        """Write each member into a folder of its own."""
        for name, member in self.members.items():
            (folder / name).mkdir()
            member.save(folder / name)


def fit_plans(
    table: Path,
    encoded: Path,
    cache: Path,
    contract: Contract,
    folds: Sequence[int],
    *,
    bag: Bag,
    stop_rows: Literal["inner", "valid"],
    needs_stop_rows: bool,
) -> tuple[FitPlan, ...]:
    """Return the fits that make one model of ``folds``, the folds that train rows have.

    ``needs_stop_rows`` lets the fit on all folds hold rows back like the others.

    Raises:
        DataError: if there are too few folds to hold any back.
    """
    by_fold = contract.split is None or contract.split.kind in ("time", "grouped")
    least = 1 + (bag != "none") + (by_fold and stop_rows == "inner")
    if len(folds) < least:
        raise DataError(
            f"the train rows have the folds {list(folds)}, but a model needs at least {least}: one "
            f"to learn from{', one to stop on' if by_fold and stop_rows == 'inner' else ''}"
            f"{', one to predict' if bag != 'none' else ''}; set `extract.folds` to {least} or more"
        )

    def views(allowed: tuple[int, ...], number: int) -> TrainViews:
        stop = _stop_rows(contract, allowed, number) if stop_rows == "inner" else StopRows("valid")
        draw = _DRAW_SEED + number if bag == "bootstrap" else None
        return TrainViews(table, encoded, cache, contract, allowed, stop, draw)

    whole = views(tuple(folds), len(folds))
    if bag == "none":
        return (FitPlan("", whole, None),)
    if stop_rows == "inner" and not needs_stop_rows:
        whole = replace(whole, stop=StopRows("none"))
    of_folds = [
        FitPlan(member_name(fold), views(tuple(f for f in folds if f != fold), fold), fold)
        for fold in folds
    ]
    return (*of_folds, FitPlan(WHOLE, whole, None))


def member_name(fold: int) -> str:
    """Return the name of the member of a bag that has not seen ``fold``."""
    return f"fold-{fold}"


def _stop_rows(contract: Contract, allowed: tuple[int, ...], number: int) -> StopRows:
    kind = None if contract.split is None else contract.split.kind
    if kind in (None, "time"):
        return StopRows("fold", fold=max(allowed))
    if kind == "grouped":
        return StopRows("fold", fold=allowed[number % len(allowed)])
    return StopRows("share", share=_STOP_SHARE, seed=_STOP_SEED + number)
