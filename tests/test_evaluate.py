"""Stage ``evaluate``: its files, one look at the test rows, byte-equal runs, a page of its own."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from headrace.data.predictions import read_predictions
from headrace.data.table import open_table
from headrace.data.truth import read_truth
from headrace.errors import ConfigError, DataError, IntegrityError, ResourceError, SchemaError
from headrace.evaluation.resamples import read_resamples
from headrace.params import Resources
from headrace.record import MemoryRecorder
from headrace.schema import SPLITS, Split, Target, file_stem
from headrace.stages.evaluate import EvaluateParams, evaluate
from headrace.stages.stack import StackParams, stack
from headrace.storage import new_folder, read_json, verify_folder, write_file, write_json
from tests.evaluation_case import CARRIER, DELAY, LATE, Case

ALL = (DELAY, LATE, CARRIER)
PARAMS = EvaluateParams(num_resamples=200)


def run(case, root, params=PARAMS, *, profile=None, threads=2, **resources):
    table, members = case.write(root)
    stack(
        table,
        members,
        root / "stack",
        StackParams(num_resamples=200),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    recorder = MemoryRecorder()
    evaluated = evaluate(
        table,
        members,
        root / "stack",
        root / "evaluate",
        params,
        resources=Resources(threads=threads, **resources),
        recorder=recorder,
        profile=profile,
    )
    return evaluated, root / "evaluate", recorder


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One run over all three tasks, with weights and missing labels."""
    root = tmp_path_factory.mktemp("project")
    case = Case(targets=ALL, has_weight=True)
    case.labels["test"]["late"][:50] = np.nan
    profile = {
        "delay": {"mean": 1.5, "nulls": 0, "histogram": {"counts": [1, 5, 2], "edges": [0, 1, 2]}},
        "late": {"distinct": 2, "correlation": {"delay": 0.5}, "top": ["no", "<yes>"]},
    }
    with new_folder(root / "extract") as folder:
        write_json(folder / "profile.json", profile)
    evaluated, out, recorder = run(case, root, profile=root / "extract" / "profile.json")
    return case, evaluated, out, recorder


def test_the_files_are_there_and_whole(done):
    """The manifest covers them, and the metrics are as DVC reads them."""
    _, _, out, _ = done
    names = set(verify_folder(out))
    assert {"checks.json", "metrics.json", "comparison.json", "report.html"} <= names
    assert {"figures/late_forest.svg", "figures/delay_differences.svg"} <= names
    assert {"plots/carrier.class_roc.AA.csv", "plots/late.roc.sharp.csv"} <= names
    metrics = read_json(out / "metrics.json")
    assert set(metrics) == {"delay", "late", "carrier"}
    assert set(metrics["late"]) == {"plain", "sharp", "stack"}
    found = metrics["late"]["sharp"]["roc_auc"]
    assert found["ci_low"] < found["value"] < found["ci_high"]


def test_values_are_of_labelled_test_rows_with_their_weights(done):
    """Checked against scikit-learn on the same rows."""
    case, _, out, _ = done
    labels = case.labels["test"]["late"]
    is_labelled = ~np.isnan(labels)
    expected = roc_auc_score(
        labels[is_labelled],
        case.prediction(LATE, "sharp", "test")[is_labelled],
        sample_weight=case.weight[is_labelled],
    )
    found = read_json(out / "metrics.json")["late"]["sharp"]["roc_auc"]["value"]
    assert found == pytest.approx(expected, abs=1e-9)
    late = read_json(out / "comparison.json")["targets"]["late"]
    assert late["num_rows"] == 550
    assert late["num_unlabelled"] == 50


def test_the_worst_errors_are_the_largest_losses(done):
    """Of the chosen model, on labelled test rows, worst first; ids are text."""
    case, _, out, _ = done
    found = read_json(out / "errors.json")["targets"]
    chosen = read_json(out / "comparison.json")["targets"]["delay"]["chosen"]
    prediction = read_predictions(out.parent / "stack", DELAY).of_split("test")
    if chosen != "stack":
        prediction = case.predictions(DELAY, chosen).of_split("test")
    loss = np.abs(prediction.values - case.labels["test"]["delay"])
    order = np.argsort(-loss)[:20]
    rows = found["delay"]["rows"]

    assert found["delay"]["model"] == chosen
    assert [row["row_id"] for row in rows] == [str(i) for i in prediction.row_id[order]]
    assert [row["loss"] for row in rows] == pytest.approx(loss[order])
    assert [row["truth"] for row in rows] == pytest.approx(case.labels["test"]["delay"][order])
    unlabelled = {str(i) for i in case.row_id["test"][:50]}
    assert not unlabelled & {row["row_id"] for row in found["late"]["rows"]}
    assert set(found["carrier"]["rows"][0]["prediction"]) == {"AA", "BB", "CC"}


def test_the_comparison_states_unit_choice_and_ties(done):
    """All that a table at the end of a run needs."""
    _, evaluated, out, _ = done
    content = read_json(out / "comparison.json")
    assert content["unit"] == evaluated.unit == "day"
    assert content["num_units"] == evaluated.num_units == 30
    assert content["threshold"] == 0.5
    late = content["targets"]["late"]
    assert late["primary"] == "roc_auc"
    chosen = late["models"][late["chosen"]]["roc_auc"]
    assert chosen["verdict"] == "chosen"
    assert chosen["tied"] is True
    assert chosen["difference"] == {"value": 0, "ci_low": 0, "ci_high": 0}
    plain = late["models"]["plain"]["roc_auc"]
    assert plain["verdict"] == "worse"
    assert plain["tied"] is False
    assert plain["difference"]["ci_high"] < 0
    rmse = content["targets"]["delay"]["models"]["plain"]["rmse"]
    assert rmse["verdict"] == "worse"
    assert rmse["difference"]["ci_low"] > 0


def test_every_pair_of_models_is_tested_and_ties_are_told(done):
    """On the primary metric and the others; in JSON, as a table, in the note and the rows."""
    _, evaluated, out, recorder = done
    late = read_json(out / "comparison.json")["targets"]["late"]
    pairs = {(pair["first"], pair["second"]): pair for pair in late["pairs"]["roc_auc"]}
    assert set(pairs) == {("plain", "sharp"), ("plain", "stack"), ("sharp", "stack")}
    clear = pairs["plain", "sharp"]
    assert clear["difference"]["ci_high"] < 0
    assert clear["p_value"] == pytest.approx(2 / 201)  # no resample crosses 0
    assert clear["p_value"] < clear["p_holm"] < 0.05
    assert clear["smallest_detectable"] == pytest.approx(2.8016 * clear["standard_error"], rel=1e-4)
    assert "plain" not in late["tied_with_best"]
    assert late["best"] in late["tied_with_best"]
    assert set(late["pairs"]) == set(late["models"]["plain"])
    ranks = {row.model: row.rank for row in evaluated.rows if row.target == "late"}
    assert ranks["plain"] == "worse"
    assert ranks[late["best"]] == "best"
    assert any("| worse | worse |" in note for note in recorder.notes)
    assert "Every pair of models" in (out / "report.html").read_text()
    lines = (out / "pairs.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * sum(len(found["pairs"]) for found in _targets(out).values())
    assert {path.name for path, _ in recorder.files} >= {"pairs.csv", "comparison.json"}


def test_each_class_has_its_metrics(done):
    """By label and model in JSON, and a part of the report; a number has none."""
    _, _, out, _ = done
    targets = _targets(out)
    late = targets["late"]
    assert set(late["classes"]) == {"no", "yes"}
    assert set(targets["carrier"]["classes"]) == {"AA", "BB", "CC"}
    assert "classes" not in targets["delay"]
    for model, metrics in late["models"].items():
        yes = late["classes"]["yes"]["models"][model]
        for name in ("precision", "recall", "f1"):
            for key in ("value", "ci_low", "ci_high"):
                assert yes[name][key] == metrics[name][key]
    assert "Each class" in (out / "report.html").read_text()


def _targets(out):
    return read_json(out / "comparison.json")["targets"]


def test_resamples_are_kept_for_comparisons_across_runs(done):
    """Their quantiles are the intervals; the labels have a digest."""
    _, _, out, recorder = done
    found = read_resamples(out / "resamples.parquet")
    stated = read_json(out / "metrics.json")["late"]["sharp"]["brier"]
    one = found["late"]["sharp"]
    assert one.points["brier"] == pytest.approx(stated["value"], abs=1e-12)
    low, high = np.quantile(one.resamples["brier"], [0.025, 0.975])
    assert (low, high) == pytest.approx((stated["ci_low"], stated["ci_high"]), abs=1e-11)
    digests = {one["label_digest"] for one in _targets(out).values()}
    assert len(digests) == 3
    assert (out / "resamples.parquet", "") in recorder.files


def test_resamples_too_few_for_all_pairs_are_warned_of(tmp_path):
    """Holm over ten pairs of five models needs more than 200."""
    noise = dict.fromkeys(("a", "b", "c", "d"), 1.0)
    _, _, recorder = run(Case(targets=(DELAY,), noise=noise), tmp_path)
    assert any("set `evaluate.num_resamples` to 399 or more" in text for text in recorder.warnings)


def test_the_rows_for_the_terminal_say_the_same(done):
    """The result's rows and the files agree; the text names unit and count."""
    _, evaluated, out, _ = done
    metrics = read_json(out / "metrics.json")
    for row in evaluated.rows:
        assert row.value == pytest.approx(metrics[row.target][row.model][row.metric]["value"])
    assert [row.is_chosen for row in evaluated.rows if row.is_primary].count(True) == 3
    assert str(evaluated).endswith("600 test rows, 30 days")


def test_one_run_is_one_look_at_the_test_rows(done):
    """Told once, by the digest of the sorted ids, which the label or model does not move."""
    _, _, out, recorder = done
    (look,) = recorder.datasets
    assert look["context"] == "test"
    assert look["rows"] == 600
    assert look["digest"] == read_json(out / "comparison.json")["split_digest"]


def test_metrics_notes_and_figures_are_recorded(done):
    """With bounds, by model and target; the note holds the interval."""
    _, _, out, recorder = done
    names = {name for name, _, _ in recorder.recorded_metrics}
    assert {
        "sharp/late/roc_auc",
        "sharp/late/roc_auc_ci_low",
        "sharp/late/roc_auc_ci_high",
    } <= names
    assert all(np.isfinite(value) for _, value, _ in recorder.recorded_metrics)
    assert any("| sharp | 0." in note and "30 days" in note for note in recorder.notes)
    assert (out / "figures" / "late_forest.svg", "figures") in recorder.files
    assert all(path.is_file() for path, _ in recorder.files)


def test_a_second_run_on_another_number_of_threads_has_the_same_bytes(done, tmp_path):
    """Every file, the page and the figures included."""
    _, _, out, _ = done
    case = Case(targets=ALL, has_weight=True)
    case.labels["test"]["late"][:50] = np.nan
    _, again, _ = run(case, tmp_path, threads=1, profile=out.parent / "extract" / "profile.json")
    first, second = (
        {p.relative_to(o).as_posix(): p.read_bytes() for p in o.rglob("*.*")} for o in (out, again)
    )
    assert first == second


class Page(HTMLParser):
    """Collects what a page would load, its ids, and whether its tags are closed in order."""

    EMPTY = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text):
        super().__init__()
        self.loads, self.ids, self.anchors, self.open, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "action"):
                (self.anchors if value.startswith("#") else self.loads).append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        self.text.append(data)


def own_text(path):
    """The page without the library it carries."""
    text, count = re.subn(
        r'<script id="plotly">.+?</script>', "", path.read_text(), flags=re.DOTALL
    )
    assert count == (path.suffix == ".html")
    return text


def test_the_page_needs_nothing_but_itself(done):
    """No reference leaves the file; ids are unique; every inner reference is there."""
    _, _, out, _ = done
    text = own_text(out / "report.html")
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttp", text)
    assert len(page.ids) == len(set(page.ids))
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids)


def test_the_page_says_what_a_reader_needs(done):
    """Unit, count, choice, ties, text alternatives, the profile; names are escaped."""
    _, _, out, _ = done
    text = own_text(out / "report.html")
    said = " ".join(" ".join(Page(text).text).split())
    assert "30 days" in said
    assert "50 more have no label" in said
    assert "was chosen" in said
    assert "headrace repro" in said
    assert text.count("<figcaption ") == len(re.findall("<figure[ >]", text)) > 15
    assert "&lt;yes&gt;" in text
    assert "<yes>" not in text
    assert 'class="bars"' in text


def test_no_time_host_or_path_is_written(done):
    """What differs between identical runs stays out."""
    _, _, out, _ = done
    texts = [path for path in out.rglob("*.*") if path.suffix != ".parquet"]
    for path in texts:
        text = own_text(path)
        assert str(out.parent) not in text, path
        # The rows' own days are in 2022.
        assert not re.search(r"\b20(?!22)\d\d-\d\d-\d\d", text), path


def test_figures_of_their_own_are_readable_on_white(done):
    """And say what they show."""
    _, _, out, _ = done
    forest = (out / "figures" / "late_forest.svg").read_text()
    assert 'fill="#ffffff"' in forest
    assert re.search(r"<title>late: .+</title><desc>Diamond and dotted line: chosen", forest)


def test_plot_files_have_two_columns_and_a_head(done):
    """As ``dvc plots`` reads a folder of them."""
    _, _, out, _ = done
    files = sorted((out / "plots").glob("*.csv"))
    assert {path.name.split(".")[1] for path in files} == {
        "calibration", "class_roc", "precision_recall", "residuals", "roc",
    }  # fmt: skip
    for path in files:
        lines = path.read_text().splitlines()
        assert lines[0] == "x,y"
        assert 1 < len(lines) < 400
        assert np.isfinite(np.array([line.split(",") for line in lines[1:]], float)).all()


def test_one_class_in_test_is_null_with_a_reason_not_0(tmp_path):
    """Other metrics keep their values, and the page says why there is none."""
    case = Case(targets=(LATE,))
    case.labels["test"]["late"][:] = 0
    _, out, _ = run(case, tmp_path)
    found = read_json(out / "comparison.json")["targets"]["late"]["models"]["sharp"]
    auc = found["roc_auc"]
    assert auc["value"] is auc["ci_low"] is auc["ci_high"] is None
    assert auc["reason"] == "only one class is present"
    assert auc["verdict"] in ("chosen", "unknown")
    assert found["brier"]["value"] > 0
    assert "only one class is present" in (out / "report.html").read_text()
    json.loads((out / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_a_constant_target_is_null_too(tmp_path):
    """R² has no value; RMSE has."""
    case = Case(targets=(DELAY,))
    case.labels["test"]["delay"][:] = 4.0
    _, out, _ = run(case, tmp_path)
    found = read_json(out / "metrics.json")["delay"]["sharp"]
    assert found["r2"]["value"] is None
    assert found["rmse"]["value"] > 0


def test_a_model_that_is_better_on_test_stays_unchosen(tmp_path):
    """The selection says one thing, the test rows another: reported, not acted on."""
    case = Case(targets=(DELAY,))
    table, members = case.write(tmp_path)
    stack(
        table,
        members,
        tmp_path / "stack",
        StackParams(num_resamples=200),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )

    def spoiled(found):
        return replace(found, values=found.values + 100 * (found.split == SPLITS.index("test")))

    case.write_model(members["sharp"], "sharp", spoiled)
    case.write_model(tmp_path / "stack2", "sharp", spoiled)
    with new_folder(tmp_path / "chosen") as folder:
        content = read_json(tmp_path / "stack" / "selection.json")
        content["targets"]["delay"]["chosen"] = "sharp"
        write_json(folder / "selection.json", content)
        (folder / "predictions").mkdir()
        (folder / "predictions" / "delay.parquet").write_bytes(
            (tmp_path / "stack" / "predictions" / "delay.parquet").read_bytes()
        )
    evaluate(
        table,
        members,
        tmp_path / "chosen",
        tmp_path / "evaluate",
        PARAMS,
        resources=Resources(),
        recorder=MemoryRecorder(),
    )
    found = read_json(tmp_path / "evaluate" / "comparison.json")["targets"]["delay"]
    assert found["chosen"] == "sharp"
    assert found["models"]["plain"]["rmse"]["verdict"] == "better"


def test_few_units_are_warned_of(tmp_path):
    """Seven days: said in the run and on the page."""
    _, out, recorder = run(Case(num_days=7, targets=(DELAY,)), tmp_path)
    assert any("only 7 days" in text for text in recorder.warnings)
    assert "Only 7 days" in (out / "report.html").read_text()


def test_one_day_gives_values_without_intervals(tmp_path):
    """And the reason beside them."""
    _, out, _ = run(Case(num_days=1, targets=(DELAY,)), tmp_path)
    found = read_json(out / "comparison.json")["targets"]["delay"]["models"]["sharp"]["rmse"]
    assert found["value"] is not None
    assert found["ci_low"] is None
    assert found["reason"] == "1 day: a 95 % interval needs at least 4"
    ranks = _targets(out)["delay"]["ranks"]
    assert sorted(ranks.values()) == ["best", "untested", "untested"]
    assert found["verdict"] in ("chosen", "unknown")


def test_rows_without_a_prediction_are_refused(tmp_path):
    """Labelled test rows that a model does not predict: count and first ids."""
    case = Case(targets=(LATE,))
    table, members = case.write(tmp_path)
    stack(
        table,
        members,
        tmp_path / "stack",
        StackParams(num_resamples=200),
        resources=Resources(),
        recorder=MemoryRecorder(),
    )

    def shortened(found):
        keep = np.arange(len(found.row_id)) < len(found.row_id) - 2
        return replace(
            found,
            row_id=found.row_id[keep],
            fold=found.fold[keep],
            split=found.split[keep],
            values=found.values[keep],
            seen=found.seen[keep],
        )

    case.write_model(members["plain"], "plain", shortened)
    lost = case.row_id["test"][-2]
    with pytest.raises(DataError, match=rf"'plain', .*: 2 labelled test rows .*\['{lost}'"):
        evaluate(
            table,
            members,
            tmp_path / "stack",
            tmp_path / "evaluate",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


def test_a_target_without_any_test_label_is_refused(tmp_path):
    """Nothing could be said of it."""
    case = Case(targets=(LATE,))
    case.labels["test"]["late"][:] = np.nan
    for resampling in ("multinomial", "poisson"):
        params = EvaluateParams(num_resamples=200, resampling=resampling)
        with pytest.raises(DataError, match="'late' has no label in any of the 600 test rows"):
            run(case, tmp_path, params)


def test_a_selection_of_other_models_is_refused(tmp_path):
    """A member was added after stacking."""
    case = Case(targets=(LATE,))
    run(case, tmp_path)
    members = {name: tmp_path / "train" / name for name in ("plain", "sharp")}
    members["more"] = case.write_model(tmp_path / "train" / "more", "sharp")
    with pytest.raises(IntegrityError, match=r"made from the models \['plain', 'sharp'\]"):
        evaluate(
            tmp_path / "reduce",
            members,
            tmp_path / "stack",
            tmp_path / "evaluate",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


def test_damaged_inputs_are_refused(tmp_path):
    """A flipped byte in a model's predictions."""
    case = Case(targets=(LATE,))
    run(case, tmp_path)
    path = tmp_path / "train" / "sharp" / "predictions" / "late.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))
    members = {name: tmp_path / "train" / name for name in ("plain", "sharp")}
    with pytest.raises(IntegrityError, match="is damaged"):
        evaluate(
            tmp_path / "reduce",
            members,
            tmp_path / "stack",
            tmp_path / "evaluate",
            PARAMS,
            resources=Resources(),
            recorder=MemoryRecorder(),
        )


BAD = {
    "nan": (LATE, np.nan, r"2 predictions are NaN or infinite"),
    "infinite": (DELAY, -np.inf, r"2 predictions are NaN or infinite"),
    "below 0": (LATE, -0.25, r"2 predictions are no probabilities between 0 and 1, worst -0.25"),
    "above 1": (CARRIER, 1.5, r"2 predictions are no probabilities between 0 and 1, worst 1.5"),
    "sums": (CARRIER, 1.0, r"2 rows have class probabilities that do not sum to 1, worst 1\.\d+"),
}


@pytest.mark.parametrize("resampling", ["multinomial", "poisson"])
@pytest.mark.parametrize("bad", BAD)
def test_values_that_are_no_predictions_are_refused(tmp_path, monkeypatch, bad, resampling):
    """Of a model folder whose writer let them pass: model, target, count, worst and first ids."""
    target, value, message = BAD[bad]
    case = Case(targets=(target,))
    table, members = case.write(tmp_path)
    _stack(table, members, tmp_path)
    first, second = case.row_id["test"][[1, 300]]

    def spoiled(found):
        values = found.values.reshape(len(found.row_id), -1)
        values[np.isin(found.row_id, [first, second]), 0] = value
        return found

    with pytest.raises(DataError, match=rf"model 'plain', target {target.name!r}: {message}"):
        case.write_model(tmp_path / "refused", "plain", spoiled)
    with monkeypatch.context() as patched:
        patched.setattr("headrace.data.predictions._Faults.refuse_any", lambda _: None)
        case.write_model(members["plain"], "plain", spoiled)
    monkeypatch.setattr("headrace.data.predictions._BATCH_ROWS", 256)  # two batches have one each
    ids = rf"first row ids \['{first}', '{second}'\]; change .* take it out of `models`"
    with pytest.raises(
        DataError, match=rf"model 'plain', target {target.name!r}: {message}.*{ids}"
    ):
        evaluate(
            table, members, tmp_path / "stack", tmp_path / "evaluate",
            EvaluateParams(num_resamples=200, resampling=resampling),
            resources=Resources(), recorder=MemoryRecorder(),
        )  # fmt: skip
    with pytest.raises(DataError, match=message):
        _stack(table, members, tmp_path)


def _stack(table, members, root):
    params = StackParams(num_resamples=200)
    resources, recorder = Resources(), MemoryRecorder()
    stack(table, members, root / "stack", params, resources=resources, recorder=recorder)


def test_a_class_that_training_never_saw_is_named(tmp_path):
    """The contract has no label for it; whether rows are in memory or streamed."""
    case = Case(targets=(CARRIER,))
    table, members = case.write(tmp_path)
    _stack(table, members, tmp_path)
    num_rows = int((case.labels["test"]["carrier"] == 2).sum())
    case._column = lambda _, values: [f"{'AA' if v < 2 else 'ZZ'}" for v in values]
    case.write_table(table)
    for resampling in ("multinomial", "poisson"):
        with pytest.raises(
            SchemaError, match=rf"'carrier' .*not have: 'ZZ' \(rows here: {num_rows}\)"
        ):
            evaluate(
                table, members, tmp_path / "stack", tmp_path / "evaluate",
                EvaluateParams(num_resamples=200, resampling=resampling),
                resources=Resources(), recorder=MemoryRecorder(),
            )  # fmt: skip


def test_bad_weights_are_refused(tmp_path):
    """Count and first ids; a negative weight has no meaning here."""
    case = Case(targets=(LATE,), has_weight=True)
    case.weight[3] = -1
    with pytest.raises(
        DataError, match=r"weight column 'w' is missing, negative .* in 1 valid row"
    ):
        run(case, tmp_path)


def test_rows_beyond_the_budget_are_streamed_and_the_result_says_so(tmp_path):
    """Sums are those of the rows in memory, rankings within the bound; intervals are near."""
    case = Case(targets=ALL, has_weight=True)
    case.labels["test"]["late"][:50] = np.nan
    _, whole_out, whole_recorder = run(case, tmp_path / "whole", EvaluateParams())
    streamed, out, recorder = run(
        case, tmp_path / "streamed", EvaluateParams(), memory_budget=4096, threads=1
    )
    whole, found = (read_json(folder / "comparison.json") for folder in (whole_out, out))
    assert (whole["resampling"], found["resampling"]) == ("multinomial", "poisson")
    for key in ("split_digest", "unit", "num_units", "num_rows"):
        assert found[key] == whole[key]
    assert "The test rows were streamed" in recorder.notes[-1]
    assert "streamed" not in "".join(whole_recorder.notes)
    assert set(verify_folder(out)) == set(verify_folder(whole_out))  # figures and all
    assert (out / "errors.json").read_bytes() == (whole_out / "errors.json").read_bytes()
    assert (streamed.unit, streamed.num_units, streamed.num_rows) == ("day", 30, 600)
    for target, one in found["targets"].items():
        exact = whole["targets"][target]
        assert (one["num_rows"], one["num_units"]) == (exact["num_rows"], exact["num_units"])
        for model, metrics in one["models"].items():
            for name, value in metrics.items():
                if name in ("ece", "spearman"):
                    assert (value["value"], value["reason"]) == (None, "needs all rows in memory")
                    continue
                expected = exact["models"][model][name]
                if name not in one["error_bound"][model]:
                    assert value["reason"] == "needs all rows in memory"
                    continue
                assert one["error_bound"][model][name] == 0  # fewer rows than bins
                assert value["value"] == pytest.approx(expected["value"], abs=1e-8)
                error = expected["standard_error"]
                assert value["standard_error"] == pytest.approx(error, rel=0.2)
                assert value["ci_low"] == pytest.approx(expected["ci_low"], abs=0.4 * error)
                assert value["ci_high"] == pytest.approx(expected["ci_high"], abs=0.4 * error)
                assert value["verdict"] == expected["verdict"]


def test_a_stream_does_not_depend_on_threads_or_budget(tmp_path):
    """Once poisson is asked for, every file is byte-equal."""
    outs = []
    for name, resources in {
        "one": {"threads": 1, "memory_budget": 1},
        "two": {"threads": 2, "memory_budget": 2 << 30},
    }.items():
        params = EvaluateParams(num_resamples=200, resampling="poisson")
        _, out, _ = run(Case(), tmp_path / name, params, **resources)
        outs.append({path.name: path.read_bytes() for path in out.iterdir() if path.is_file()})
    assert outs[0] == outs[1]
    assert json.loads(outs[0]["comparison.json"])["resampling"] == "poisson"


@pytest.mark.parametrize(
    "change", [{"resampling": "multinomial"}, {"interval": "bca"}, {"block": 2}]
)
def test_a_budget_too_small_for_what_a_stream_cannot_do_is_refused(tmp_path, change):
    """Before rows are read, with the figure and the setting to leave out."""
    name = next(iter(change))
    message = rf"stage evaluate needs about .*memory_budget.* leave out `evaluate.{name}`"
    with pytest.raises(ResourceError, match=message):
        run(Case(), tmp_path, EvaluateParams(**change), memory_budget=4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[1:], r"model 'sharp', target 'late': 1 labelled test rows have no"),
        (lambda ids: np.append(ids, ids[-1] + 1), r"1 predictions are of rows that the test split"),
    ],
)
def test_a_stream_refuses_predictions_of_other_rows(tmp_path, change, message):
    """A row lost or too many, as with rows in memory."""
    case = Case(targets=(LATE,))
    table, members = case.write(tmp_path)
    stack(
        table, members, tmp_path / "stack", StackParams(num_resamples=200),
        resources=Resources(), recorder=MemoryRecorder(),
    )  # fmt: skip

    def spoiled(found):
        test = found.of_split("test")
        row_id = change(test.row_id)
        places = np.minimum(np.arange(len(row_id)), len(test.row_id) - 1)
        keep = test.where(places)
        return replace(keep, row_id=row_id)

    case.write_model(members["sharp"], "sharp", spoiled)
    with pytest.raises(DataError, match=message):
        evaluate(
            table, members, tmp_path / "stack", tmp_path / "evaluate",
            EvaluateParams(num_resamples=200, resampling="poisson"),
            resources=Resources(), recorder=MemoryRecorder(),
        )  # fmt: skip


def test_strata_by_class_or_column_blocks_and_methods_are_stated(tmp_path):
    """Each takes effect, and comparison.json says which it was."""
    case = Case(targets=(LATE,), groups=("weekday",))
    widths = set()
    for change in ({}, {"stratify": "weekday"}, {"block": 3}, {"interval": "bca"}):
        root = tmp_path / "".join(change)
        _, out, _ = run(case, root, EvaluateParams(num_resamples=200, **change))
        content = read_json(out / "comparison.json")
        stated = {key: content[key] for key in ("interval", "stratify", "block")}
        assert stated == {"interval": "percentile", "stratify": "none", "block": 1} | change
        found = content["targets"]["late"]["models"]["plain"]["roc_auc"]
        assert 0 < found["standard_error"] < 0.1
        assert found["ci_low"] < found["median"] < found["ci_high"]
        widths.add(found["ci_high"] - found["ci_low"])
    assert len(widths) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stratify": "class"}, "is class, but 17 of 30 units (day) have rows of several strata"),
        ({"stratify": "weekdy"}, "is 'weekdy', which is no column of the table"),
        ({"unit": "row", "block": 2}, "`evaluate.block` is 2, but the resampling unit is row"),
    ],
)
def test_strata_and_blocks_that_the_rows_do_not_have_are_refused(tmp_path, change, message):
    """By the setting's name and value, with what would do."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        run(Case(targets=(LATE,), groups=("weekday",)), tmp_path, EvaluateParams(**change))


def test_units_that_a_time_split_is_cut_by_follow_each_other(tmp_path):
    """A date does, and so does a week number that the split is by; a group and a row do not."""
    split = Split(kind="time", column="week")
    case = Case(targets=(LATE,), groups=("week", "plane"), split=split)
    table = open_table(case.write_table(tmp_path / "table"))
    units = {
        unit: read_truth(table, "test", unit=unit, key="evaluate.unit")
        for unit in ("auto", "day", "row")
    }
    assert {unit: truth.is_unit_of_time for unit, truth in units.items()} == {
        "auto": True, "day": True, "row": False,
    }  # fmt: skip
    assert units["auto"].unit == "week"


def test_strata_by_class_need_a_target_of_classes(tmp_path):
    """A number has none."""
    with pytest.raises(ConfigError, match="no target has classes"):
        run(Case(targets=(DELAY,)), tmp_path, EvaluateParams(stratify="class"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_resamples": 100}, "set num_resamples to 200 or more"),
        ({"confidence": 0.999}, "set num_resamples to 10000 or more"),
        ({"interval": "bca", "block": 2}, "interval bca and block 2 do not go together"),
        ({"stratify": "class", "block": 2}, "stratify class and block 2 do not go together"),
        ({"interval": "bca", "resampling": "poisson"}, "interval bca and resampling poisson do"),
    ],
)
def test_settings_that_cannot_give_an_interval_are_refused(change, message):
    """Before anything runs."""
    with pytest.raises(ValueError, match=message):
        EvaluateParams(**change)


def test_names_with_odd_characters_are_safe(tmp_path):
    """In file names, ids and markup; a dollar is no formula."""
    odd = Target(name="late $x_{1}$ <b> & co", task="binary", labels=("no", "$x_{1}$ <b>"))
    _, out, _ = run(Case(targets=(odd,)), tmp_path)
    page = Page((out / "report.html").read_text())
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "late $x_{1}$ <b> & co" in " ".join(page.text)
    shown = own_text(out / "report.html")
    assert '"mean predicted probability of $x_{1}$ \\u003cb' not in shown  # a tag to Plotly
    assert '"mean predicted probability of $x_{1}$ &lt;b&gt;"' in shown
    svg = (out / "figures" / f"{file_stem(odd.name)}_forest.svg").read_text()
    assert Page(svg).open == []


def test_an_unfinished_run_leaves_nothing(tmp_path):
    """What was there before stays."""
    case = Case(targets=(LATE,))
    run(case, tmp_path)
    before = (tmp_path / "evaluate" / "manifest.json").read_bytes()
    write_file(tmp_path / "bad" / "profile.json", "{}")
    with pytest.raises(IntegrityError, match="no manifest"):
        run(case, tmp_path, profile=tmp_path / "bad" / "profile.json")
    assert (tmp_path / "evaluate" / "manifest.json").read_bytes() == before


def test_rows_as_units_are_said_once(tmp_path):
    """Not: 600 test rows, 600 rows."""
    params = PARAMS.model_copy(update={"unit": "row"})
    done, out, recorder = run(Case(targets=(DELAY,)), tmp_path, params)
    assert str(done).endswith("600 test rows")
    assert "600 test rows\n" in recorder.notes[-1]
    page = " ".join(Page((out / "report.html").read_text()).text)
    assert "600 rows" in page
    assert not re.search(r"600 rows[ ,(]+600 rows", " ".join(page.split()))


@pytest.mark.parametrize("name", ["km/h", "..", "a b"])
def test_a_target_of_any_name_has_files_of_its_own(tmp_path, name):
    """Its name is no path; a target whose plain form is the same keeps its own files."""
    targets = (Target(name=name, task="regression"), Target(name="a_b", task="regression"))
    case = Case(targets=targets)
    _, out, _ = run(case, tmp_path)
    assert set(read_json(out / "metrics.json")) == {name, "a_b"}
    files = {path.parent.name for path in tmp_path.rglob("*") if path.suffix in (".csv", ".svg")}
    assert files == {"plots", "figures", "evaluate"}
    predictions = tmp_path / "stack" / "predictions"
    assert {path.name for path in predictions.iterdir()} == {
        f"{file_stem(name)}.parquet",
        "a_b.parquet",
    }
