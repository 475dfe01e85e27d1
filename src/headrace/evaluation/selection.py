"""Honest selection: which rows rank the models, which fit the blend, and which judge its gain.

- The single models are ranked on **valid** rows; the first is the best single.
- The blend is fitted on **out-of-fold** predictions of train rows, by the models that have them.
  Models that have none (one model for all folds, a second-level model) are ranked beside the
  others, and are not in the blend. Nor is one that tells no more than a constant: by luck a
  search gives random predictions a small weight (by ROC-AUC on 2,000 rows: in 4 trials of 10).
- The blend is chosen if the interval of its gain over the best single excludes 0, on the rows it
  was fitted on, but *cross-fitted*: each fold is predicted by the blend fitted on the other folds.
  So neither the members nor the weights were fitted on labels that judge them (8 similar models,
  1,000 rows, mean of 60 trials: gain in RMSE by the very rows of the fit 0.037, cross-fitted 0.033,
  on fresh rows 0.032; on 200 rows 0.049, 0.031, 0.037). A trace is left: the members that predict
  the other folds have learnt from the fold that is judged. Only a nested scheme, with a fit per
  pair of folds, would be rid of it. A best single that has no out-of-fold predictions is compared
  on valid rows, which the blend has not seen either.

Where no model has out-of-fold predictions, valid rows do all three: the blend is fitted on them,
cross-fitted over fifths of the resampling units. Test rows never enter.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from headrace.errors import DataError, IntegrityError
from headrace.evaluation.blend import LinearBlend, MeanBlend, rounded
from headrace.evaluation.bootstrap import (
    Interval,
    Resampling,
    Units,
    bootstrap,
    difference,
    estimate,
    fewest_resamples,
)
from headrace.evaluation.metrics import Metric, MetricName, Sample, score
from headrace.schema import Contract, Task
from headrace.storage import read_json

Floats: TypeAlias = npt.NDArray[np.float64]
AnyBlend: TypeAlias = MeanBlend | LinearBlend
FitBlend: TypeAlias = Callable[[Mapping[str, Sample]], AnyBlend]
RowsName = Literal["out_of_fold", "valid"]

SELECTION = "selection.json"
STACK = "stack"  # the blend's name wherever models are named
NUM_PARTS = 5  # of valid rows, for cross-fitting on them
# What a constant prediction scores at most, by a metric that asks only what a model tells apart.
_OF_CONSTANT: Mapping[Task, tuple[MetricName, float]] = {
    "regression": ("r2", 0.0),
    "binary": ("roc_auc", 0.5),
    "multiclass": ("macro_roc_auc", 0.5),
}
_NUM_RESAMPLES = 200  # for that question; macro ROC-AUC of many classes is slow
_TITLES: Mapping[RowsName, str] = {"out_of_fold": "out-of-fold rows", "valid": "valid rows"}


@dataclass(frozen=True)
class LabelledRows:
    """The models' predictions of the same labelled rows, which none of them was fitted on.

    ``fold`` (N,) says which rows a blend is fitted without when it predicts them.
    """

    name: RowsName
    samples: Mapping[str, Sample]
    units: Units
    fold: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """What was chosen for one target, and why.

    Values of the blend are cross-fitted on the rows that it was fitted on.
    """

    metric: Metric
    ranking: tuple[tuple[str, float], ...]  # single models on valid rows, best first
    out_of_fold: Mapping[str, float]  # those that have it, and STACK; empty where none has
    blend: AnyBlend
    blend_value: float  # on valid rows
    fitted_on: RowsName
    compared_only: tuple[str, ...]  # models without the predictions that the blend is fitted on
    uninformed: tuple[str, ...]  # models that tell no more than a constant
    chosen: str  # a member, or STACK
    reason: str
    gain: Interval  # of the blend over the best single model; positive is better

    @property
    def best_single(self) -> str:
        """The best single model."""
        return self.ranking[0][0]


def choose(
    valid: LabelledRows,
    out_of_fold: LabelledRows | None,
    metric: Metric,
    fit: FitBlend,
    resampling: Resampling,
    *,
    target: str,
    never_blended: Collection[str] = (),
) -> Choice:
    """Return the blend, and whether it or the best single model is chosen.

    ``out_of_fold`` holds the models that predict train rows out of fold, None if there are none.
    ``never_blended`` are models that valid rows rank but do not blend either.

    Raises:
        DataError: if the metric is not defined on these rows.
    """
    values = _values(valid, metric, target)
    sign = 1 if metric.higher_is_better else -1
    # sorted is stable: of equal models the one named first in params.yaml leads.
    ranking = tuple(sorted(values.items(), key=lambda item: -sign * item[1]))
    best = ranking[0][0]
    rows = _without(valid, never_blended) if out_of_fold is None else out_of_fold
    of_train = {} if out_of_fold is None else _values(out_of_fold, metric, target)
    informed = _informed(rows, resampling)
    blend = fit(informed.samples)
    honest = _cross_fitted(informed, fit)
    blended = honest
    if out_of_fold is not None:
        blended = _blended(valid, blend)
        of_train = {**of_train, STACK: score(metric.name, honest)}
    if isinstance(blend, MeanBlend) and blend.members == (best,):
        chosen, gain = best, Interval(0.0, None, None)
        reason = _why_alone(best, valid, rows)
    elif best in rows.samples:
        chosen, reason, gain = _decide(best, rows, honest, metric, resampling)
    else:
        chosen, reason, gain = _decide(best, valid, blended, metric, resampling)
    return Choice(
        metric=metric,
        ranking=ranking,
        out_of_fold=of_train,
        blend=blend,
        blend_value=score(metric.name, blended),
        fitted_on=rows.name,
        compared_only=tuple(name for name in valid.samples if name not in rows.samples),
        uninformed=tuple(name for name in rows.samples if name not in informed.samples),
        chosen=chosen,
        reason=reason,
        gain=gain,
    )


def choice_json(choice: Choice) -> dict[str, Any]:
    """Return one target's entry of selection.json."""

    def on_both(model: str, value: float) -> dict[str, float | None]:
        return {"valid": rounded(value), "out_of_fold": rounded(choice.out_of_fold.get(model))}

    return {
        "metric": choice.metric.name,
        "higher_is_better": choice.metric.higher_is_better,
        "rows": choice.fitted_on,
        "ranking": [{"model": model, **on_both(model, value)} for model, value in choice.ranking],
        "best_single": choice.best_single,
        "compared_only": list(choice.compared_only),
        "uninformed": list(choice.uninformed),
        "blend": choice.blend.model_dump(mode="json"),
        "blend_value": on_both(STACK, choice.blend_value),
        "chosen": choice.chosen,
        "reason": choice.reason,
        "gain": {
            "value": rounded(choice.gain.value),
            "ci_low": rounded(choice.gain.low),
            "ci_high": rounded(choice.gain.high),
        },
    }


def read_selection(
    stack: Path, contract: Contract, members: Mapping[str, Path]
) -> dict[str, Mapping[str, Any]]:
    """Return the entry of each target in selection.json.

    Raises:
        IntegrityError: if it is of another format, or made from other models or targets.
    """
    path = stack / SELECTION
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 2:
        raise IntegrityError(f"{path} is not a selection of format 2; run `headrace repro`")
    targets: dict[str, Mapping[str, Any]] = content["targets"]
    wanted = [target.name for target in contract.targets]
    if sorted(targets) != sorted(wanted):
        raise IntegrityError(
            f"{path} is for the targets {sorted(targets)}, the table has {sorted(wanted)}; "
            f"run `headrace repro`"
        )
    for name, entry in targets.items():
        ranked = sorted(line["model"] for line in entry["ranking"])
        if ranked != sorted(members):
            raise IntegrityError(
                f"{path}, target {name!r}, was made from the models {ranked}, params.yaml has "
                f"{sorted(members)}; run `headrace repro`"
            )
    return targets


def _values(rows: LabelledRows, metric: Metric, target: str) -> dict[str, float]:
    values = {model: score(metric.name, sample) for model, sample in rows.samples.items()}
    if not all(np.isfinite(value) for value in values.values()):
        raise DataError(
            f"target {target!r}: {metric.title} is not defined on the {_TITLES[rows.name]} "
            f"({metric.undefined}), so no model can be chosen by it; set "
            f"`stack.metric.{target}` to another metric, or change `extract.split`"
        )
    return values


def _without(rows: LabelledRows, names: Collection[str]) -> LabelledRows:
    return replace(rows, samples={n: one for n, one in rows.samples.items() if n not in names})


def _informed(rows: LabelledRows, resampling: Resampling) -> LabelledRows:
    """Leave out what is not surely better than a constant and surely worse than the best."""
    enough = max(_NUM_RESAMPLES, fewest_resamples(resampling.confidence))
    few = replace(resampling, num_resamples=min(resampling.num_resamples, enough))
    metric, of_constant = _OF_CONSTANT[next(iter(rows.samples.values())).task]
    scored = {
        name: bootstrap(sample, rows.units, few, threshold=0.5, only=metric)
        for name, sample in rows.samples.items()
    }
    best = max(scored, key=lambda name: scored[name].points[metric])

    def is_kept(name: str) -> bool:
        found = estimate(metric, scored[name], rows.units, few)
        if found.low is None or found.low > of_constant:
            return True
        behind = difference(metric, scored[name], scored[best], rows.units, few)
        return behind.high is None or behind.high >= 0

    return replace(rows, samples={n: sample for n, sample in rows.samples.items() if is_kept(n)})


def _blended(rows: LabelledRows, blend: AnyBlend) -> Sample:
    values = blend.of({model: sample.prediction for model, sample in rows.samples.items()})
    return replace(next(iter(rows.samples.values())), prediction=values)


def _cross_fitted(rows: LabelledRows, fit: FitBlend) -> Sample:
    """Return each fold's rows as the blend fitted on the other folds predicts them."""
    folds = np.unique(rows.fold)
    if len(folds) == 1:  # one resampling unit: there will be no interval either
        return _blended(rows, fit(rows.samples))
    values = np.empty_like(next(iter(rows.samples.values())).prediction)
    for fold in folds:
        is_own = rows.fold == fold
        blend = fit({model: sample.where(~is_own) for model, sample in rows.samples.items()})
        own = {model: sample.prediction[is_own] for model, sample in rows.samples.items()}
        values[is_own] = blend.of(own)
    return replace(next(iter(rows.samples.values())), prediction=values)


def _why_alone(best: str, valid: LabelledRows, rows: LabelledRows) -> str:
    """Return why the best single model is its own blend."""
    if len(valid.samples) == 1:
        return "the only model"
    if len(rows.samples) == 1:
        return f"{best} leads on the valid rows, and no other model has out-of-fold predictions"
    return f"no blend beats {best} on the {_TITLES[rows.name]}"


def _decide(
    best: str, rows: LabelledRows, blended: Sample, metric: Metric, resampling: Resampling
) -> tuple[str, str, Interval]:
    """Return the model to use, why, and the blend's gain over the best single on ``rows``."""
    where, units = _TITLES[rows.name], rows.units
    scored = {
        name: bootstrap(sample, units, resampling, threshold=0.5, only=metric.name)
        for name, sample in ((best, rows.samples[best]), (STACK, blended))
    }
    change = difference(metric.name, scored[STACK], scored[best], units, resampling)
    gain = change if metric.higher_is_better else change.negated()
    of_blend = f"the blend's gain over {best} on the {where}"
    if gain.value is None or gain.low is None or gain.high is None:
        return best, f"{of_blend} has no interval ({gain.reason})", gain
    share = f"{resampling.confidence:.0%} interval over {units.count} {units.name}s"
    text = f"{gain.value:.3g} [{gain.low:.3g}, {gain.high:.3g}] in {metric.title}, {share}"
    if gain.low > 0:
        return STACK, f"the blend gains on {best} on the {where}: {text}", gain
    return best, f"{of_blend} {'includes 0' if gain.high >= 0 else 'is below 0'}: {text}", gain
