"""Sections of the report on what the models hang on, and on the worst errors."""

import json
from dataclasses import replace

import pytest

from headrace.errors import IntegrityError
from headrace.evaluation.interpretation import (
    Interpretation,
    attention_section,
    errors_section,
    interpretation_sections,
    read_interpretation,
)
from headrace.evaluation.page import Section
from headrace.schema import Column, Contract, Target
from headrace.storage import new_folder, write_json
from tests.train_case import CLASS, DELAY, LATE

CONTRACT = Contract(
    columns=(
        Column(name="far", role="numeric", dtype="double", note="miles"),
        Column(name="gate", role="category", dtype="string"),
        Column(name="delay", role="target", dtype="double", note="minutes"),
        Column(name="late", role="target", dtype="string"),
        Column(name="class", role="target", dtype="string"),
    ),
    targets=(DELAY, LATE, CLASS),
)

MODELS = ("stack", "trees", "baseline")


def one(value, low, high):
    return {"value": value, "ci_low": low, "ci_high": high}


def found(target: Target, *, grid=(1.0, 10.0, 2000.0)) -> Interpretation:
    """Return a small interpretation: trees that use the distance, a baseline that uses nothing."""
    own = {"gate": one(0.1, -0.1, 0.2), "far": one(0.5, 0.4, 0.7), "far + gate": one(0.9, 0.7, 1)}
    num_curves = max(1, target.num_outputs)
    curve = [0.1, 0.3, 0.2]
    points = {"far": {"shap": [1.0, 1.0, -2.0], "height": [0.0, 1.0, None]}}
    return Interpretation(
        importances={
            "num_rows": 300, "repeats": 5, "confidence": 0.9, "unit": "day", "num_units": 30,
            "groups": {"far + gate": ["far", "gate"]},
            "alike": [{"columns": ["far", "gate"], "correlation": 0.95}],
            "models": {
                "baseline": {target.name: {name: one(0, 0, 0) for name in own}},
                "trees": {target.name: own},
            },
        },
        shap={"num_rows": 3, "models": {"trees": {target.name: {
            "base": [1.5], "mean_abs": {"a gate": 0.0, "far": 1.3},
            "points": {} if num_curves > 1 else points,
        }}}},
        attention={"num_rows": 2, "models": {"tabnet": {
            "columns": ["far", "gate"], "shares": {"far": 0.9, "gate": 0.1},
            "masks": [[[1.0, 0.8], [0.0, 0.2]]],
            "correlations": {"y": [[None], [-0.5]], "nothing": [[None], [None]]},
        }}},
        dependence={"num_rows": 200, "targets": {target.name: {"model": "trees", "columns": [
            {"column": "far", "note": "miles", "is_numeric": True, "grid": list(grid),
             "means": [curve] * num_curves, "lines": [curve, curve]},
            {"column": "gate", "note": "", "is_numeric": False, "grid": ["a", None, "b"],
             "means": [curve] * num_curves, "lines": []},
        ]}}},
    )  # fmt: skip


def charts(section: Section):
    return {chart.name: chart for chart in section.charts}


@pytest.mark.parametrize("target", [DELAY, LATE, CLASS])
def test_every_axis_has_a_name_and_every_chart_its_words(target):
    sections = interpretation_sections(found(target), target, CONTRACT, MODELS)
    sections.append(attention_section(found(target)))

    assert [section.anchor for section in sections] == [
        "importance",
        "partial-dependence",
        "attention",
    ]
    for chart in (chart for section in sections for chart in section.charts):
        assert len(chart.alternative) > 10
        assert chart.layout["xaxis"]["title"]["text"]
        assert chart.layout["yaxis"]["title"]["text"]
        json.dumps([*chart.traces, chart.layout], allow_nan=False)


def test_importances_are_ranked_by_the_best_single_model():
    """Groups stand among columns; who uses nothing is said and not drawn."""
    section, _ = interpretation_sections(found(DELAY), DELAY, CONTRACT, MODELS)
    (points,) = charts(section)["permutation_importance"].traces

    assert points["customdata"] == ["far + gate", "far", "gate"]
    assert (points["name"], points["tone"]) == ("trees", 1)
    assert points["error_x"]["array"] == pytest.approx([0.1, 0.2, 0.1])
    assert points["error_x"]["arrayminus"] == pytest.approx([0.2, 0.1, 0.2])
    assert section.tables[0].rows[1] == ("far", "trees", 0.5, 0.4, 0.7)
    text = " ".join(section.text)
    assert "300 valid rows of 30 days" in text
    assert "no column changes its predictions: baseline" in text
    assert "far, gate go together (rank correlation 0.95" in text
    assert found(DELAY).most("delay", 1) == ["far"]


def test_points_are_coloured_by_the_columns_value():
    section, _ = interpretation_sections(found(LATE), LATE, CONTRACT, MODELS)
    chart = charts(section)["shap_trees"]
    coloured, plain = chart.traces

    assert coloured["marker"]["color"] == [0.0, 1.0]
    assert (coloured["x"], plain["x"]) == ([1.0, 1.0], [-2.0])
    assert coloured["y"][0] != coloured["y"][1]
    assert "log-odds" in chart.layout["xaxis"]["title"]["text"]
    several, _ = interpretation_sections(found(CLASS), CLASS, CONTRACT, MODELS)
    assert "shap_trees" not in charts(several)
    assert several.tables[1].rows[0] == ("far", 1.3)


def test_attention_is_drawn_by_step_and_by_what_is_predicted():
    section = attention_section(found(DELAY))
    drawn = charts(section)

    (step,) = drawn["masks_tabnet"].traces
    assert (step["choice"], step["z"]) == ("step 1", [[1.0, 0.8], [0.0, 0.2]])
    assert drawn["attention_tabnet"].alternative == "y: most with gate in step 1 (-0.50)"
    assert [trace["choice"] for trace in drawn["attention_tabnet"].traces] == ["y"]
    nothing = replace(found(DELAY), attention={"num_rows": 2, "models": {}})
    assert attention_section(nothing) is None


def test_dependence_is_in_the_columns_unit():
    """A range of more than three decades is logarithmic; missing is a category."""
    _, section = interpretation_sections(found(DELAY), DELAY, CONTRACT, MODELS)
    far, gate = section.charts

    assert far.layout["xaxis"] == {"title": {"text": "far (miles)"}, "type": "log"}
    assert far.layout["yaxis"]["title"]["text"] == "prediction of delay (minutes)"
    assert [trace["name"] for trace in far.traces] == ["single rows", "single rows", "delay"]
    assert far.alternative == "delay: from 0.1 at 1 to 0.3 at 10"
    assert gate.layout["xaxis"]["type"] == "category"
    assert gate.traces[0]["x"] == ["a", "(missing)", "b"]
    near = found(DELAY, grid=(-1.0, 0.0, 5000.0))
    _, section = interpretation_sections(near, DELAY, CONTRACT, MODELS)
    assert "type" not in section.charts[0].layout["xaxis"]
    _, section = interpretation_sections(found(CLASS), CLASS, CONTRACT, MODELS)
    assert [trace["name"] for trace in section.charts[1].traces] == ["a", "b", "c"]


def test_the_worst_errors_are_a_table():
    row = {"row_id": "-7", "loss": 2.5, "values": {"far": 3.0, "gate": None}}
    errors = {"model": "stack", "loss": "absolute error", "columns": ["gate", "far"]}
    delay = {**errors, "rows": [{**row, "truth": 4.0, "prediction": 1.5}]}
    section = errors_section(delay, DELAY, 1000)

    (table,) = section.tables
    assert section.anchor == "errors"
    assert table.headings == ("row id", "truth", "prediction", "absolute error", "gate", "far")
    assert table.rows == (("-7", 4.0, 1.5, 2.5, None, 3.0),)
    assert "1 of 1,000 labelled test rows" in section.text[0]
    told = {"no": 0.9, "yes": 0.1}
    late = {**errors, "loss": "log-loss", "rows": [{**row, "truth": "yes", "prediction": told}]}
    assert errors_section(late, LATE, 9).tables[0].rows[0][:5] == ("-7", "yes", "no", 0.1, 2.5)


def test_other_formats_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(IntegrityError, match="does not exist"):
        read_interpretation(tmp_path / "interpret")
    with new_folder(tmp_path / "interpret") as folder:
        for name in ("importances", "shap", "attention", "dependence"):
            write_json(folder / f"{name}.json", {"format": 2 if name == "shap" else 1})
    with pytest.raises(IntegrityError, match="shap have another format than 1"):
        read_interpretation(tmp_path / "interpret")
