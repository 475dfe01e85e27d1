"""What the stage ``interpret`` found, and the worst errors, as sections of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import IntegrityError
from headrace.evaluation.interpretation_charts import (
    correlation_chart,
    dependence_chart,
    importance_chart,
    mask_chart,
    ranked_shares,
    shap_chart,
)
from headrace.evaluation.page import Cell, Section, Table
from headrace.schema import Contract, Target
from headrace.storage import read_json, verify_folder

Content = dict[str, Any]

_FILES = ("importances", "shap", "attention", "dependence")
_SHOWN = 15  # columns in a table


@dataclass(frozen=True)
class Interpretation:
    """The files of ``interpret``, parsed: see ``stages/interpret.py``."""

    importances: Content
    shap: Content
    attention: Content
    dependence: Content

    def best_single(self, target: str) -> str:
        """Return the target's best single model."""
        model: str = self.dependence["targets"][target]["model"]
        return model

    def ranked(self, target: str) -> list[str]:
        """Return columns and groups, first those whose shuffling costs the best single model most.

        Empty for a target without a label among the judged rows.
        """
        found = self.importances["models"][self.best_single(target)].get(target, {})
        return sorted(found, key=lambda name: (-(found[name]["value"] or 0), name))

    def most(self, target: str, count: int) -> list[str]:
        """Return the single columns that matter most."""
        groups = self.importances["groups"]
        return [name for name in self.ranked(target) if name not in groups][:count]


def read_interpretation(folder: Path) -> Interpretation:
    """Read what ``interpret`` wrote.

    Raises:
        IntegrityError: if it is missing, damaged or of another format.
    """
    if not folder.is_dir():
        raise IntegrityError(f"{folder} does not exist; run `headrace repro` to make it")
    verify_folder(folder)
    content = {name: read_json(folder / f"{name}.json") for name in _FILES}
    other = [name for name, one in content.items() if one.get("format") != 1]
    if other:
        raise IntegrityError(
            f"{folder}: {', '.join(other)} have another format than 1; run `headrace repro`"
        )
    return Interpretation(**content)


def interpretation_sections(
    found: Interpretation, target: Target, contract: Contract, models: Sequence[str]
) -> list[Section]:
    """Return what is known of one target: importances with SHAP values, partial dependence.

    ``models`` are those of the report, in its order, which is that of their colours.
    """
    sections = [_importance_section(found, target, models)] if found.ranked(target.name) else []
    entries = found.dependence["targets"][target.name]["columns"]
    return [*sections, _dependence_section(found, target, contract)] if entries else sections


def attention_section(found: Interpretation) -> Section | None:
    """Return what a tabnet looks at, for all targets together; None if there is none."""
    models = found.attention["models"]
    if not models:
        return None
    return Section(
        anchor="attention",
        title="What the tabnet looks at",
        text=(
            f"Step by step a tabnet shares out its attention among the columns of a row, by "
            f"{found.attention['num_rows']} valid rows. First how it was shared in some rows; then "
            f"how a column's attention goes with what is predicted: blue, more where more is "
            f"predicted; orange, more where less is; nothing where either is the same in all rows. "
            f"It tells where the network looks, not what the column is worth. Of a bag the fit "
            f"on all folds is shown, for steps differ from fit to fit.",
        ),
        charts=tuple(
            chart
            for model, own in models.items()
            for chart in (mask_chart(model, own), correlation_chart(model, own))
            if chart is not None
        ),
    )


def errors_section(errors: Mapping[str, Any], target: Target, num_rows: int) -> Section:
    """Return the rows with the largest losses; ``errors`` is the target's entry of errors.json."""
    rows = errors["rows"]
    columns = errors["columns"]
    told = "prediction" if target.task == "regression" else "probability of the true class"
    predicted = () if target.task == "regression" else ("predicted",)
    return Section(
        anchor="errors",
        title="Worst errors",
        text=(
            f"The {len(rows)} of {num_rows:,} labelled test rows on which {errors['model']} loses "
            f"most, by the {errors['loss']} of the row. Look for wrong labels, changed units, and "
            f"kinds of rows that train does not have. Nothing was chosen by them.",
        ),
        tables=(
            Table(
                title="Rows with the largest losses",
                headings=("row id", "truth", *predicted, told, errors["loss"], *columns),
                rows=tuple(
                    (
                        row["row_id"],
                        row["truth"],
                        *_predicted(row, target),
                        row["loss"],
                        *(row["values"][column] for column in columns),
                    )
                    for row in rows
                ),
            ),
        ),
    )


def _predicted(row: Mapping[str, Any], target: Target) -> tuple[Cell, ...]:
    prediction = row["prediction"]
    if target.task == "regression":
        return (prediction,)
    return max(target.labels, key=lambda label: prediction[label]), prediction[row["truth"]]


def _importance_section(found: Interpretation, target: Target, order: Sequence[str]) -> Section:
    content = found.importances
    ranked = found.ranked(target.name)[:_SHOWN]
    best = found.best_single(target.name)
    models = [best, *(model for model in content["models"] if model != best)]
    of_model = {model: content["models"][model][target.name] for model in models}
    used = {
        model: own
        for model, own in of_model.items()
        if model == best or any(one["value"] for one in own.values())
    }
    axis = _loss_axis(target)
    charts = [
        importance_chart(
            used,
            ranked,
            tones={model: order.index(model) for model in used},
            axis=axis,
            confidence=content["confidence"],
        )
    ]
    for model, own in found.shap["models"].items():
        chart = shap_chart(model, own[target.name], unit=_shap_unit(target))
        charts += [] if chart is None else [chart]
    rows = [
        (name, model, own[name]["value"], own[name]["ci_low"], own[name]["ci_high"])
        for name in ranked
        for model, own in used.items()
    ]
    return Section(
        anchor="importance",
        title="Importance",
        text=_importance_text(found, best, used),
        tables=(
            Table(
                title="Permutation importances",
                headings=("column or group", "model", "growth", "low", "high"),
                rows=tuple(rows),
                note=f"{axis}; {content['confidence']:.0%} intervals; sorted by {best}",
            ),
            *_shap_tables(found, target),
        ),
        charts=tuple(charts),
    )


def _importance_text(
    found: Interpretation, best: str, used: Mapping[str, Content]
) -> tuple[str, ...]:
    content = found.importances
    unit, num_units = content["unit"], content["num_units"]
    units = "" if unit == "row" else f" of {num_units:,} {unit}s"
    text = [
        f"How much the loss grows when a column's values are dealt out to other rows, by "
        f"{content['num_rows']:,} valid rows{units}, which no model was fitted on. {best} is the "
        f"best single model by valid rows. The intervals cover the choice of rows (by {unit}), the "
        f"values dealt out and {content['repeats']} shuffles, not another training. An interval "
        f"that includes 0: the column may be useless to the model."
    ]
    unused = [model for model in content["models"] if model not in used]
    if unused:
        text.append(f"Not drawn, for no column changes its predictions: {', '.join(unused)}.")
    for one in content["alike"]:
        group = next(
            name for name, own in content["groups"].items() if set(one["columns"]) <= set(own)
        )
        text.append(
            f"{', '.join(one['columns'])} go together (rank correlation {one['correlation']:.2f} "
            f"or more): each alone looks less important than it is, for the others stand in for "
            f"it. They were also shuffled together: {group}. `interpret.groups` in params.yaml "
            f"names such groups."
        )
    if found.shap["models"]:
        text.append(
            f"SHAP values say what a column adds to single predictions, by "
            f"{found.shap['num_rows']} valid rows; with the base value they add up to the "
            f"prediction. A point is a row, its colour the column's own value."
        )
    return tuple(text)


def _shap_tables(found: Interpretation, target: Target) -> list[Table]:
    tables = []
    for model, own in found.shap["models"].items():
        values = own[target.name]
        base = ", ".join(f"{value:.4g}" for value in values["base"])
        tables.append(
            Table(
                title=f"Mean absolute SHAP value, {model}",
                headings=("column", f"mean, {_shap_unit(target)}"),
                rows=tuple(ranked_shares(values["mean_abs"])[:_SHOWN]),
                note=f"base value: {base}",
            )
        )
    return tables


def _dependence_section(found: Interpretation, target: Target, contract: Contract) -> Section:
    entry = found.dependence["targets"][target.name]
    note = contract.column(target.name).note
    labels = target.labels[1:] if target.task == "binary" else target.labels
    if target.task == "regression":
        axis = f"prediction of {target.name}" + (f" ({note})" if note else "")
    else:
        axis = f"probability of {labels[0]}" if target.task == "binary" else "probability"
    num_rows = found.dependence["num_rows"]
    return Section(
        anchor="partial-dependence",
        title="Partial dependence",
        text=(
            f"The mean prediction of {entry['model']} over {num_rows} valid rows when a column has "
            f"one value in all of them: quantiles of a number, the most frequent categories. Thin "
            f"lines are single rows. It tells what the model does, not what would happen, and asks "
            f"about rows that may not exist.",
        ),
        charts=tuple(
            dependence_chart(number, one, labels or (target.name,), axis=axis)
            for number, one in enumerate(entry["columns"], start=1)
        ),
    )


def _loss_axis(target: Target) -> str:
    if target.task == "regression":
        return f"growth of the squared error (variances of {target.name})"
    return "growth of the log-loss (nats)"


def _shap_unit(target: Target) -> str:
    return f"in units of {target.name}" if target.task == "regression" else "in log-odds"
