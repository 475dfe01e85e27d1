"""The published package: what was chosen, whole, the same bytes, and honest about bad rows."""

import json
import shutil
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from headrace.data.incoming import InputColumn
from headrace.data.predictions import read_predictions
from headrace.data.table import open_table
from headrace.errors import IntegrityError, SchemaError
from headrace.evaluation.rules import Temperature
from headrace.models.package import Package, load_package, read_example
from headrace.schema import Target
from headrace.stages.publish import PublishParams, requirements
from headrace.stages.stack import StackParams, stack
from headrace.storage import folder_digest, new_folder, write_json
from tests.published_case import TOLD, Case, make_case, publish_case, raw_columns, raw_rows


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def package(case: Case) -> Package:
    return load_package(case.package)


def replaced(rows: pa.Table, **columns: object) -> pa.Table:
    """Return ``rows`` with some columns replaced."""
    for name, values in columns.items():
        place = rows.column_names.index(name)
        rows = rows.set_column(
            place, name, pa.array(values) if isinstance(values, list) else values
        )
    return rows


def same(a: pa.Table, b: pa.Table) -> bool:
    """Whether two tables of predictions are equal, numbers to rounding of one batch or another."""
    return all(
        np.allclose(x.to_numpy(), y.to_numpy(), rtol=1e-12, atol=1e-12)
        if pa.types.is_floating(x.type)
        else x.equals(y)
        for x, y in zip(a.columns, b.columns, strict=True)
    )


def difference(predicted: pa.Table, folder: Path, target: Target, row_ids: np.ndarray) -> float:
    """Return how far the package's values are from those that a stage wrote of test rows."""
    expected = read_predictions(folder, target).of_split("test")
    assert np.array_equal(expected.row_id, row_ids)
    names = [n for n in predicted.column_names if n.startswith(f"{target.name}_prob")]
    found = np.column_stack([predicted[n].to_numpy() for n in names or [target.name]])
    return float(np.abs(found - expected.values.reshape(found.shape)).max())


def rewrite(folder: Path, copy: Path, change) -> Path:
    """Copy a stage's folder, change it, and give it a right manifest again."""
    with new_folder(copy) as private:
        shutil.copytree(folder, private, dirs_exist_ok=True)
        (private / "manifest.json").unlink()
        change(private)
    return copy


def test_raw_test_rows_get_the_predictions_of_what_was_chosen(case: Case, package: Package) -> None:
    """From extracted rows the package says what the chosen model or blend said on reduced ones."""
    extracted = open_table(case.root / "extract")
    features = list(extracted.contract.features)
    predicted = package.predict(extracted.read("test", features))
    row_ids = extracted.read("test", ["row_id"])["row_id"].to_numpy()

    for target in extracted.contract.targets:
        chosen = package.description.targets[target.name].chosen
        folder = case.root / "stack" if chosen == "stack" else case.members[chosen]
        assert difference(predicted, folder, target, row_ids) < 1e-9
    assert predicted.column_names == [
        "delay",
        "delay_low",
        "delay_high",
        "late",
        "late_probability_true",
        "late_set",
        "band",
        "band_probability_early",
        "band_probability_late",
        "band_probability_ontime",
        "band_set",
    ]


def test_labels_are_the_most_probable_ones(package: Package) -> None:
    """The label agrees with the probabilities beside it, and is right more often than not."""
    rows = raw_rows(200)
    predicted = package.predict(rows).to_pandas()

    assert ((predicted.late == "true") == (predicted.late_probability_true >= 0.5)).all()
    shares = predicted.filter(like="band_probability_")
    assert np.allclose(shares.sum(axis=1), 1)
    best = shares.idxmax(axis=1).str.removeprefix("band_probability_")
    assert (best == predicted.band).all()


def test_the_package_holds_what_is_used_and_no_pickle(case: Case) -> None:
    """Members without weight are not in it; every file is of a native format."""
    content = json.loads((case.package / "package.json").read_text())
    used = {name for one in content["targets"].values() for name in one["blend"]["weights"]}
    assert {path.name for path in (case.package / "models").iterdir()} == used
    suffixes = {path.suffix for path in case.package.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".cbm", ".txt"}
    assert "distance" in {column["name"] for column in content["inputs"]}
    seats = next(column for column in content["inputs"] if column["name"] == "seats")
    assert (seats["dtype"], seats["reduced"]) == ("int64", "uint8")


def test_a_member_nobody_chose_is_left_out(case: Case, tmp_path: Path) -> None:
    """A choice of one model for every target publishes that one alone, and it loads."""

    def choose_catboost(folder: Path) -> None:
        content = json.loads((folder / "selection.json").read_text())
        for entry in content["targets"].values():
            entry["chosen"] = "catboost"
        write_json(folder / "selection.json", content)

    for name in ("reduce", "encode"):
        shutil.copytree(case.root / name, tmp_path / name)
    rewrite(case.root / "stack", tmp_path / "stack", choose_catboost)
    publish_case(tmp_path, case.members, tmp_path / "publish", PublishParams(name="one"))

    package = load_package(tmp_path / "publish")
    assert list(package.models) == ["catboost"]
    assert package.predict(raw_rows(3)).num_rows == 3
    assert not [line for line in requirements({"catboost"}) if line.startswith("torch")]
    assert (tmp_path / "publish" / "requirements.txt").read_text().splitlines() == list(
        requirements({"catboost"})
    )


@pytest.mark.parametrize("method", ["greedy", "linear"])
def test_a_stack_is_published_as_it_predicts(case: Case, tmp_path: Path, method: str) -> None:
    """For every task and either method, also where the choice fell on a single model."""
    for name in ("reduce", "encode"):
        shutil.copytree(case.root / name, tmp_path / name)
    params = StackParams(method=method, num_resamples=200)
    stack(tmp_path / "reduce", case.members, tmp_path / "first", params, **TOLD)

    def choose_the_blend(folder: Path) -> None:
        content = json.loads((folder / "selection.json").read_text())
        for entry in content["targets"].values():
            entry["chosen"] = "stack"
        write_json(folder / "selection.json", content)

    rewrite(tmp_path / "first", tmp_path / "stack", choose_the_blend)
    published = publish_case(tmp_path, case.members, tmp_path / "publish", PublishParams())
    package = load_package(tmp_path / "publish")
    extracted = open_table(case.root / "extract")
    rows = extracted.read("test", ["row_id", *extracted.contract.features])
    predicted = package.predict(rows.drop_columns(["row_id"]))

    for target in extracted.contract.targets:
        distance = difference(predicted, tmp_path / "stack", target, rows["row_id"].to_numpy())
        assert distance < 1e-9
        blend = package.description.targets[target.name].blend
        assert blend.kind == ("mean" if method == "greedy" else "linear")
        assert f"{target.name}: {blend}" in str(published)


def test_the_same_inputs_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    """Publishing again, elsewhere, changes no byte."""
    again = publish_case(case.root, case.members, tmp_path / "again", PublishParams(name="flights"))

    assert again.digest == case.published.digest == folder_digest(case.package)


@pytest.mark.slow
def test_test_labels_do_not_change_what_is_published(case: Case, tmp_path: Path) -> None:
    """All stages again with the labels of the test rows permuted: the same package."""
    permuted = make_case(tmp_path, permute_test_labels=True)

    assert permuted.published.digest == case.published.digest


def test_predictions_are_decided_as_the_rules_say(case: Case, package: Package) -> None:
    """The package carries what decide wrote, byte for byte, and labels follow its threshold."""
    written = (case.package / "decisions.json").read_bytes()
    assert written == (case.root / "decide" / "decisions.json").read_bytes()
    rule = package.rules["late"].model_copy(
        update={"threshold": 0.9, "calibration": Temperature(temperature=2.0)}
    )
    strict = replace(package, rules={**package.rules, "late": rule})
    predicted = strict.predict(raw_rows(200)).to_pandas()

    raw = predicted.late_probability_true
    logit = np.log(raw / (1 - raw)) / 2
    assert np.allclose(predicted.late_calibrated_true, 1 / (1 + np.exp(-logit)), atol=1e-6)
    assert ((predicted.late == "true") == (predicted.late_calibrated_true >= 0.9)).all()
    assert predicted.late_calibrated_true.between(0.5, 0.9, inclusive="left").any()


def test_intervals_and_sets_cover_new_rows(package: Package) -> None:
    """Rows like those of the valid split: nine of ten truths lie inside, within chance."""
    columns = raw_columns(2000, seed=17)
    rows = pa.table({name: columns[name] for name in raw_rows(1).column_names})
    predicted = package.predict(rows).to_pandas()
    delay = columns["delay"].to_numpy()
    late = np.where(columns["late"].to_numpy(zero_copy_only=False), "true", "false")

    is_inside = (predicted.delay_low <= delay) & (delay <= predicted.delay_high)
    assert is_inside.mean() == pytest.approx(0.9, abs=0.06)
    sets = [json.loads(text) for text in predicted.late_set]
    assert {len(one) for one in sets} <= {1, 2}
    assert np.mean([truth in one for truth, one in zip(late, sets, strict=True)]) > 0.84
    assert all(
        label in one
        for label, one in zip(predicted.band, map(json.loads, predicted.band_set), strict=True)
    )


def test_an_example_holds_whole_numbers_of_64_unsigned_bits(tmp_path: Path) -> None:
    """An identifier beyond int64, as hashes are, comes back as it was."""
    column = InputColumn(name="hash", role="category", dtype="uint64", reduced="uint64")
    write_json(
        tmp_path / "input_example.json", {"columns": ["hash"], "data": [[2**64 - 1], [None]]}
    )

    assert read_example(tmp_path, [column])["hash"].to_pylist() == [2**64 - 1, None]


def test_requirements_name_ranges_not_what_is_installed() -> None:
    """The file is the same on every machine, and names only what loading needs."""
    lines = requirements({"nn"})

    assert any(line.startswith("torch>=") for line in lines)
    assert not [line for line in lines if "==" in line]
    assert not [line for line in lines if line.startswith(("prefect", "dvc", "duckdb", "mlflow"))]


def test_the_input_example_predicts(package: Package) -> None:
    """The rows in the package are raw rows, of the extracted types, and score."""
    example = read_example(package.folder, package.inputs)

    assert example.schema.field("seats").type == pa.int64()
    assert example.schema.field("carrier").type == pa.string()
    assert package.predict(example).num_rows == 5


def test_order_and_count_are_kept(package: Package) -> None:
    """Each row has its own prediction whatever its neighbours, and none is no row."""
    rows = raw_rows(40)
    whole = package.predict(rows)
    backwards = package.predict(rows.take(pa.array(range(39, -1, -1))))
    one_by_one = pa.concat_tables([package.predict(rows.slice(i, 1)) for i in range(0, 40, 13)])

    assert same(whole.take(pa.array(range(39, -1, -1))), backwards)
    assert same(whole.take(pa.array(range(0, 40, 13))), one_by_one)
    assert package.predict(rows.slice(0, 0)).num_rows == 0
    assert package.predict(rows.slice(0, 0)).schema == whole.schema


def test_unseen_categories_nulls_and_far_values_are_predicted(package: Package) -> None:
    """Nothing overflows, nothing is refused, and the row beside them is not touched."""
    rows = raw_rows(6)
    plain = package.predict(rows)
    odd = replaced(
        rows,
        carrier=["ZZ", None, "", "é" * 300, "AA", rows["carrier"][5].as_py()],
        gate=[2**62, None, -5, 3, 4, rows["gate"][5].as_py()],
        seats=[2**40, None, -1, 300, 70000, rows["seats"][5].as_py()],
        distance=[float("inf"), float("nan"), -1e308, None, 1e-300, rows["distance"][5].as_py()],
    )
    predicted = package.predict(odd)

    numbers = predicted.to_pandas().select_dtypes("number")
    assert np.isfinite(numbers.to_numpy()).all()
    assert same(predicted.slice(5), plain.slice(5))


def test_a_value_beyond_the_reduced_type_does_not_wrap(package: Package) -> None:
    """300 seats are no 44 seats, though the reduced column is uint8."""
    rows = raw_rows(1)
    wrapped = package.predict(replaced(rows, seats=[300 - 256]))
    beyond = package.predict(replaced(rows, seats=[300]))
    highest = package.predict(replaced(rows, seats=[199]))

    assert not same(beyond, wrapped)
    assert beyond["delay"][0].as_py() >= highest["delay"][0].as_py()


@pytest.mark.parametrize(
    "spelled",
    [
        lambda rows: rows.to_pandas(),
        lambda rows: rows.to_pandas(types_mapper=pd.ArrowDtype),
        lambda rows: rows.to_pandas().convert_dtypes(),
        lambda rows: rows.to_pandas().astype({"carrier": "category", "gate": "float64"}),
        lambda rows: rows.to_pandas().set_index(np.arange(len(rows)) * 7),
        lambda rows: replaced(rows, seats=rows["seats"].cast(pa.float64())),
        lambda rows: replaced(rows, seats=[Decimal(x) for x in rows["seats"].to_pylist()]),
        lambda rows: replaced(rows, is_weekend=rows["is_weekend"].cast(pa.int64())),
        lambda rows: replaced(rows, carrier=rows["carrier"].cast(pa.large_string())),
        lambda rows: rows.append_column("unasked", rows["seats"]).select(
            ["unasked", "gate", "carrier", "is_weekend", "seats", "distance"]
        ),
        lambda rows: pa.concat_tables([rows.slice(0, 7), rows.slice(7)]),
        lambda rows: rows.combine_chunks().to_batches()[0],
    ],
    ids=[
        "pandas", "arrow-pandas", "nullable", "category", "index", "float", "decimal",
        "bool-as-int", "large-string", "order-and-extra", "chunks", "batch",
    ],
)  # fmt: skip
def test_the_same_rows_spelled_otherwise_predict_the_same(package: Package, spelled) -> None:
    """The type a frame happens to have does not matter where the value is the same."""
    rows = raw_rows(20)

    assert same(package.predict(spelled(rows)), package.predict(rows))


def test_a_missing_column_is_named_with_the_nearest(package: Package) -> None:
    """A renamed column shows its new name in the message."""
    rows = raw_rows(3).rename_columns(["distanse", "seats", "is_weekend", "carrier", "gate"])

    with pytest.raises(SchemaError, match=r"lack the columns \['distance'\].*name: distanse"):
        package.predict(rows)


def test_a_column_that_comes_twice_is_refused(package: Package) -> None:
    """Which of the two is meant is not ours to guess."""
    frame = raw_rows(3).to_pandas()
    doubled = pd.concat([frame, frame[["gate"]]], axis=1)

    with pytest.raises(SchemaError, match=r"columns \['gate'\] twice"):
        package.predict(doubled)


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("seats", ["a", "b", "c"], "'seats' should be int64, but is string"),
        ("seats", [1.0, 2.5, 3.0], "'seats' should be int64, but holds 2.5, which is no whole"),
        ("distance", ["1", "2", "3"], "'distance' should be double, but is string"),
        ("carrier", [1, 2, 3], "'carrier' should be string, but is int64"),
        ("is_weekend", [0, 1, 2], "'is_weekend' should be bool, but holds 2"),
        ("is_weekend", ["no", "no", "no"], "'is_weekend' should be bool, but is string"),
    ],
)
def test_a_wrong_type_is_named(package: Package, name: str, values: list, told: str) -> None:
    """Column, expected type and what came."""
    with pytest.raises(SchemaError, match=f"do not fit the model's contract: {told}"):
        package.predict(replaced(raw_rows(3), **{name: values}))


def test_all_wrong_columns_are_told_at_once(package: Package) -> None:
    """Two faults, one message."""
    rows = replaced(raw_rows(2), seats=["a", "b"], carrier=[1, 2])

    with pytest.raises(SchemaError, match=r"'seats' .*; 'carrier' "):
        package.predict(rows)


def test_a_frame_with_mixed_types_is_refused(package: Package) -> None:
    """An object column of numbers and text is no column."""
    frame = raw_rows(2).to_pandas()
    frame["seats"] = pd.Series([1, "x"], dtype=object)

    with pytest.raises(SchemaError, match="'seats' mixes types"):
        package.predict(frame)


def test_a_damaged_package_is_not_loaded(case: Case, tmp_path: Path) -> None:
    """One flipped bit in a weight would be another model without an error."""
    copy = shutil.copytree(case.package, tmp_path / "copy")
    victim = sorted(copy.rglob("*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)

    with pytest.raises(IntegrityError, match=f"{victim.name} has another digest"):
        load_package(copy)


def test_a_package_that_is_not_there_names_the_remedy(tmp_path: Path) -> None:
    """Nothing published yet."""
    with pytest.raises(IntegrityError, match=r"does not exist; run `headrace repro`.*--model"):
        load_package(tmp_path / "publish")


def test_a_package_of_another_format_is_refused(case: Case, tmp_path: Path) -> None:
    """One of before decisions has a threshold of its own."""

    def raise_format(folder: Path) -> None:
        content = json.loads((folder / "package.json").read_text())
        write_json(folder / "package.json", {**content, "format": 2})

    copy = rewrite(case.package, tmp_path / "copy", raise_format)
    with pytest.raises(IntegrityError, match=r"package format 2.*headrace upgrade"):
        load_package(copy)


def test_a_choice_that_is_not_a_member_is_refused(case: Case, tmp_path: Path) -> None:
    """params.yaml lists fewer models than the stack was made of."""
    with pytest.raises(IntegrityError, match="are not among `models` in params"):
        publish_case(case.root, {}, tmp_path / "publish", PublishParams(name="x"))


def test_a_member_of_another_contract_is_refused(case: Case, tmp_path: Path) -> None:
    """A model trained on another table is not packed with this one's encoder."""

    def change_contract(folder: Path) -> None:
        content = json.loads((folder / "model.json").read_text())
        write_json(folder / "model.json", {**content, "contract": "0" * 64})

    members = {
        name: rewrite(folder, tmp_path / name, change_contract)
        for name, folder in case.members.items()
    }
    with pytest.raises(IntegrityError, match="was made for the data contract 000000000000"):
        publish_case(case.root, members, tmp_path / "publish", PublishParams(name="x"))
    assert not (tmp_path / "publish").exists()
