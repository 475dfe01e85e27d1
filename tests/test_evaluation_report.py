"""Curves, figures and the page's numbers: what a reader sees is what was computed."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrace.evaluation import charts, curves
from headrace.evaluation.bootstrap import Interval, Units
from headrace.evaluation.comparison import Comparison, Judged
from headrace.evaluation.identity import identified
from headrace.evaluation.learning import learning_section
from headrace.evaluation.metrics import METRICS
from headrace.evaluation.page import Chart, Section, Table
from headrace.evaluation.report import (
    ReportInputs,
    TargetSection,
    interval_text,
    render_report,
)
from headrace.training.curves import LearningCurves, curves_json
from tests.evaluation_case import Case

SETTINGS = {"confidence": 0.95, "num_resamples": 200, "threshold": 0.5}


def scores(num_rows=5000, seed=0):
    rng = np.random.default_rng(seed)
    score = np.round(rng.random(num_rows), 3)
    return score, rng.random(num_rows) < score, rng.uniform(0.5, 2, num_rows)


def test_the_thinned_roc_curve_holds_the_area():
    """200 points lie on the full curve and lose next to nothing of it."""
    score, is_positive, weight = scores()
    curve = curves.roc(score, is_positive, weight)
    assert len(curve.x) <= 202
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    area = np.trapezoid(curve.y, curve.x)
    expected = roc_auc_score(is_positive, score, sample_weight=weight)
    assert area == pytest.approx(expected, abs=1e-3)


def test_precision_at_full_recall_is_the_base_rate():
    """And precision lies within 0 and 1 all the way."""
    score, is_positive, weight = scores()
    curve = curves.precision_recall(score, is_positive, weight)
    assert curve.x[-1] == pytest.approx(1)
    assert curve.y[-1] == pytest.approx(np.average(is_positive, weights=weight))
    assert ((curve.y >= 0) & (curve.y <= 1)).all()


def test_calibration_bins_hold_the_rows_and_their_means():
    """Shares add up to 1; a calibrated score lies within its intervals in most bins."""
    score, is_positive, weight = scores()
    units = Units("row", np.arange(5000), 5000)
    found = curves.calibration(score, is_positive * 1.0, weight, units, confidence=0.95)
    assert len(found.share) == 10
    assert found.share.sum() == pytest.approx(1)
    assert (np.diff(found.predicted) > 0).all()
    inside = (found.low <= found.predicted) & (found.predicted <= found.high)
    assert inside.sum() >= 8
    overall = np.average(is_positive, weights=weight)
    assert (found.share * found.observed).sum() == pytest.approx(overall)


def test_calibration_intervals_are_by_unit():
    """Rows that repeat ten times are no more evidence than once."""
    score, is_positive, _ = scores(400)
    repeated = Units("group", np.repeat(np.arange(400), 10), 400)
    once = curves.calibration(
        score, is_positive * 1.0, None, Units("row", np.arange(400), 400), confidence=0.9
    )
    ten = curves.calibration(
        np.repeat(score, 10), np.repeat(is_positive * 1.0, 10), None, repeated, confidence=0.9
    )
    np.testing.assert_allclose(ten.low, once.low, atol=1e-12)


def test_a_constant_prediction_is_one_bin():
    """The prior baseline: one point, with an interval; on one unit without."""
    truth = np.arange(20) % 2 * 1.0
    found = curves.calibration(
        np.full(20, 0.5), truth, None, Units("row", np.arange(20), 20), confidence=0.95
    )
    assert found.observed.tolist() == [0.5]
    assert found.low[0] < 0.5 < found.high[0]
    alone = curves.calibration(
        np.full(20, 0.5), truth, None, Units("day", np.zeros(20, int), 1), confidence=0.95
    )
    assert np.isnan(alone.low).all()


@pytest.mark.parametrize("values", [np.array([3.0]), np.arange(5.0), np.r_[np.zeros(99), 1000.0]])
def test_histograms_clip_nothing(values):
    """All rows lie between the edges, however far the farthest is."""
    edges = curves.bin_edges(values)
    found = curves.histogram(values, edges, None)
    assert len(edges) <= 801
    assert found.share.sum() == pytest.approx(1)
    assert edges[0] <= values.min()
    assert edges[-1] >= values.max()
    cells = curves.grid(values, values * 2, None)
    assert cells.share.sum() == pytest.approx(1)


def test_a_density_integrates_to_1_and_a_constant_has_none():
    """NaN resamples are left out."""
    values = np.append(np.random.default_rng(0).normal(3, 0.1, 500), np.nan)
    found = curves.density(values)
    assert np.trapezoid(found.y, found.x) == pytest.approx(1, abs=0.01)
    assert len(curves.density(np.full(9, 0.5)).x) == 0


def test_confusion_shares_are_weighted():
    """True class by row, predicted class by column."""
    found = curves.confusion(
        np.array([0.0, 1, 1]), np.array([0, 0, 2]), np.array([2.0, 1, 1]), num_classes=3
    )
    assert found.tolist() == [[0.5, 0, 0], [0.25, 0, 0.25], [0, 0, 0]]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (Interval(0.69823, 0.6621, 0.7334), ("0.698", "[0.662, 0.733]")),
        (Interval(37.82, 34.16, 42.16), ("37.8", "[34.2, 42.2]")),
        (Interval(-0.00431, -0.0071, -0.0016), ("−0.0043", "[−0.0071, −0.0016]")),
        (Interval(12345.6, 11000, 14000), ("12346", "[11000, 14000]")),
        (Interval(0.5, 0.5, 0.5), ("0.5", "[0.5, 0.5]")),
        (Interval(0.5, None, None, reason="1 day"), ("0.5", "1 day")),
        (Interval(None, None, None, reason="only one class"), ("–", "only one class")),
    ],
)
def test_numbers_are_rounded_by_their_interval(found, text):
    """Two figures of the half width; what is not there says why."""
    assert interval_text(found) == text


def test_a_wide_range_gets_a_log_axis():
    """Three decades of shares, or of positive values in cells."""
    edges = np.linspace(0, 8, 9)
    steep = curves.Histogram(edges, np.array([0.9, 0, 0, 0, 0.0999, 0, 0, 0.0001]))
    flat = curves.Histogram(edges, np.full(8, 1 / 8))
    assert charts.residuals({"m": steep}, unit="s").layout["yaxis"]["type"] == "log"
    assert "type" not in charts.residuals({"m": flat}, unit="s").layout["yaxis"]

    wide, narrow = np.geomspace(1, 2000, 50), np.linspace(1, 900, 50)
    shown = charts.cells(
        {"m": curves.grid(wide, narrow, None)},
        name="c",
        title="t",
        y="truth",
        unit="s",
        is_diagonal=True,
    )
    assert shown.layout["xaxis"]["type"] == "log"
    assert "type" not in shown.layout["yaxis"]


def test_coarse_bins_are_the_rules_own():
    """Four fine bins to one, all rows kept."""
    values = np.random.default_rng(0).normal(size=1000)
    found = curves.histogram(values, curves.bin_edges(values), None)
    bins = curves.coarse(found)
    quartiles = np.quantile(values, [0.25, 0.75])
    width = 2 * np.diff(quartiles)[0] / 10
    assert len(bins.share) == np.ceil(np.ptp(values) / width)
    assert bins.share.sum() == pytest.approx(1)
    assert (bins.edges[0], bins.edges[-1]) == (values.min(), values.max())


TABLE = Table("t <1>", ("what", "how many"), (("x<y", 12345), ("b", None)), "a note")
CHART = Chart("c", "title", "said </script>", ({"x": [1.23456789, float("nan")]},), {})


def test_sections_are_shown_with_their_tables_and_charts():
    """Escaped, with values to sort by; what is not there sorts last and reads as a dash."""
    section = Section("extra", "Extra", ("a paragraph",), (TABLE,), (CHART,), "in short")
    page = render_report(ReportInputs([], SETTINGS, {}, None, (section,)))
    for said in (
        '<h2 id="run-extra">Extra</h2>',
        '<dt><a href="#run-extra">Extra</a></dt><dd>in short</dd>',
        "<p>a paragraph</p>",
        "t &lt;1&gt;",
        '<td data-value="12345">12,345</td>',
        '<td data-value="">–</td>',
        'data-value="x&lt;y">x&lt;y</th>',
        'id="run-extra-c"',
        "said &lt;/script&gt;",
        '"x":[1.23457,null]',
    ):
        assert said in page, said


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ((Section("a", "A"), Section("a", "B")), "several sections called run-a"),
        ((Section("a", "A", charts=(CHART, CHART)),), "several charts called run-a-c"),
        (
            (Section("a", "A", charts=(replace(CHART, layout={"x": np.arange(2)}),)),),
            "what JSON does not",
        ),
    ],
)
def test_sections_that_cannot_be_shown_are_refused(sections, message):
    """By name, before anything is written."""
    with pytest.raises(ValueError, match=message):
        render_report(ReportInputs([], SETTINGS, {}, None, sections))


def test_a_copy_says_what_only_a_finished_run_knows():
    """Once, escaped; the page itself does not."""
    page = render_report(ReportInputs([], SETTINGS, {}, None))
    copy = identified(page, {"lineage id": "ab<c"})
    assert "<dt>lineage id</dt><dd>ab&lt;c</dd>" in copy
    assert "lineage id" not in page
    with pytest.raises(ValueError, match="no free place"):
        identified(copy, {"lineage id": "again"})


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"a": {"rows": 7, "top": [{"value": "x<y", "count": 3}]}}, "x&lt;y (3)"),
        ({"a": {"rows": 7}, "b": {"rows": 7, "min": 1956}}, "2 columns, 7 train rows"),
        ({"a": {"association": {"late": 0.25}, "is_odd": True, "gone": None}}, "association late"),
        ({"a": {"histogram": {"counts": [0, 2, 1], "edges": [0, 1, 2, 3]}}}, 'class="bars"'),
        ({"a": {"histogram": {"counts": [], "edges": []}}, "b": "text"}, "1 column<"),
    ],
)
def test_any_profile_becomes_a_table(profile, said):
    """Its form may grow; names and values are escaped."""
    page = render_report(ReportInputs([], SETTINGS, {}, profile))
    assert said in page
    assert "x<y" not in page


def test_learning_curves_of_a_bag_share_a_chart():
    """A line per fit and part, the kept step marked; who kept none is named."""
    summary = Case().summary("sharp")
    section = learning_section({"sharp": summary, "plain": {"rows": 9}})
    (chart,) = section.charts
    lines = [trace for trace in chart.traces if trace["mode"] == "lines"]
    kept = [trace for trace in chart.traces if trace["mode"] == "markers"]
    assert [line["name"] for line in lines] == [
        f"{fit}, {part}" for fit in ("fold-0", "fold-1") for part in ("held back", "while learning")
    ]
    held_back = summary["fold-0"]["curves"][0]["held_back"]
    assert (kept[0]["x"], kept[0]["y"]) == ([12], [held_back[11]])
    assert "No curves: plain" in section.text[1]
    assert section.tables[0].rows[0] == (
        "sharp", "fold-0", "loss of delay", "epoch", 12, 30, held_back[11],
    )  # fmt: skip
    assert learning_section({"plain": {"rows": 9}}) is None


def test_curves_of_a_model_are_thinned_to_what_shows_how_it_went():
    """At most about 200 points, the kept and the last one among them; NaN is no value."""
    part = LearningCurves("loss", [1.0, math.nan, *range(998)], None)
    (found,) = curves_json([part], step="tree", kept=778)
    assert len(found["at"]) <= 202
    assert {1, 778, 1000} <= set(found["at"])
    assert found["held_back"][found["at"].index(778)] == 775
    assert found["learnt"] is None
    (short,) = curves_json([LearningCurves("loss", [1.0, math.nan], [2.0, 3.0])], step="s", kept=1)
    assert (short["held_back"], short["learnt"]) == ([1.0, None], [2.0, 3.0])


def comparison_of(values, verdicts, num_units=40):
    """A regression; ``values`` of models by metric, 1 for others, and their verdict by RMSE."""
    judged = tuple(
        Judged(
            model,
            metric,
            Interval(value, value - 0.1 * abs(value), value + 0.1 * abs(value)),
            Interval(0.0, 0.0, 0.0),
            verdicts[model],
        )
        for model, known in values.items()
        for metric in METRICS["regression"]
        for value in [known.get(metric.name, 1.0)]
    )
    return Comparison("y", "regression", "rmse", "a", "day", num_units, 900, 0, 0.95, judged, {})


def test_intervals_over_many_decades_get_a_log_axis():
    """Only where all are positive, and only the metric that needs it."""
    values = {"a": {"rmse": 1.0, "r2": -1.0}, "b": {"rmse": 5e3, "mae": 5.0, "r2": 0.9}}
    comparison = comparison_of(values, {"a": "chosen", "b": "worse"})
    choices = charts.forest(comparison, confidence=0.95).layout["choices"]
    assert choices["RMSE"]["xaxis"]["type"] == "log"
    assert not any("type" in choices[title]["xaxis"] for title in ("MAE", "R²"))


SELECTION = {
    "reason": "because",
    "blend": {"kind": "mean", "weights": {"a": 1.0}},
    "ranking": [],
    "rows": "valid",
    "blend_value": {"valid": 1.0},
}


@pytest.mark.parametrize(
    ("others", "num_units", "said"),
    [
        (
            {"b": "worse", "c": "worse"},
            40,
            ("ahead of all others: 95%", "The choice is clear"),
        ),
        (
            {"b": "tied", "c": "worse"},
            40,
            ("exclude 0; tied with b", "cheapest of"),
        ),
        ({"b": "tied", "c": "tied"}, 7, ("tied with b and c", "Test on more days: 7 days are too")),
        ({"b": "better"}, 40, ("behind b on these rows", "Test rows do not choose: see")),
        ({}, 40, ("compared with no other model", "Train another kind")),
    ],
)
def test_the_first_screen_says_how_sure_and_what_next(others, num_units, said):
    """By the verdicts, and by how many units there are."""
    verdicts = {"a": "chosen", **others}
    comparison = comparison_of({model: {} for model in verdicts}, verdicts, num_units)
    section = TargetSection(comparison, SELECTION, ())
    page = render_report(ReportInputs([section], SETTINGS, {}, None))
    answer = page[page.index('class="answer"') : page.index('id="headline"')]
    for text in said:
        assert text in answer


@pytest.mark.parametrize(
    ("num_models", "first", "down"), [(2, "metric", "RMSE\u00a0↓"), (9, "model", "a")]
)
def test_many_metrics_of_few_models_stand_below_each_other(num_models, first, down, monkeypatch):
    """Else the columns would not fit a page; the chosen model comes first either way."""
    monkeypatch.setattr("headrace.evaluation.report._FITTING", 2)
    names = "abcdefghi"[:num_models]
    verdicts = dict.fromkeys(names, "worse") | {"a": "chosen"}
    comparison = comparison_of({name: {"rmse": 1.0 + ord(name)} for name in names}, verdicts)
    section = TargetSection(comparison, SELECTION, ())
    page = render_report(ReportInputs([section], SETTINGS, {}, None))
    table = page[page.index('<p class="caption" id="target-1-table-all"') :]
    assert re.findall(r'<button type="button">(.+?)</button>', table)[0] == first
    assert re.findall(r'<th scope="row" data-value="(.+?)"', table)[0] == down
