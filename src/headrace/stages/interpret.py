"""Stage ``interpret``: what the models' predictions hang on, by rows no model was fitted on.

Permutation importances of every model with intervals, SHAP values of trees, attention of a TabNet,
and of each target's best single model the partial dependence on its most important columns, those
whose interval excludes 0. All is measured on a sample of valid rows: they set no weight of any
model (one with ``stop_rows: valid`` has stopped by them). Test rows are not read. ``evaluate``
brings it into the report.

It is a stage of its own, for what it costs to run again. Within ``train`` another grouping of
columns would train again. Within ``evaluate``, which holds predictions and no model, every change
of an interval would ask all models again, and evaluate would need torch and catboost.

Rows, values on a grid and shuffles are bounded, whatever the size of the table. So is the work of
wide tables, large bags and many models: single fits read 100 million values for the importances,
with more to read fewer rows are judged, but 200 at least: 500 numbers take 5 CPU seconds per fit of
trees. SHAP takes half a millisecond per tree. With 24 numbers, 9 categories, two targets, one fit
of catboost (400 trees), one of nn and a bag of the baseline, all of it takes 9 CPU seconds, a third
of them imports.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import pyarrow as pa
from pydantic import Field

from headrace.data.encoder import Encoder, open_encoder
from headrace.data.table import open_table
from headrace.data.truth import Truth, read_truth
from headrace.errors import ConfigError, IntegrityError, nearest
from headrace.evaluation.blend import rounded
from headrace.evaluation.bootstrap import Interval, Resampling, Units
from headrace.models.bagging import WHOLE, BaggedModel
from headrace.models.dependence import Dependence, partial_dependence
from headrace.models.importance import (
    TOGETHER,
    Alike,
    Importances,
    JudgedRows,
    alike_columns,
    most_important,
    permutation_importances,
)
from headrace.models.probe import Predict, asked_with_tables
from headrace.models.protocol import MODEL_JSON, FittedModel, load_model
from headrace.params import Resources
from headrace.record import Recorder
from headrace.schema import Contract
from headrace.stages.resampled import ResampledParams
from headrace.storage import new_folder, read_json, verify_file, verify_folder, write_json

if TYPE_CHECKING:
    from headrace.models.attention import TabnetModel

IMPORTANCES, SHAP = "importances.json", "shap.json"
ATTENTION, DEPENDENCE = "attention.json", "dependence.json"
_SELECTION = "selection.json"
_VALUES = 100_000_000  # that single fits read for the importances of all models
_LEAST_ROWS = 200
_SHAP_ROWS, _SHAP_COLUMNS, _SHAP_POINTS = 500, 10, 200
_ATTENTION_ROWS = 1000
_DEPENDENCE_ROWS, _GRID, _LINES = 500, 20, 10


class InterpretParams(ResampledParams):
    """Section ``interpret`` of params.yaml: how much is asked, and which columns go together."""

    rows: Annotated[int, Field(ge=_LEAST_ROWS, le=5000)] = 2000  # of valid that are judged, at most
    repeats: Annotated[int, Field(ge=2, le=20)] = 5  # shuffles of each column
    # Columns that are shuffled together, by the name of the group. Numbers whose rank correlation
    # is above .9 are grouped without being named here.
    groups: dict[str, Annotated[tuple[str, ...], Field(min_length=2, strict=False)]] = Field(
        default_factory=dict
    )
    top: Annotated[int, Field(ge=0, le=30)] = 6  # columns whose partial dependence is drawn
    num_resamples: Annotated[int, Field(ge=100, le=10_000)] = 500


@dataclass(frozen=True)
class Interpreted:
    """The most important columns of each target's best single model; printable."""

    most: Mapping[str, tuple[str, Mapping[str, Interval]]]  # target → model, its importances
    num_rows: int

    def __str__(self) -> str:
        """One line per target."""
        lines = [
            f"{target}  {model}  {', '.join(most_important(found, 5)) or 'no column matters'}"
            for target, (model, found) in self.most.items()
        ]
        return "\n".join([*lines, f"by {self.num_rows} valid rows"])


def interpret(
    table: Path,
    encoded: Path,
    members: Mapping[str, Path],
    stack: Path,
    out: Path,
    params: InterpretParams,
    *,
    resources: Resources,
    recorder: Recorder,
) -> Interpreted:
    """Ask the fitted ``members`` about valid rows and changed ones.

    Writes importances.json, shap.json, attention.json and dependence.json.

    Raises:
        ConfigError: if a group names a column that models do not learn from.
        DataError: if there are no valid rows.
        IntegrityError: if an input is damaged.
    """
    source = open_table(table)
    contract = source.contract
    for folder in members.values():
        verify_folder(folder)
    best = _best_singles(verify_file(stack, _SELECTION))
    encoder = open_encoder(encoded)
    _refuse_unknown(params.groups, contract)
    truth = read_truth(source, "valid", unit=params.unit, key="interpret.unit")
    recorder.dataset(
        "valid", path=table, digest=truth.digest, num_rows=len(truth.row_id), context="valid"
    )
    inputs = source.first("valid", contract.features, params.rows)
    alike = alike_columns(inputs, contract.named("numeric"))
    groups = _groups(params.groups, alike)
    rows = _judged(inputs, truth, _num_rows(params, contract, groups, members))
    resampling = Resampling(params.num_resamples, params.confidence, params.seed, resources.threads)
    told = _Told({}, {}, {}, {})
    for name, folder in members.items():
        recorder.progress(len(told.importances), len(members), unit="models", detail=name)
        model = load_model(folder)
        own = [target for target, single in best.items() if single == name]
        _ask(name, model, encoder, rows, groups, own, contract, params, resampling, told)
    with new_folder(out) as folder:
        _write(folder, told, rows, groups, alike, params)
    found = Interpreted(
        {
            target: (name, told.importances[name][target])
            for target, name in best.items()
            if target in told.importances[name]
        },
        len(rows),
    )
    _record(found, alike, groups, recorder)
    return found


@dataclass
class _Told:
    """What the models said so far: by model, but the dependence, which is by target."""

    importances: dict[str, Importances]
    shap: dict[str, Any]
    attention: dict[str, Any]
    dependence: dict[str, Any]


def _ask(
    name: str,
    model: FittedModel,
    encoder: Encoder,
    rows: JudgedRows,
    groups: Mapping[str, Sequence[str]],
    best_of: Sequence[str],
    contract: Contract,
    params: InterpretParams,
    resampling: Resampling,
    told: _Told,
) -> None:
    """Add what ``model`` says; ``best_of`` are the targets whose best single model it is."""
    predict = asked_with_tables(model, encoder)
    shuffled = {column: (column,) for column in contract.features} | dict(groups)
    found = permutation_importances(
        predict, rows, contract.targets, shuffled, repeats=params.repeats, resampling=resampling
    )
    told.importances[name] = found
    if model.kind in ("catboost", "embedding_catboost"):
        from headrace.models.shap import shap_summary

        told.shap[name] = shap_summary(
            model,
            rows.inputs.slice(0, _SHAP_ROWS),
            categories=contract.named("category"),
            num_columns=_SHAP_COLUMNS,
            num_points=_SHAP_POINTS,
        )
    if model.kind == "tabnet":
        told.attention[name] = _attention(model, encoder, rows.inputs, contract)
    for target in best_of:
        singles = {c: found[target][c] for c in contract.features} if target in found else {}
        columns = most_important(singles, params.top)
        told.dependence[target] = {
            "model": name,
            "columns": list(_dependences(predict, rows.inputs, columns, target, contract)),
        }


def _attention(
    model: FittedModel, encoder: Encoder, inputs: pa.Table, contract: Contract
) -> dict[str, Any]:
    """Return what one fit looks at: of a bag the one of all folds, for steps differ by fit."""
    from headrace.models.attention_figures import attention_json

    fit = model.members[WHOLE] if isinstance(model, BaggedModel) else model
    encoded = encoder.transform(inputs.slice(0, _ATTENTION_ROWS))
    explanation = cast("TabnetModel", fit).explain(encoded)
    return attention_json(explanation, fit.predict(encoded), contract.targets)


def _dependences(
    predict: Predict, inputs: pa.Table, columns: Sequence[str], target: str, contract: Contract
) -> Iterator[dict[str, Any]]:
    for column in columns:
        found = partial_dependence(
            predict,
            inputs.slice(0, _DEPENDENCE_ROWS),
            column,
            is_numeric=contract.column(column).role == "numeric",
            grid_size=_GRID,
            num_lines=_LINES,
        )
        if found is not None:
            yield _dependence_json(found, target, contract)


def _dependence_json(found: Dependence, target: str, contract: Contract) -> dict[str, Any]:
    means_GO = found.means[target]
    lines_LG = found.lines.get(target, np.empty((0, 0)))
    return {
        "column": found.column,
        "note": contract.column(found.column).note,
        "is_numeric": found.is_numeric,
        "grid": list(found.grid),
        "means": [[rounded(value) for value in curve] for curve in means_GO.T.tolist()],
        "lines": [[rounded(value) for value in line] for line in lines_LG.tolist()],
    }


def _write(
    folder: Path,
    told: _Told,
    rows: JudgedRows,
    groups: Mapping[str, Sequence[str]],
    alike: Sequence[Alike],
    params: InterpretParams,
) -> None:
    write_json(
        folder / IMPORTANCES,
        {
            "format": 1,
            "split": "valid",
            "num_rows": len(rows),
            "repeats": params.repeats,
            "num_resamples": params.num_resamples,
            "confidence": params.confidence,
            "unit": rows.units.name,
            "num_units": rows.units.count,
            "groups": {name: list(columns) for name, columns in groups.items()},
            "alike": [
                {"columns": list(one.columns), "correlation": round(one.correlation, 4)}
                for one in alike
            ],
            "models": {
                model: {
                    target: {name: _interval_json(one) for name, one in of_target.items()}
                    for target, of_target in found.items()
                }
                for model, found in told.importances.items()
            },
        },
    )
    num_shap = min(len(rows), _SHAP_ROWS)
    write_json(folder / SHAP, {"format": 1, "num_rows": num_shap, "models": told.shap})
    num_attention = min(len(rows), _ATTENTION_ROWS)
    write_json(
        folder / ATTENTION, {"format": 1, "num_rows": num_attention, "models": told.attention}
    )
    num_dependence = min(len(rows), _DEPENDENCE_ROWS)
    write_json(
        folder / DEPENDENCE, {"format": 1, "num_rows": num_dependence, "targets": told.dependence}
    )


def _record(
    found: Interpreted,
    alike: Sequence[Alike],
    groups: Mapping[str, Sequence[str]],
    recorder: Recorder,
) -> None:
    for target, (model, importances) in found.most.items():
        most = ", ".join(most_important(importances, 5)) or "none"
        recorder.note(f"**{target}**: what {model} uses most: {most}")
    for one in alike:
        name = next(n for n, columns in groups.items() if set(one.columns) <= set(columns))
        recorder.note(
            f"The columns {', '.join(one.columns)} go together (rank correlation above "
            f"{TOGETHER:g}), so each alone looks less important than it is; they are also shuffled "
            f"together, as {name!r}: `interpret.groups` gives the group another name"
        )


def _best_singles(path: Path) -> dict[str, str]:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != 2:
        raise IntegrityError(f"{path} is not a selection of format 2; run `headrace repro`")
    return {target: entry["best_single"] for target, entry in content["targets"].items()}


def _refuse_unknown(groups: Mapping[str, Sequence[str]], contract: Contract) -> None:
    for group, columns in groups.items():
        unknown = [name for name in columns if name not in contract.features]
        if unknown:
            raise ConfigError(
                f"`interpret.groups.{group}` names {unknown}, which no model learns from"
                f"{nearest(unknown[0], contract.features)}"
            )
        if group in contract.features:
            raise ConfigError(
                f"`interpret.groups.{group}` is called like a column; give the group another name"
            )


def _groups(
    declared: Mapping[str, Sequence[str]], alike: Sequence[Alike]
) -> dict[str, tuple[str, ...]]:
    """Return the declared groups, and those of columns alike that no declared one holds whole."""
    groups = {name: tuple(columns) for name, columns in declared.items()}
    for one in alike:
        if not any(set(one.columns) <= set(columns) for columns in declared.values()):
            groups[" + ".join(one.columns)] = one.columns
    return groups


def _num_rows(
    params: InterpretParams,
    contract: Contract,
    groups: Mapping[str, Sequence[str]],
    members: Mapping[str, Path],
) -> int:
    """Return how many rows are judged: fewer where there are many columns or fits to ask."""
    fits = sum(len(read_json(path / MODEL_JSON)["members"] or [""]) for path in members.values())
    num_columns = len(contract.features)
    values_per_row = (num_columns + len(groups)) * params.repeats * num_columns * fits
    return min(params.rows, max(_LEAST_ROWS, _VALUES // values_per_row))


def _judged(inputs: pa.Table, truth: Truth, count: int) -> JudgedRows:
    inputs = inputs.slice(0, count)
    places = slice(0, inputs.num_rows)
    units = Units(truth.unit, truth.unit_of_row, len(np.unique(truth.unit_of_row)))
    is_first = np.arange(len(truth.row_id)) < inputs.num_rows
    return JudgedRows(
        inputs=inputs,
        labels={target: labels[places] for target, labels in truth.labels.items()},
        weight=None if truth.weight is None else truth.weight[places],
        units=units.of(is_first),
    )


def _interval_json(one: Interval) -> dict[str, float | None]:
    def short(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.6g}")

    return {"value": short(one.value), "ci_low": short(one.low), "ci_high": short(one.high)}
